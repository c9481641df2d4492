"""Stops a run after a signal to a process, or after a preemption notice to a job."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax

from research.training.hooks.hook import Event, Hook, Idle, Rounds

if TYPE_CHECKING:
  from research.training.run import BaseRun


class Signals(Hook):
  """Checks after every dispatch whether to stop; a run that has completed is not stopped.

  Attributes:
    stopped: why a signal stopped the run, "interrupted" or "terminated"; '' if none did.
  """

  def __init__(self):
    self.stopped = ""
    self._listening = contextlib.ExitStack()
    self._told = self._listening.enter_context(watch())

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if isinstance(event, Rounds | Idle) and not run.reason:
      told = self._told()
      if told and run.step < run.steps:
        self.stopped = told
        run.stop(told)
    return ()

  def close(self) -> None:
    self._listening.close()


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], str]]:
  """Yields `stopped()`, which returns '' or the reason to stop, equal on all processes.

  A single process handles SIGTERM and SIGINT itself; a second SIGINT ends the process immediately.
  Outside the main thread, where Python does not allow signal handlers, signals are not handled.
  With several processes, JAX's preemption service receives a SIGTERM on any process and determines
  the call at which all processes stop.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    call = itertools.count()  # the service expects consecutive numbers, one per call
    yield lambda: "terminated" * multihost_utils.reached_preemption_sync_point(next(call))
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda: ""
    return
  received: list[str] = []

  def note(number, frame):
    del frame
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append("terminated" if number == signal.SIGTERM else "interrupted")

  before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield lambda: received[0] if received else ""
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
