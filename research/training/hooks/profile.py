"""Traces the second dispatch of a process, which needs no compilation, into OUT/profile."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from research.training.hooks.hook import End, Event, Hook
from research.training.reports import report

if TYPE_CHECKING:
  from research.training.run import BaseRun


class Profile(Hook):
  """Writes one profile; prints a line if there was no second dispatch."""

  def __init__(self, folder: Path):
    self._folder, self._dispatches = folder, 0

  @contextlib.contextmanager
  def around(self, run: "BaseRun", first: int, last: int) -> Iterator[None]:
    del first, last
    self._dispatches += 1
    if self._dispatches != 2:
      yield
      return
    jax.block_until_ready(run.metrics)
    with jax.profiler.trace(str(self._folder / "profile")):
      yield
      run.wait()

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    del run
    if isinstance(event, End) and self._dispatches < 2:
      report.note("--profile: the run had no second dispatch to trace")
    return ()
