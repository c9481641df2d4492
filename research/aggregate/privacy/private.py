"""Differential privacy: each worker clips what it has and adds its share of Gaussian noise."""

import math
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp

from research.aggregate.presence import unweighted, weighted
from research.aggregate.privacy.hiding import Noise, Sum
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregator, Array, Key, Trait, Tree

SCOPE = "noisy"  # in the names of a traced program's operations
_LEAST, _GREATEST = 1e-30, 1e36  # so that no worker's noise is zero or infinite in float32
_AT_ONCE = 2**19  # numbers drawn by one loop


_ONE_NOISE = {Trait.NOISE: "one accountant cannot tell what two noises hide"}


class Noisy(Aggregator, name="noisy"):
  """Clips what each worker has, all leaves together, and adds its share of Gaussian noise.

      y_i = x_i min(1, clip / ||x_i||) + N(0, (noise clip)^2 / W),   value = A(y)
      sum_i y_i = sum_i clipped x_i + N(0, (noise clip)^2)

  Each worker draws with its own key and its own noise adds up to the whole: no one is trusted to
  add it. With one example per worker it is DP-SGD, with one user per worker its user-level form.
  The denominator is W, also where some workers sat the round out: theirs is a tree of zeros, to
  which they add their noise as all do. With sampling at a rate q the value is thus q times the
  paper's. A rule that selects or votes leaves them out.

  What is guaranteed: the sum over all W workers is a Gaussian mechanism of sensitivity `clip` when
  one worker's tree is replaced by zero (added or removed), and `epsilon(noise, ...)` is what T
  rounds of it spend, to someone who sees only what is computed from these sums, if all workers are
  honest. If k of them give their noise away, are themselves the ones who look, or drop out, what
  protects the others is noise sqrt((W - k) / W). Whatever is a function of the sum costs nothing
  more: mean, hierarchical_mean, power_sgd, sum_mean of float32 payloads. Any other inner, and those
  who see single messages, see y_i with its own share alone; there only the local guarantee
  epsilon(noise / sqrt(W), ...) follows, since a function of all y_i costs nothing more than they.

  Rounding comes after the noise, so that it does not change the sensitivity; but a sum of rounded
  y_i is no function of sum_i y_i. To bfloat16 (sum_mean(bf16()), a bfloat16 leaf), whose steps
  depend on y_i, only the local guarantee is left. To multiples of a unit u (`secure_sum`) it is a
  function of sum_i y_i and of all y_i mod u. Given the latter, each noise is a discrete Gaussian on
  a shifted lattice, whose sums are those of one Gaussian up to factors 1 + O(exp(-pi^2 s^2 / u^2))
  by an element, s being a worker's own deviation; and y_i mod u itself is uniform up to
  exp(-2 pi^2 s^2 / u^2). From s = 2 u on that is below 1e-16, and the sum is accounted for as is
  that of the y_i if the range of secure_sum leaves room for clip + 8 s: what is cut there is no
  rounding. Else each message is. The noise is float32, whose gaps are not accounted for.

  A tree whose norm is not finite becomes NaN, which all see: it is outside the guarantee.

  Args:
    inner: the aggregator of the noisy trees, over the same workers. `sent` is what it says.
    clip: the largest L2 norm of a worker's tree, over all leaves, in [1e-30, 1e36].
    noise: the deviation of the sum's noise over `clip`, the noise multiplier; 0 hides nothing.
    axis: the worker axes that share the noise, those over which `inner` averages.

  Raises:
    ValueError: if clip, noise or their product is out of its range, or the inner adds noise.

  Reference: Abadi et al. 2016, arXiv 1607.00133, algorithm 1; noise shared by the workers:
    Kairouz, Liu, Steinke 2021, arXiv 2102.06387, algorithm 1, here with continuous noise;
    sums of discrete Gaussians: theorem 1 there, Canonne, Kamath, Steinke 2020, arXiv 2004.00010.
  """

  inner: Aggregator
  _: KW_ONLY
  clip: float
  noise: float
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.NOISE | Trait.WHOLE
  refuses = _ONE_NOISE

  def check(self):
    if not _LEAST <= self.clip <= _GREATEST:
      raise ValueError(f"clip={self.clip} is not in [{_LEAST:g}, {_GREATEST:g}]")
    checks.in_range("noise", self.noise, "[0, inf)")
    if self.noise and not _LEAST <= self.noise * self.clip <= _GREATEST:
      raise ValueError(
        f"noise={self.noise} times clip={self.clip} is not in [{_LEAST:g}, {_GREATEST:g}], where "
        "float32 has it"
      )

  @property
  def privacy(self):
    seen = self.inner.privacy
    return Noise(self.clip, self.noise, self.axis, seen if isinstance(seen, Sum) else None)

  def init(self, params):
    return self.inner.init(params)

  @jax.named_scope(SCOPE)
  def aggregate(self, tree, state, key, presence=EVERYONE):
    tree = weighted(tree, presence)
    noise_key, inner_key = jax.random.split(key)
    hidden = self._hidden(tree, collectives.worker_key(noise_key, self.axis))
    is_counted = self.inner.traits & (Trait.SELECTS | Trait.VOTE)
    there = unweighted(presence) if is_counted else EVERYONE
    return self.inner.aggregate(hidden, state, inner_key, there)

  def _hidden(self, tree: Tree, key: Key) -> Tree:
    """The clipped tree with this worker's noise."""
    deviation = self.noise * self.clip / math.sqrt(collectives.worker_count(self.axis))
    scale = _clip_scale(tree, self.clip)
    leaves, treedef = jax.tree.flatten(tree)

    def one(leaf: int, x: Array) -> Array:
      drawn = _normal(jax.random.fold_in(key, leaf), x.shape)
      return (x.astype(jnp.float32) * scale + deviation * drawn).astype(x.dtype)

    return treedef.unflatten([one(leaf, x) for leaf, x in enumerate(leaves)])


noisy = Noisy


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """float32 `jax.random.normal`; of many workers on a device, of some at a time.

  What a generator passes from round to round then stays in a cache: 400 workers' draws of 26,000
  take 12 ns each on a CPU, and all at once 33.
  """
  plain = lambda key: jax.random.normal(key, shape, jnp.float32)
  together = max(1, _AT_ONCE // max(1, math.prod(shape)))
  draw = jax.custom_batching.custom_vmap(plain)

  @draw.def_vmap
  def _of_workers(size: int, in_batched: list[bool], keys: jax.Array) -> tuple[jax.Array, bool]:
    del in_batched
    if size <= together:
      return jax.vmap(plain)(keys), True
    return jax.lax.map(plain, keys, batch_size=together), True

  return draw(key)


def _clip_scale(tree: Tree, clip: float) -> jax.Array:
  """min(1, clip / ||tree||), NaN where the norm is not finite."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  norm = jnp.sqrt(sum(squares, jnp.float32(0)))
  return jnp.where(jnp.isfinite(norm), jnp.minimum(1, clip / norm), jnp.nan)
