"""The regression that all contracts run on, and what tests remember of running methods on it."""

import functools
from typing import Any

from catalogue import METHODS

from research.testing.problem import (
  EXECUTORS,
  FEATURES,
  OUTPUTS,
  SIMULATED,
  Running,
  distance,
  regression,
  split,
)

__all__ = [
  "EXECUTORS",
  "FEATURES",
  "OUTPUTS",
  "SIMULATED",
  "Running",
  "distance",
  "regression",
  "simulated",
  "split",
]


@functools.cache
def simulated(name: str, rounds: int) -> Any:
  """Parameters after rounds of eight simulated workers, each on all of its 30 examples."""
  return Running(METHODS[name], "simulate", SIMULATED, batch_size=None).rounds(rounds).params()
