"""The privacy accountant: the epsilon that rounds of `noisy` have spent."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from research.core import checks

CONVERSIONS = ("rdp", "rdp_old", "pld")
_LEAST_NOISE = 1e-100  # whose divergences are floats; with less, what is spent is infinite
_RESOLVED = 1e-15  # of a divergence
_STEP, _FARTHEST = 0.02, 200.0  # of the integrals over x, in deviations


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
  checks.at_least("steps", steps)
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
  checks.in_range("noise", noise, "(0, inf)")
  checks.in_range("rate", rate, "(0, 1]")
  if clients < 1 or (clients > 1 and rate < 1):
    raise ValueError(f"clients={clients} is not at least 1, or, with rate={rate}, 1")
  checks.in_range("delta", delta, "(0, 1)")
