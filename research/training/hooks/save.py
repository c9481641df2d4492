"""Saves checkpoints at every `checkpoint_every` steps and at the end, and restores the newest."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from research.parallel import resize
from research.training.checkpoint.checkpoint import Checkpoints
from research.training.hooks.hook import Event, Hook, Pause, Rounds, Saved, Stop
from research.training.reports import report
from research.training.together import of_first_process

if TYPE_CHECKING:
  from research.training.loop import Run


class Save(Hook):
  """The checkpoints of a run, at least `checkpoint_seconds` apart by the first process's clock."""

  def __init__(self, run: "Run", folder: Path):
    self.every = run.config.checkpoint_every
    placed = resize.placed(run.problem.job, run.problem.executor.layout.state, run.state)
    self._checkpoints = Checkpoints(folder.resolve() / "checkpoints", run.state, placed)

  def restore(self, run: "Run") -> None:
    """Puts a run at its newest whole checkpoint, if it has any.

    Raises:
      CheckpointError: if there are checkpoints and none is whole.
    """
    found = self._checkpoints.restore(run.state, report.note)
    if found is not None:
      run.step, run.state = found
      report.note(f"resuming at step {run.step}")

  def kept(self) -> str:
    """Which checkpoint is left, for messages."""
    latest = self._checkpoints.latest()
    return "no checkpoint was saved yet" if latest is None else f"checkpoint {latest} is kept"

  def on(self, run: "Run", event: Event) -> Iterable[Event]:
    if isinstance(event, Stop):
      return self._last(run)
    # the last step is evaluated first, so that its row says so
    is_last = run.reason or run.step == run.problem.steps
    if isinstance(event, Rounds) and not is_last and run.due(event, self.every):
      seconds = run.timing.elapsed() - self._checkpoints.saved_at
      if of_first_process(seconds >= run.config.checkpoint_seconds):
        return self._saved(run)
    return ()

  def _saved(self, run: "Run") -> Iterator[Event]:
    yield Pause(run.step)
    with run.aside():
      self._checkpoints.save(run.step, run.state, run.timing.elapsed())
    yield Saved(run.step)

  def _last(self, run: "Run") -> Iterator[Event]:
    if self._checkpoints.latest() != run.step:
      yield from self._saved(run)
    self._checkpoints.wait()

  def close(self) -> None:
    self._checkpoints.close()
