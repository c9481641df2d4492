"""Defines the interface of hooks, and the events that a run passes to hooks."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from research.core.base import Array

if TYPE_CHECKING:
  from research.training.run import BaseRun


class Rounds(NamedTuple):
  """A dispatch of rounds has been started; the devices may still be computing the rounds.

  With a server, the dispatch is complete, and each loss is a mean over the steps of an update.
  """

  first: int  # number of local steps before the dispatch
  last: int  # number of local steps at the end of the dispatch
  metrics: Mapping[str, Array]  # on the devices: "loss" [last - first], "finite"


class Idle(NamedTuple):
  """A server's processes have produced no new row since the last event."""

  step: int


class Rewound(NamedTuple):
  """A server has died; the run continues from the newest checkpoint, and later rows are invalid."""

  step: int


class Evaluation(NamedTuple):
  """The deployed model has been evaluated."""

  step: int
  row: Mapping[str, Any]  # columns that join the row of this step in metrics.jsonl


class Pause(NamedTuple):
  """The host is about to wait for the devices; hooks first fetch pending results."""

  step: int


class Saved(NamedTuple):
  """A checkpoint has been started."""

  step: int


class Stop(NamedTuple):
  """No more rounds will start; the last evaluation, comparison and checkpoint follow."""

  step: int
  reason: str  # "steps", "converged", "terminated", "interrupted", or a user hook's reason


class End(NamedTuple):
  """The run is saved; a run that was stopped early may still be evaluated."""

  step: int
  reason: str


Event = Rounds | Idle | Rewound | Evaluation | Pause | Saved | Stop | End
COMPLETE = ("steps", "converged")  # reasons with which a run is complete


class Hook:
  """Reacts to the events of a run; the default implementation does nothing.

  Attributes:
    every: dispatches end at multiples of this number of local steps; 0 means no requirement.
  """

  every: int = 0

  def around(
    self, run: "BaseRun", first: int, last: int
  ) -> contextlib.AbstractContextManager[object]:
    """Context manager in which the host starts the dispatch from step `first` to step `last`."""
    del run, first, last
    return contextlib.nullcontext()

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    """Handles an event; all hooks receive each yielded event before this method continues."""
    del run, event
    return ()

  def close(self) -> None:
    """Releases resources; called once at the end, also after an exception."""


class FunctionHook(Hook):
  """Wraps a user's function `(run, event) -> reason to stop, or None`."""

  def __init__(self, function: Callable[["BaseRun", Event], str | None]):
    self._function = function

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if (reason := self._function(run, event)) and not run.reason:
      run.stop(str(reason))
    return ()
