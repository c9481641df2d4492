"""Waiting for the slowest of several workers, and for a server, against closed forms."""

import math

import pytest

from research.analysis import waiting


def test_the_mean_of_the_maximum_of_normal_variables():
  assert waiting.normal_maximum(1) == pytest.approx(0, abs=1e-9)
  assert waiting.normal_maximum(2) == pytest.approx(1 / math.pi**0.5)
  assert waiting.normal_maximum(3) == pytest.approx(1.5 / math.pi**0.5)


def repaired(workers: int, away: float, service: float) -> float:
  """Erlang's stationary distribution of the machine repair model, by its own formula."""
  weights = [
    math.factorial(workers) / math.factorial(workers - n) * (service / away) ** n
    for n in range(workers + 1)
  ]
  return (1 - weights[0] / sum(weights)) / service


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("service", [0.01, 0.5, 3.0])
def test_a_server_serves_what_the_repair_model_says(workers, service):
  found = waiting.updates_per_second(workers, 1.0, service)
  assert found == pytest.approx(repaired(workers, 1.0, service))
  assert found < min(workers / (1 + service), 1 / service) * (1 + 1e-9)
