"""Reads the kernel's network counters of all hosts while a run trains."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from research.comm import counters
from research.training.hooks.hook import End, Event, Hook, Stop

if TYPE_CHECKING:
  from research.training.run import BaseRun


class Network(Hook):
  """Adds up the bytes sent by training, excluding evaluations, checkpoints and connection setup.

  The hook does nothing unless a launcher provides the counters. Process 0 reads the counters of all
  hosts when training begins, continues or is interrupted, so that dispatches follow each other
  without waiting. Each reading waits until the counters stop changing.
  """

  def __init__(self, run: "BaseRun", main: bool):
    self._counters = counters.told(os.environ) if main else None
    self._sum = np.zeros((len(self._counters.files) if self._counters else 0, 4), np.int64)
    self._steps = 0
    self._first = True
    self._begun: tuple[int, np.ndarray] | None = None  # step and counters at the last start
    self._after: dict[int, np.ndarray] = {}
    run.before_aside = lambda: self._interrupted(run)

  @contextlib.contextmanager
  def around(self, run: "BaseRun", first: int, last: int) -> Iterator[None]:
    """Starts counting bytes, except in the first dispatch, in which the hosts connect."""
    del last
    if self._counters and not self._first and not self._begun:
      run.wait()
      self._begun = first, self._counters.settled()
    self._first = False
    yield

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if isinstance(event, Stop | End):
      self._interrupted(run)
    return ()

  def _interrupted(self, run: "BaseRun") -> None:
    """Adds the bytes sent since training began or continued."""
    if not self._counters or not self._begun:
      return
    run.wait()
    (step, before), self._begun = self._begun, None
    self._sum = self._sum + self._counters.settled() - before
    self._steps += run.step - step
    self._after[run.step] = self._sum

  def row(self, step: int) -> dict[str, Any]:
    """Returns the columns of the row at an interruption: the bytes per host so far."""
    found = self._after.pop(step, None)
    if found is None:
      return {}
    columns = dict(zip(counters.NAMES, found.T.tolist(), strict=True))
    return {f"kernel_{name}": columns[name] for name in ("tx_bytes", "rx_bytes")}

  def summary(self) -> dict[str, Any]:
    """Returns entries of the summary's `wire`: the mean bytes per step and host."""
    if not self._steps:
      return {}
    return {"kernel_bytes_per_step_per_host": counters.per_step(self._sum, self._steps)}
