"""Differential privacy: clipping and noise for each worker, and what a run of them has spent."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.aggregate import composition
from research.aggregate.presence import unweighted, weighted
from research.aggregate.privacy.hiding import Noise, Sum
from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregator, Tree

CONVERSIONS = ("rdp", "rdp_old", "pld")
SCOPE = "noisy"  # in the names of a traced program's operations
_LEAST, _GREATEST = 1e-30, 1e36  # so that no worker's noise is zero or infinite in float32
_LEAST_NOISE = 1e-100  # whose divergences are floats; with less, what is spent is infinite
_RESOLVED = 1e-15  # of a divergence
_AT_ONCE = 2**19  # numbers drawn by one loop
_STEP, _FARTHEST = 0.02, 200.0  # of the integrals over x, in deviations


def noisy(
  inner: Aggregator, *, clip: float, noise: float, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
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
  if not _LEAST <= clip <= _GREATEST:
    raise ValueError(f"clip={clip} is not in [{_LEAST:g}, {_GREATEST:g}]")
  if not 0 <= noise < math.inf:
    raise ValueError(f"noise={noise} is not in [0, inf)")
  if noise and not _LEAST <= noise * clip <= _GREATEST:
    raise ValueError(
      f"noise={noise} times clip={clip} is not in [{_LEAST:g}, {_GREATEST:g}], where float32 has it"
    )
  composition.refuse("noisy", inner)

  counted = inner.traits & {"selects", "vote"}

  @jax.named_scope(SCOPE)
  def aggregate(tree, state, key, presence=EVERYONE):
    tree = weighted(tree, presence)
    noise_key, inner_key = jax.random.split(key)
    own = collectives.worker_key(noise_key, axis)
    deviation = noise * clip / math.sqrt(collectives.worker_count(axis))
    scale = _clip_scale(tree, clip)
    leaves, treedef = jax.tree.flatten(tree)

    def one(leaf, x):
      drawn = _normal(jax.random.fold_in(own, leaf), x.shape)
      return (x.astype(jnp.float32) * scale + deviation * drawn).astype(x.dtype)

    hidden = treedef.unflatten([one(leaf, x) for leaf, x in enumerate(leaves)])
    there = unweighted(presence) if counted else EVERYONE
    return inner.aggregate(hidden, state, inner_key, there)

  seen = inner.privacy if isinstance(inner.privacy, Sum) else None
  told = Noise(clip, noise, axis, seen)
  return Aggregator(inner.init, aggregate, inner.traits | {"noise", "whole"}, privacy=told)


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
  _check(noise, rate, 1, delta)
  if steps < 1:
    raise ValueError(f"steps={steps}; it is at least 1")
  if conversion not in CONVERSIONS:
    raise ValueError(f"conversion='{conversion}' is not in {', '.join(CONVERSIONS)}")
  if conversion == "rdp":
    return spending(noise, delta, rate=rate)(steps)
  library = _library()
  if conversion == "pld":
    round_ = library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(noise))
    run = library.SelfComposedDpEvent(round_, steps)
    return float(library.pld.PLDAccountant().compose(run).get_epsilon(delta))
  orders, of_round = _of_poisson(noise, rate)
  return float(min(steps * of_round + math.log(1 / delta) / (orders - 1)))


def spending(
  noise: float, delta: float, *, rate: float = 1.0, clients: int = 1
) -> Callable[[int], float]:
  """rounds -> the epsilon that so many rounds of `noisy` spend; what a round spends is found once.

  With a rate it is `epsilon(noise, rate, rounds, delta)`. With `clients` R > 1 every worker holds a
  stratum of R clients and serves one of them in each round, drawn uniformly; neighbours differ in
  whether one client's trees are what they are or zero. How that is counted:

  Let a_j, v be the clipped trees of the others of that client's stratum and its own, norms at most
  C, N_m a Gaussian around m of the sum's deviation, q = 1/R, and all other strata's choices fixed,
  since a mixture of pairs is no easier to tell apart than the worst of them. One of

      P = A + q N_v,   Q = A + q N_0,   A = sum_j q N_{a_j}

  is seen. For g >= 1 the hockey-stick divergence of P from Q is

      H_g(P, Q) = max_S P(S) - g Q(S) = max_S q N_v(S) - g q N_0(S) - (g - 1) A(S)

  where, given p = N_v(S), N_0(S) and N_{a_j}(S) are at least Phi(Phi^-1(p) - d), d being |v| and
  |v - a_j| in deviations (Neyman and Pearson): least for |v| = C and a_j = -v. Half-lines attain
  these bounds all at once for the pair on the line

      (1 - q) N_{-C} + q N_C   from   (1 - q) N_{-C} + q N_0                                  (1)

  which is thus the worst one. In the same way H_g(Q, P) is largest where all a_j = v, for

      (1 - q) N_C + q N_0   from   N_C                                                        (2)

  the pair of Poisson sampling at the rate q. As H_{1/g}(P, Q) = 1 - 1/g + H_g(Q, P) / g, the two
  bound both directions for all g > 0, so also every Renyi divergence, which integrates H_g over g;
  and those add up over rounds, each of which may depend on what the ones before have shown. What
  is spent lies between that of Poisson sampling at 1/R and that without sampling.

  The draw of a round is to hide whom it serves: a client's tree must not depend on whom earlier
  rounds served other than through what they have shown (no state of each client), nor other
  workers' trees on whom this one serves (no weights relative to the cohort's mean, so clients of
  one size). Elsewhere take clients=1, which holds whoever is served.

  Args:
    noise: the noise multiplier, greater than 0. Where a round has several noisy exchanges m,
      noise / sqrt(m).
    delta: in (0, 1).
    rate: of Poisson sampling, in (0, 1].
    clients: R, how many clients a worker has to choose from; 1 with a rate.

  Raises:
    ValueError: if an argument is out of its range.
    ImportError: without the package dp-accounting.

  Reference: hockey-stick divergences and sampling: Balle, Barthe, Gaboardi 2018, arXiv 1807.01647,
    theorems 2 and 10; composition: Zhu, Dong, Wang 2022, arXiv 2106.08567; the wider bound for any
    replacement: Wang, Balle, Kasiviswanathan 2019, arXiv 1808.00087, theorem 27.
  """
  _check(noise, rate, clients, delta)
  library = _library()
  if noise < _LEAST_NOISE:
    return lambda rounds: math.inf if rounds else 0.0
  noise = min(noise, 1 / _LEAST_NOISE)
  orders, of_round = _of_poisson(noise, rate)
  if clients > 1:
    of_round = _of_strata(noise, clients, orders)
  spent = lambda rounds: library.rdp.compute_epsilon(orders, rounds * of_round, delta)[0]
  return lambda rounds: float(spent(rounds)) if rounds else 0.0


def _of_poisson(noise: float, rate: float) -> tuple[np.ndarray, np.ndarray]:
  """Orders, and the Renyi divergences of a round with Poisson sampling.

  The library finds the divergences of small rates as differences of numbers near 1, which come out
  as zero or below; they are no less than what such a difference resolves.
  """
  library = _library()
  event = library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(noise))
  accountant = library.rdp.RdpAccountant().compose(event)
  return accountant.orders, np.maximum(accountant.rdp, 0 if rate == 1 else _RESOLVED)


def _of_strata(noise: float, clients: int, orders: np.ndarray) -> np.ndarray:
  """Renyi divergences [orders] of a round, at most: of pair (1) where P > Q, of (2) elsewhere.

  With L = P/Q and f(t) = t^a - 1 - a (t - 1), E_Q L^a = 1 + E_Q f(L) [L > 1] + E_Q f(L) [L < 1],
  integrals over x in deviations. In both pairs, the second one mirrored, L > 1 where x > C/2.
  """
  c, share = 1 / noise, 1 / clients
  found = orders * c**2 / 2  # without sampling
  kept = np.flatnonzero(orders * c <= _FARTHEST)
  if not kept.size:
    return found
  step = _STEP / max(1.0, c)
  x = np.arange(c / 2, c * orders[kept].max() + 12, step)
  normal = lambda mean: -((x - mean) ** 2) / 2 - math.log(2 * math.pi) / 2
  mixed = lambda one, other: np.logaddexp(one + math.log1p(-share), other + math.log(share))
  opposite = mixed(normal(-c), normal(c)), mixed(normal(-c), normal(0))
  poisson = mixed(normal(0), normal(c)), normal(0)

  def above(log_p, log_q, a):
    ratio = np.maximum(log_p - log_q, 0)
    size = log_q + a * ratio
    rest = -np.expm1(-a * ratio) - a * (np.exp((1 - a) * ratio) - np.exp(-a * ratio))
    total = step * np.sum(np.exp(size - size.max()) * np.maximum(rest, 0))
    return size.max() + np.log(total + np.finfo(float).tiny)

  def below(log_p, log_q, a):
    ratio = np.maximum(log_p - log_q, 0)
    return np.log1p(step * np.sum(np.exp(log_p) * (np.expm1(-a * ratio) - a * np.expm1(-ratio))))

  for i, a in zip(kept, orders[kept], strict=True):
    ways = ((opposite, poisson), (poisson, opposite))
    found[i] = max(np.logaddexp(above(*p, a), below(*q, a)) for p, q in ways) / (a - 1)
  return found


def _library() -> Any:
  try:
    import dp_accounting
  except ImportError:
    raise ImportError('epsilon needs dp-accounting: pip install -e ".[private]"') from None
  return dp_accounting


def _check(noise: float, rate: float, clients: int, delta: float) -> None:
  if not 0 < noise < math.inf:
    raise ValueError(f"noise={noise} is not in (0, inf)")
  if not 0 < rate <= 1:
    raise ValueError(f"rate={rate} is not in (0, 1]")
  if clients < 1 or (clients > 1 and rate < 1):
    raise ValueError(f"clients={clients} is not at least 1, or, with rate={rate}, 1")
  if not 0 < delta < 1:
    raise ValueError(f"delta={delta} is not in (0, 1)")
