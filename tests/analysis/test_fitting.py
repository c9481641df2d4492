"""The fit of a network's constants finds the constants that made the times."""

import numpy as np
import pytest

from research.analysis import fitting
from research.analysis.fitting import Sample
from research.analysis.network import Network

TRUE = Network(1e8, 1e8, burst=2.5e5, message=3e-4, byte=2e-9)
SIZES = (4e3, 6e4, 2.6e5, 1e6, 3e6)


def samples(network: Network, noise: float = 0.0) -> list[Sample]:
  random = np.random.default_rng(0)
  found = []
  for hops, share in ((2, 1.0), (1, 1.0), (1, 0.5)):
    for size in SIZES:
      for idle in (1e-4, 0.1):
        one = Sample("all-reduce", share * size, hops, idle, 0.0)
        seconds = fitting.predicted(one, network) * np.exp(noise * random.normal())
        found.append(one._replace(seconds=seconds))
  return found


def constants(network: Network) -> tuple[float, ...]:
  return network.message, network.byte, network.upload, network.burst


def test_exact_times_give_exact_constants():
  found = fitting.fitted(samples(TRUE))
  assert constants(found.network) == pytest.approx(constants(TRUE), rel=1e-3)
  assert found.median < 1e-4


def test_a_few_disturbed_times_change_little():
  times = samples(TRUE, noise=0.02)
  times[3] = times[3]._replace(seconds=20 * times[3].seconds)
  found = fitting.fitted(times)
  assert found.network.upload == pytest.approx(TRUE.upload, rel=0.03)
  assert found.network.message == pytest.approx(TRUE.message, rel=0.1)
  assert found.network.burst == pytest.approx(TRUE.burst, rel=0.1)


def test_an_unlimited_link_has_no_rate():
  fast = Network(message=3e-4, byte=2e-9)
  found = fitting.fitted(samples(fast), limited=False).network
  assert (found.message, found.byte) == pytest.approx((3e-4, 2e-9), rel=1e-3)
  assert found.upload == float("inf")


def test_too_few_samples_are_refused():
  with pytest.raises(ValueError, match="3 samples are too few"):
    fitting.fitted(samples(TRUE)[:3])
