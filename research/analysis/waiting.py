"""Predicts waiting times: for the slowest of several workers, and in the queue of a server.

Reference: Reiser and Lavenberg, 1980, "Mean-value analysis of closed multichain queuing networks",
  Journal of the ACM 27(2).
"""

import functools


@functools.cache
def normal_maximum(workers: int) -> float:
  """Returns the mean of the maximum of W independent standard normal variables.

  Args:
    workers: W.
  """
  from scipy import integrate, stats  # late, because a wrong flag does not need it

  density = lambda x: x * workers * stats.norm.pdf(x) * stats.norm.cdf(x) ** (workers - 1)
  return float(integrate.quad(density, -10, 10)[0])


def slowest(mean: float, spread: float, workers: int, steps: float = 1) -> float:
  """Returns the mean time of the slowest of W workers, whose times are independent and normal.

  Over several steps without an exchange, fast and slow steps of a worker cancel:

      seconds per step = mean (1 + spread / sqrt(steps) * E[max of W standard normals])

  Args:
    mean: a worker's mean seconds per step.
    spread: the coefficient of variation of a worker's time per step.
    workers: W.
    steps: steps from one exchange to the next.

  Returns:
    Seconds per step.
  """
  return mean * (1 + spread / steps**0.5 * normal_maximum(workers))


def updates_per_second(workers: int, away: float, service: float) -> float:
  """Returns the rate at which a server serves W workers that each have one request at a time.

  A worker computes and communicates for `away` seconds, then waits until the server has served the
  workers before it and itself. Service times are exponential, and first come is first served (the
  machine repair model); the recursion over the number n of workers is exact:

      R_n = service (1 + Q_(n-1)),   X_n = n / (away + R_n),   Q_n = X_n R_n

  Args:
    workers: W.
    away: mean seconds from the end of a worker's service to its next request.
    service: mean seconds for which the server works on a request.
  """
  rate, queue = 0.0, 0.0
  for count in range(1, workers + 1):
    response = service * (1 + queue)
    rate = count / (away + response)
    queue = rate * response
  return rate
