"""Writes a run's rows to metrics.jsonl and TensorBoard, and shows its progress."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from research.parallel import diagnostics
from research.training.hooks import finite, heartbeat
from research.training.hooks.hook import Evaluation, Event, Hook, Pause, Rounds
from research.training.reports import report
from research.training.virtual import Served

if TYPE_CHECKING:
  from research.training.loop import Run

Columns = Callable[[int], Mapping[str, Any]]  # of a step


class Log(Hook):
  """Rows at the multiples of `log_every` and at the end of each dispatch.

  The metrics of a dispatch are fetched when the next one has been started, so that the devices do
  not wait for the host; earlier if an evaluation or a checkpoint waits for them anyway.

  Attributes:
    rows: those of this process, where there is no folder to keep them in.
  """

  def __init__(
    self,
    run: "Run",
    evaluated_on: str,
    of_rows: Columns,
    of_dispatches: Columns = lambda step: {},
    *,
    folder: Path | None = None,
    shown: bool = True,
  ):
    """Goes on after the run's step with the rows of an earlier part of the run.

    Args:
      run: where it is.
      evaluated_on: "test" or "train".
      of_rows: columns of every row, by its step.
      of_dispatches: columns of the last row of a dispatch.
      folder: of metrics.jsonl; None keeps the rows in memory, and so do the processes that are not
        `shown`.
      shown: whether this process writes and shows progress.
    """
    self.rows: list[dict[str, Any]] = []
    self._of_rows, self._of_dispatches = of_rows, of_dispatches
    self._pending: Rounds | None = None
    self._file = report.Metrics(folder, run.step, run.config.tensorboard) if folder else None
    if self._file and self._file.last:
      run.timing.resume(self._file.last["seconds"])
    self._progress = report.Progress(run.problem.steps, evaluated_on, shown)
    self._progress.start(run.step)

  def on(self, run: "Run", event: Event) -> Iterable[Event]:
    if isinstance(event, Rounds):
      self._write(run)
      self._pending = event
    elif isinstance(event, Evaluation):
      self._write(run, event.row)
    elif isinstance(event, Pause):
      self._write(run)
    return ()

  def _write(self, run: "Run", evaluated: Mapping[str, Any] | None = None) -> None:
    """Fetches the pending dispatch's metrics and writes its rows."""
    if self._pending is None:
      return
    (first, last, found), self._pending = self._pending, None
    found = jax.device_get(found)
    run.timing.dispatch_done(last - first)
    finite.check_rounds(first, last, found, run.kept())
    rows = self._rows(run, first, last, found)
    rows[-1] |= {**self._of_dispatches(last), **(evaluated or {})}
    heartbeat.beat()
    if self._file:
      self._file.write(rows)
    else:
      self.rows += rows
    self._progress.update(rows[-1])

  def _rows(
    self, run: "Run", first: int, last: int, found: Mapping[str, Any]
  ) -> list[dict[str, Any]]:
    """The mean loss since the row before, and the columns of each row's step."""
    every = run.config.log_every
    starts = [first, *range((first // every + 1) * every, last, every)]
    counts = np.diff([*starts, last])
    places = np.subtract(starts, first)
    mean = lambda x: np.add.reduceat(x, places, dtype=np.float64) / counts
    seconds = round(run.timing.elapsed(), 4)
    stops = [*starts[1:], last]
    rows = [
      {"step": stop, "loss": loss, "seconds": seconds, **self._of_rows(stop)}
      for stop, loss in zip(stops, mean(found["loss"]).tolist(), strict=True)
    ]
    if own := {name: mean(x).tolist() for name, x in found.get("auxiliary", {}).items()}:
      for place, row in enumerate(rows):
        row["auxiliary"] = {name: values[place] for name, values in own.items()}
    if norms := found.get("norms"):
      for row in rows:
        row["diagnostics"] = _diagnostics(run, norms, first, row["step"])
    return rows

  def close(self) -> None:
    self._progress.close()
    if self._file:
      self._file.close()


def _diagnostics(
  run: "Run", norms: Mapping[str, np.ndarray], first: int, step: int
) -> dict[str, float]:
  """Those of the round that a step ends or lies in, of a dispatch from step `first` on."""
  plan, virtual = run.problem.plan, run.problem.virtual
  number = math.ceil(plan.rounds(step)) - 1
  place = number - round(plan.rounds(first))
  means = {name: float(norms[name][place]) for name in diagnostics.NAMES}
  steps = len(norms[diagnostics.GRADIENT]) // len(norms["update"])
  last_step = (place + 1) * steps - 1  # of the round
  found = diagnostics.columns(means, float(norms[diagnostics.GRADIENT][last_step]))
  if isinstance(virtual, Served):
    found["staleness"] = float(virtual.staleness[number])
  return found
