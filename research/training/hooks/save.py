"""Saves checkpoints every `checkpoint_every` steps and at the end; restores a checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import jax

from research.training.hooks.hook import Event, Hook, Pause, Rounds, Saved, Stop
from research.training.reports import report
from research.training.together import of_first_process

if TYPE_CHECKING:
  from research.training.run import BaseRun


class CheckpointStore(Protocol):
  """The checkpoints of a run, by step."""

  saved_at: float  # seconds of the run's clock at the newest save

  def save(self, step: int, state: Any, now: float) -> None:
    """Saves a state; `now` becomes `saved_at`."""

  def restore(self, like: Any, warn: Callable[[str], None]) -> tuple[int, Any] | None:
    """Returns the step and the state of the newest intact checkpoint; None if there is none."""

  def latest(self) -> int | None:
    """Returns the newest saved step, or None."""

  def wait(self) -> None:
    """Waits until all saves are on disk."""

  def close(self) -> None:
    """Waits for the last save."""


class Save(Hook):
  """Saves a run at most once per `checkpoint_seconds`, measured by process 0."""

  def __init__(self, run: "BaseRun", store: CheckpointStore):
    self.every, self._store = run.config.checkpoint_every, store

  def restore(self, run: "BaseRun") -> None:
    """Restores a run from its newest intact checkpoint, if any.

    Raises:
      CheckpointError: if there are checkpoints, but none is intact.
    """
    found = self._store.restore(run.state, report.note)
    if found is not None:
      run.step, run.state = found
      report.note(f"resuming at step {run.step}")

  def kept(self) -> str:
    """Describes the checkpoint that a failed run leaves, for messages."""
    latest = self._store.latest()
    return "no checkpoint was saved yet" if latest is None else f"checkpoint {latest} is kept"

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if isinstance(event, Stop):
      return self._last(run)
    # the last step is evaluated before the save, so that the step's row has the evaluation
    is_last = run.reason or run.step == run.steps
    if isinstance(event, Rounds) and not is_last and run.due(event, self.every):
      seconds = run.timing.elapsed() - self._store.saved_at
      if jax.process_count() > 1:
        run.wait()  # the broadcast must not mix with collectives that other devices still run
      if of_first_process(seconds >= run.config.checkpoint_seconds):
        return self._saved(run)
    return ()

  def _saved(self, run: "BaseRun") -> Iterator[Event]:
    yield Pause(run.step)
    with run.aside():
      self._store.save(run.step, run.state, run.timing.elapsed())
    yield Saved(run.step)

  def _last(self, run: "BaseRun") -> Iterator[Event]:
    if self._store.latest() != run.step:
      yield from self._saved(run)
    self._store.wait()

  def close(self) -> None:
    self._store.close()
