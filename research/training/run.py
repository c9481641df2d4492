"""A run as the loop and its hooks see it, whatever executes its rounds."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from research.core.base import Array, Params
from research.core.task import Data
from research.parallel.job import Job
from research.training.config import Config
from research.training.hooks.hook import Event, Rounds
from research.training.plan import Plan
from research.training.reports.timing import Timing


class BaseRun:
  """A run in progress. Subclasses advance it: compiled programs, a server's processes, a replay.

  Attributes:
    config: its flags.
    plan: when its rounds begin and end.
    steps: local steps after which it is complete.
    timing: its clock.
    step: local steps that have been started.
    reason: why it stops; "" while it goes on.
    state: what a checkpoint stores.
    metrics: of the newest dispatch.
    kept: says which checkpoint is left, for messages.
  """

  state: Any

  def __init__(self, config: Config, plan: Plan, steps: int, timing: Timing | None = None):
    self.config, self.plan, self.steps, self.timing = config, plan, steps, timing or Timing()
    self.step, self.reason = 0, ""
    self.metrics: Mapping[str, Array] = {}
    self.kept: Callable[[], str] = lambda: "no checkpoint was saved yet"

  @property
  def job(self) -> Job:
    """The job of the first stage: those of the others differ only in their period."""
    return self.plan.jobs[0]

  def advance(self, to: int) -> Event:
    """Starts a dispatch that ends at step `to`, or earlier; returns the event that says where."""
    raise NotImplementedError

  def prepare(self, to: int) -> None:
    """Reads what the next dispatch, up to step `to`, will need."""

  def params(self) -> Params:
    """The model one would deploy now."""
    raise NotImplementedError

  def examples(self) -> tuple[Data, Data | None]:
    """The training and test examples, placed for evaluation."""
    raise NotImplementedError

  def stop(self, reason: str) -> None:
    """Starts no more rounds; the run is evaluated and saved."""
    self.reason = reason

  def end(self, every: Sequence[int]) -> int:
    """The end of the next dispatch: a multiple of one of `every`, or a stage of the plan.

    It is a whole number of rounds from zero, and a function of absolute steps, so that a resumed
    run is cut where an unbroken one is.
    """
    plan = self.plan
    stops = [(self.step // n + 1) * n for n in every if n > 0]
    return min(
      plan.end(min([self.steps, plan.next_stage(self.step) or self.steps, *stops])), self.steps
    )

  def rows(self, first: int, last: int, metrics: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The steps of a dispatch that get a row, ascending, and columns that they have.

    Args:
      first: local steps before the dispatch.
      last: local steps after it; the last row's.
      metrics: of the dispatch, on the host.
    """
    del metrics
    every = self.config.log_every
    return {step: {} for step in (*range((first // every + 1) * every, last, every), last)}

  def due(self, rounds: Rounds, every: int) -> bool:
    """Whether a dispatch comes to a multiple of `every`."""
    return every > 0 and rounds.last // every > rounds.first // every

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Context of work that is no training step; it starts when the current dispatch is done."""
    jax.block_until_ready(self.metrics)
    with self.timing.aside():
      yield
