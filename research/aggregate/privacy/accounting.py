"""Accounts for privacy: computes the epsilon that rounds of `noisy` spend."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from research.core import checks

CONVERSIONS = ("rdp", "rdp_old", "pld")
_LEAST_NOISE = 1e-100  # with less noise, divergences are not finite floats, and epsilon is infinite
_RESOLVED = 1e-15  # smallest divergence that the library computes accurately
_STEP, _FARTHEST = 0.02, 200.0  # step and range of the integrals over x, in standard deviations


def epsilon(noise: float, rate: float, steps: int, delta: float, conversion: str = "rdp") -> float:
  """Computes the epsilon of (epsilon, delta)-differential privacy after `steps` rounds of `noisy`.

  Neighbouring data sets differ in the presence of one worker (or one example, if each worker has
  one). In each round, every worker participates independently with probability `rate` (Poisson
  sampling).

  Args:
    noise: the noise multiplier, greater than 0.
    rate: the sampling rate, in (0, 1]; 1 means that every worker participates in every round.
    steps: T, the number of rounds, at least 1.
    delta: the delta of the guarantee, in (0, 1).
    conversion: the accounting method: 'rdp', Renyi accounting with the library's conversion;
      'rdp_old', Renyi accounting with epsilon = min over a of rdp(a) + log(1 / delta) / (a - 1), as
      in older papers; or 'pld', privacy loss distributions, which give the tightest epsilon.

  Returns:
    The epsilon.

  Raises:
    ValueError: if an argument is out of range.
    ImportError: if the package dp-accounting is not installed.

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
  """Returns a function that computes the epsilon that a given number of rounds spends.

  The cost of a round is computed only once. With a rate, the result is `epsilon(noise, rate,
  rounds, delta)`. With `clients` R > 1, every worker has a stratum of R clients and samples one of
  them uniformly in each round. Neighbouring data sets differ in one client, whose trees are
  replaced by zero in one of the sets. The bound for this case is derived as follows.

  Let v be the clipped tree of this client, and let a_j be the clipped trees of the other clients of
  its stratum, with norms at most C. Let N_m be a Gaussian with mean m and the standard deviation of
  the noise in the sum, and let q = 1/R. Fix the choices of all other strata: a mixture of pairs is
  no easier to distinguish than the worst of these pairs. The observer sees one of

      P = A + q N_v,   Q = A + q N_0,   A = sum_j q N_{a_j}

  For g >= 1 the hockey-stick divergence of P from Q is

      H_g(P, Q) = max_S P(S) - g Q(S) = max_S q N_v(S) - g q N_0(S) - (g - 1) A(S)

  If N_v(S) = p, then N_0(S) and N_{a_j}(S) are at least Phi(Phi^-1(p) - d), where d is |v| or
  |v - a_j| in standard deviations (Neyman and Pearson). These bounds are smallest for |v| = C and
  a_j = -v. Half-lines S attain all of these bounds at once for the one-dimensional pair

      (1 - q) N_{-C} + q N_C   from   (1 - q) N_{-C} + q N_0                                  (1)

  which is therefore the worst case. Likewise, H_g(Q, P) is largest if all a_j = v, which gives the
  pair

      (1 - q) N_C + q N_0   from   N_C                                                        (2)

  This is also the pair for Poisson sampling at rate q. Since
  H_{1/g}(P, Q) = 1 - 1/g + H_g(Q, P) / g, the two pairs bound both directions for all g > 0. They
  therefore bound every Renyi divergence, which is an integral of H_g over g. Renyi divergences add
  up over rounds, even if a round depends on the outputs of earlier rounds. The resulting epsilon
  lies between those for Poisson sampling at rate 1/R and for no sampling.

  The bound is valid only if nobody sees which clients a round samples. A client's tree must not
  depend on earlier samples except through published values (no per-client state). Other workers'
  trees must not depend on this worker's sample (no weights relative to the cohort's mean, i.e.
  clients of equal size). Otherwise, use clients=1, which is valid for any choice of clients.

  Args:
    noise: the noise multiplier, greater than 0. For m noisy exchanges per round, pass
      noise / sqrt(m).
    delta: the delta of the guarantee, in (0, 1).
    rate: the rate of Poisson sampling, in (0, 1].
    clients: R, the number of clients per worker; must be 1 if rate < 1.

  Returns:
    A function from the number of rounds to epsilon.

  Raises:
    ValueError: if an argument is out of range.
    ImportError: if the package dp-accounting is not installed.

  Reference: Balle, Barthe, Gaboardi 2018, arXiv 1807.01647, theorems 2 and 10 (hockey-stick
    divergences and sampling); Zhu, Dong, Wang 2022, arXiv 2106.08567 (composition); Wang, Balle,
    Kasiviswanathan 2019, arXiv 1808.00087, theorem 27 (a wider bound for any replacement).
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
  """Returns orders, and the Renyi divergence of each order for a round with Poisson sampling.

  For small rates, the library computes a divergence as a difference of numbers near 1, which can
  round to zero or below. We replace divergences that are smaller than the resolution of such a
  difference with this resolution.
  """
  library = _library()
  event = library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(noise))
  accountant = library.rdp.RdpAccountant().compose(event)
  return accountant.orders, np.maximum(accountant.rdp, 0 if rate == 1 else _RESOLVED)


def _of_strata(noise: float, clients: int, orders: np.ndarray) -> np.ndarray:
  """Computes upper bounds [orders] of a round's Renyi divergences, from pairs (1) and (2).

  With L = P/Q and f(t) = t^a - 1 - a (t - 1), E_Q L^a = 1 + E_Q f(L) [L > 1] + E_Q f(L) [L < 1].
  Pair (1) bounds the term with L > 1, and pair (2) bounds the term with L < 1. The expectations are
  integrals over x, in standard deviations. In pair (1) and in the mirrored pair (2), L > 1 if
  x > C/2.
  """
  c, share = 1 / noise, 1 / clients
  found = orders * c**2 / 2  # the divergences without sampling
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
