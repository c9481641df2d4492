"""What a run's loop tells its hooks, and what a hook is."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from research.core.base import Array

if TYPE_CHECKING:
  from research.training.run import BaseRun


class Rounds(NamedTuple):
  """A dispatch of rounds has been started; the devices may still be computing it.

  Of a server it has been done, and its losses are means over the steps of an update.
  """

  first: int  # local steps before it
  last: int  # local steps after it
  metrics: Mapping[str, Array]  # on the devices: "loss" [last - first], "finite"


class Waiting(NamedTuple):
  """A server's processes have come to no new row since the last event."""

  step: int


class Rewound(NamedTuple):
  """A server has died: the run goes on from its newest checkpoint, and later rows are void."""

  step: int


class Evaluation(NamedTuple):
  """The deployed model has been measured."""

  step: int
  row: Mapping[str, Any]  # columns that join the row of this step in metrics.jsonl


class Pause(NamedTuple):
  """The host is about to wait for the devices: results under way are fetched first."""

  step: int


class Saved(NamedTuple):
  """A checkpoint has been started."""

  step: int


class Stop(NamedTuple):
  """There are no more rounds: the last evaluation, comparison and checkpoint are due."""

  step: int
  reason: str  # "steps", "converged", "terminated", "interrupted", or what a hook of the user gave


class End(NamedTuple):
  """The run is saved; a run that was stopped early may still be evaluated."""

  step: int
  reason: str


Event = Rounds | Waiting | Rewound | Evaluation | Pause | Saved | Stop | End
COMPLETE = ("steps", "converged")  # reasons of a run that has nothing left to do


class Hook:
  """What happens beside the rounds of a run. By default nothing does.

  Attributes:
    every: local steps; dispatches end at its multiples. 0: wherever they end.
  """

  every: int = 0

  def around(
    self, run: "BaseRun", first: int, last: int
  ) -> contextlib.AbstractContextManager[object]:
    """Entered while the host starts the dispatch from step `first` to step `last`."""
    del run, first, last
    return contextlib.nullcontext()

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    """Handles an event; the events that it yields are told to all hooks before it goes on."""
    del run, event
    return ()

  def close(self) -> None:
    """Called once at the end, also after an exception."""


class Call(Hook):
  """A user's function `(run, event) -> reason to stop, or None`."""

  def __init__(self, function: Callable[["BaseRun", Event], str | None]):
    self._function = function

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if (reason := self._function(run, event)) and not run.reason:
      run.stop(str(reason))
    return ()
