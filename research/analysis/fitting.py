"""Fits the constants of a network to measured times of collectives, by robust least squares.

The time of a collective that starts after an idle time is modelled as in `cost.py`:

    seconds = hops message + max(sent byte, 8 sent / rate - min(8 burst / rate, idle))

The squared differences of logarithms are minimized with a soft L1 loss, so that a few disturbed
measurements do not matter. The unknowns are logarithms, so that all constants are positive.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from research.analysis import cost
from research.analysis.network import Network

BURSTS = tuple(2.0**n for n in range(12, 25, 2))  # bytes from which the fit starts


class Sample(NamedTuple):
  """One measured collective."""

  operation: str
  sent: float  # bytes that a worker sends
  hops: float  # messages that follow one another
  idle: float  # seconds before it in which the link was idle
  seconds: float


class Fit(NamedTuple):
  """Fitted constants, and how well they predict the measured times."""

  network: Network
  errors: list[float]  # relative error of each sample, predicted over measured minus one

  @property
  def median(self) -> float:
    """The median of the absolute relative errors."""
    return float(np.median(np.abs(self.errors)))


def predicted(sample: Sample, network: Network) -> float:
  """Predicts the seconds of one collective.

  Args:
    sample: the collective; its seconds are not used.
    network: the constants.
  """
  load = cost.Load(sample.sent, sample.hops)
  return load.host(network) + load.link(network, sample.idle + load.host(network))


def fitted(samples: Sequence[Sample], limited: bool = True) -> Fit:
  """Fits message, byte, rate and burst.

  Args:
    samples: the measured collectives, of several sizes and both with and without pauses.
    limited: whether the link limits the rate; if not, only `message` and `byte` are fitted.

  Raises:
    ValueError: if there are fewer than eight samples.
  """
  if len(samples) < 8:
    raise ValueError(f"{len(samples)} samples are too few to fit four constants")
  largest = max(samples, key=lambda one: one.sent)
  shortest = min(one.seconds / one.hops for one in samples)
  per_byte = largest.seconds / largest.sent
  start = [shortest, per_byte / 5, 8 / per_byte][: 3 if limited else 2]
  starts = [[*start, burst] for burst in BURSTS] if limited else [start]

  def network(logs: np.ndarray) -> Network:
    message, byte, *link = np.exp(logs).tolist()
    found = Network(message=message, byte=byte)
    return found.replace(upload=link[0], download=link[0], burst=link[1]) if limited else found

  def residuals(logs: np.ndarray) -> np.ndarray:
    found = network(logs)
    return np.array([math.log(predicted(one, found) / one.seconds) for one in samples])

  tried = [
    optimize.least_squares(residuals, np.log(one), loss="soft_l1", f_scale=0.1) for one in starts
  ]
  best = min(tried, key=lambda one: one.cost)
  return Fit(network(best.x), np.expm1(residuals(best.x)).tolist())
