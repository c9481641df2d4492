"""Differential privacy: clipping and noise for each worker, and what a run of them has spent."""

import math

import jax
import jax.numpy as jnp

from research.aggregate import composition
from research.base import WORKER_AXES, Aggregator, Tree
from research.comm import collectives

CONVERSIONS = ("rdp", "rdp_old", "pld")


def noisy(
  inner: Aggregator, *, clip: float, noise: float, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
  """Clips what each worker has, all leaves together, and adds its share of Gaussian noise.

      y_i = x_i min(1, clip / ||x_i||) + N(0, (noise clip)^2 / W),   value = A(y)
      sum_i y_i = sum_i clipped x_i + N(0, (noise clip)^2)

  Each worker draws with its own key and its own noise adds up to the whole: no one is trusted to
  add it. With one example per worker it is DP-SGD, with one user per worker its user-level form.
  The denominator is W, also where some workers' trees are zero because they sat the round out: they
  add their noise as all do. With sampling at a rate q the value is thus q times the paper's.

  What is guaranteed: the sum over all W workers is a Gaussian mechanism of sensitivity `clip` when
  one worker's tree is replaced by zero (added or removed), and `epsilon(noise, ...)` is what T
  rounds of it spend, to someone who sees only what is computed from these sums, if all workers are
  honest. If k of them give their noise away, are themselves the ones who look, or drop out, what
  protects the others is noise sqrt((W - k) / W). Whatever is a function of the sum costs nothing
  more: mean, sum_mean, power_sgd. An inner that decodes each worker's message by itself and not
  linearly (gather_mean of a quantiser, two_phase, median), and anyone who sees single messages, see
  y_i with its own share alone; there only the local guarantee epsilon(noise / sqrt(W), ...)
  follows. `secure_sum` hides the y_i, but rounds each one after the noise: up to its grid it is a
  function of the sum, and exact accounting would want discrete noise. Its own clip has to leave
  room for the noise. The noise is float32, whose gaps are not accounted for.

  A tree whose norm is not finite becomes NaN, which all see: it is outside the guarantee.

  Args:
    inner: the aggregator of the noisy trees, over the same workers. `sent` is what it says.
    clip: the largest L2 norm of a worker's tree, over all leaves; greater than 0.
    noise: the deviation of the sum's noise over `clip`, the noise multiplier; 0 hides nothing.
    axis: the worker axes that share the noise, those over which `inner` averages.

  Raises:
    ValueError: if clip or noise is out of its range, or the inner adds noise already.

  Reference: Abadi et al. 2016, arXiv 1607.00133, algorithm 1; noise shared by the workers:
    Kairouz, Liu, Steinke 2021, arXiv 2102.06387, algorithm 1, here with continuous noise.
  """
  if not 0 < clip < math.inf:
    raise ValueError(f"clip={clip} is not in (0, inf)")
  if not 0 <= noise < math.inf:
    raise ValueError(f"noise={noise} is not in [0, inf)")
  composition.refuse("noisy", inner)

  def aggregate(tree, state, key):
    noise_key, inner_key = jax.random.split(key)
    own = collectives.worker_key(noise_key, axis)
    deviation = noise * clip / math.sqrt(collectives.worker_count(axis))
    scale = _clip_scale(tree, clip)
    leaves, treedef = jax.tree.flatten(tree)

    def one(leaf, x):
      drawn = jax.random.normal(jax.random.fold_in(own, leaf), x.shape, jnp.float32)
      return (x.astype(jnp.float32) * scale + deviation * drawn).astype(x.dtype)

    hidden = treedef.unflatten([one(leaf, x) for leaf, x in enumerate(leaves)])
    return inner.aggregate(hidden, state, inner_key)

  return Aggregator(inner.init, aggregate, inner.traits | {"noise", "whole"})


def _clip_scale(tree: Tree, clip: float) -> jax.Array:
  """min(1, clip / ||tree||), NaN where the norm is not finite."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  norm = jnp.sqrt(sum(squares, jnp.float32(0)))
  return jnp.where(jnp.isfinite(norm), jnp.minimum(1, clip / norm), jnp.nan)


def epsilon(noise: float, rate: float, steps: int, delta: float, conversion: str = "rdp") -> float:
  """The epsilon of (epsilon, delta)-differential privacy that `steps` rounds of `noisy` spend.

  Neighbours differ in one worker (one example, where a worker has one) that is there or not; in
  each round each worker takes part independently with probability `rate` (Poisson sampling).

  Args:
    noise: the noise multiplier, greater than 0.
    rate: of sampling, in (0, 1]; 1 where every worker is in every round.
    steps: T, rounds, at least 1.
    delta: in (0, 1).
    conversion: 'rdp', Renyi accounting with the library's conversion; 'rdp_old', the same by
      epsilon = min over a of rdp(a) + log(1 / delta) / (a - 1), as older papers have it; 'pld', by
      privacy loss distributions, the tightest.

  Raises:
    ValueError: if an argument is out of its range.
    ImportError: without the package dp-accounting.

  Reference: Mironov 2017, arXiv 1702.07476, proposition 3 (rdp_old); Canonne, Kamath, Steinke 2020,
    arXiv 2004.00010, proposition 12 (rdp); Doroshenko et al. 2022, arXiv 2207.04380 (pld).
  """
  _check(noise, rate, steps, delta, conversion)
  try:
    import dp_accounting
  except ImportError:
    raise ImportError('epsilon needs dp-accounting: pip install -e ".[private]"') from None
  round_ = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
  run = dp_accounting.SelfComposedDpEvent(round_, steps)
  if conversion == "pld":
    return float(dp_accounting.pld.PLDAccountant().compose(run).get_epsilon(delta))
  accountant = dp_accounting.rdp.RdpAccountant().compose(run)
  if conversion == "rdp":
    return float(accountant.get_epsilon(delta))
  return float(min(accountant.rdp + math.log(1 / delta) / (accountant.orders - 1)))


def _check(noise: float, rate: float, steps: int, delta: float, conversion: str) -> None:
  if not 0 < noise < math.inf:
    raise ValueError(f"noise={noise} is not in (0, inf)")
  if not 0 < rate <= 1:
    raise ValueError(f"rate={rate} is not in (0, 1]")
  if steps < 1:
    raise ValueError(f"steps={steps}; it is at least 1")
  if not 0 < delta < 1:
    raise ValueError(f"delta={delta} is not in (0, 1)")
  if conversion not in CONVERSIONS:
    raise ValueError(f"conversion='{conversion}' is not in {', '.join(CONVERSIONS)}")
