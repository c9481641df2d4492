"""The kernel's counters of all hosts over a run's training, where a launcher names them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from research.comm import counters


class Network:
  """Adds up what training sends, without evaluations, checkpoints, and connecting.

  Without a launcher that names counters it does nothing. With one, dispatches do not overlap with
  the host's work, and each waits until the counters are at rest. Process 0 reads for all hosts.
  """

  def __init__(self, main: bool):
    self._counters = counters.told(os.environ) if main else None
    self._sum = np.zeros((len(self._counters.files) if self._counters else 0, 4), np.int64)
    self._steps = 0
    self._first = True
    self._after: dict[int, np.ndarray] = {}

  @contextlib.contextmanager
  def over(self, before: int, after: int, results: Callable[[], Any]) -> Iterator[None]:
    """Around a dispatch from one step to another that leaves `results()`.

    The first one of the process is not counted: in it the hosts connect.
    """
    if self._counters is None:
      yield
      return
    jax.block_until_ready(results())
    start = self._counters.settled()
    yield
    jax.block_until_ready(results())
    if not self._first:
      self._sum = self._sum + self._counters.settled() - start
      self._steps += after - before
      self._after[after] = self._sum
    self._first = False

  def row(self, step: int) -> dict[str, Any]:
    """For the row of metrics of a dispatch's last step: bytes so far, host by host."""
    found = self._after.pop(step, None)
    if found is None:
      return {}
    columns = dict(zip(counters.NAMES, found.T.tolist(), strict=True))
    return {f"kernel_{name}": columns[name] for name in ("tx_bytes", "rx_bytes")}

  def summary(self) -> dict[str, Any]:
    """For `wire` of the summary: means per step, host by host."""
    if not self._steps:
      return {}
    return {"kernel_bytes_per_step_per_host": counters.per_step(self._sum, self._steps)}
