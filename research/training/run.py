"""Defines the interface between a run and the training loop, independent of the executor."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from research.core.base import Params
from research.core.part import required
from research.core.task import Data
from research.parallel.job import Job
from research.training.config import Config
from research.training.hooks.hook import Event, Rounds
from research.training.plan import Plan
from research.training.reports.timing import Timing


class BaseRun:
  """A run in progress; subclasses run compiled programs, server processes or a replay.

  Attributes:
    config: the flags.
    plan: the steps at which rounds begin and end.
    steps: number of local steps of the complete run.
    timing: the clock of the run.
    step: number of local steps that have been started.
    reason: the reason why the run stops; "" while the run continues.
    state: the state that a checkpoint stores.
    metrics: the metrics of the newest dispatch.
    kept: a function that describes the checkpoint that a failed run leaves, for messages.
    before_aside: a function that is called before work other than training steps.
  """

  state: Any

  def __init__(self, config: Config, plan: Plan, steps: int, timing: Timing | None = None):
    self.config, self.plan, self.steps, self.timing = config, plan, steps, timing or Timing()
    self.step, self.reason = 0, ""
    self.metrics: Mapping[str, Any] = {}
    self.kept: Callable[[], str] = lambda: "no checkpoint was saved yet"
    self.before_aside: Callable[[], None] = lambda: None

  @property
  def job(self) -> Job:
    """The job of the first stage; the jobs of later stages differ only in their period."""
    return self.plan.jobs[0]

  @required
  def advance(self, to: int) -> Event:
    """Starts a dispatch that ends at step `to` or earlier; returns the dispatch's event."""
    ...

  def prepare(self, to: int) -> None:
    """Reads the data of the next dispatch, up to step `to`."""

  @required
  def params(self) -> Params:
    """The current model to deploy."""
    ...

  @required
  def examples(self) -> tuple[Data, Data | None]:
    """Returns the training and test examples, placed for evaluation."""
    ...

  def wait(self) -> None:
    """Waits for all started work; other processes do not have to call this method."""
    jax.block_until_ready(self.state)

  def stop(self, reason: str) -> None:
    """Requests that no more rounds start; the run is then evaluated and saved."""
    self.reason = reason

  def end(self, every: Sequence[int]) -> int:
    """Returns the end of the next dispatch: a multiple of a number in `every`, or a stage's end.

    The end is a whole number of rounds after step 0 and depends only on absolute steps, so a
    resumed run has the same dispatches as an uninterrupted run.
    """
    plan = self.plan
    stops = [(self.step // n + 1) * n for n in every if n > 0]
    return min(
      plan.end(min([self.steps, plan.next_stage(self.step) or self.steps, *stops])), self.steps
    )

  def rows(self, first: int, last: int, metrics: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the columns of a dispatch's rows, by step in ascending order.

    Args:
      first: number of local steps before the dispatch.
      last: number of local steps at the end of the dispatch; this is the step of the last row.
      metrics: the metrics of the dispatch, on the host.
    """
    del metrics
    every = self.config.log_every
    return {step: {} for step in (*range((first // every + 1) * every, last, every), last)}

  def due(self, rounds: Rounds, every: int) -> bool:
    """Returns whether a dispatch reaches a multiple of `every`."""
    return every > 0 and rounds.last // every > rounds.first // every

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Context manager for work other than training steps; first waits for the current dispatch."""
    jax.block_until_ready(self.metrics)
    self.before_aside()
    with self.timing.aside():
      yield
