"""Reads the kernel's network counters of all hosts around the dispatches of a run."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from research.comm import counters
from research.training.hooks.hook import Hook

if TYPE_CHECKING:
  from research.training.run import BaseRun


class Network(Hook):
  """Adds up the bytes sent by training, excluding evaluations, checkpoints and connection setup.

  The hook does nothing unless a launcher provides the counters. With counters, dispatches do not
  overlap with the host's work, and each dispatch waits until the counters stop changing. Process 0
  reads the counters of all hosts.
  """

  def __init__(self, main: bool):
    self._counters = counters.told(os.environ) if main else None
    self._sum = np.zeros((len(self._counters.files) if self._counters else 0, 4), np.int64)
    self._steps = 0
    self._first = True
    self._after: dict[int, np.ndarray] = {}

  @contextlib.contextmanager
  def around(self, run: "BaseRun", first: int, last: int) -> Iterator[None]:
    """Counts the bytes of a dispatch, except the first one, in which the hosts connect."""
    if self._counters is None:
      yield
      return
    jax.block_until_ready(run.state)
    start = self._counters.settled()
    yield
    jax.block_until_ready(run.state)
    if not self._first:
      self._sum = self._sum + self._counters.settled() - start
      self._steps += last - first
      self._after[last] = self._sum
    self._first = False

  def row(self, step: int) -> dict[str, Any]:
    """Returns the columns of the row at a dispatch's last step: the bytes per host so far."""
    found = self._after.pop(step, None)
    if found is None:
      return {}
    columns = dict(zip(counters.NAMES, found.T.tolist(), strict=True))
    return {f"kernel_{name}": columns[name] for name in ("tx_bytes", "rx_bytes")}

  def summary(self) -> dict[str, Any]:
    """Returns the entries of `wire` in the summary: means per step and host."""
    if not self._steps:
      return {}
    return {"kernel_bytes_per_step_per_host": counters.per_step(self._sum, self._steps)}
