"""Writes a run's rows to metrics.jsonl and TensorBoard, and shows its progress."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from research.training.hooks import finite, heartbeat
from research.training.hooks.hook import Evaluation, Event, Hook, Pause, Rewound, Rounds
from research.training.reports import report

if TYPE_CHECKING:
  from research.training.run import BaseRun

Columns = Callable[[int], Mapping[str, Any]]  # maps a step to columns


class Log(Hook):
  """Writes rows at the multiples of `log_every` and at the end of each dispatch.

  The metrics of a dispatch are fetched after the next dispatch has been started, so that the
  devices do not wait for the host. If an evaluation or a checkpoint must wait for the devices
  anyway, the metrics are fetched before this wait.

  Attributes:
    rows: the rows of this process, if there is no folder.
    last: the newest row of an earlier part of the run.
  """

  def __init__(
    self,
    run: "BaseRun",
    label: Callable[[str], str],
    of_rows: Columns = lambda step: {},
    of_dispatches: Columns = lambda step: {},
    *,
    folder: Path | None = None,
    shown: bool = True,
  ):
    """Continues the rows of an earlier part of the run, if any.

    Args:
      run: the run, whose step determines which rows are kept.
      label: maps the name of a metric of an evaluation to its label.
      of_rows: a function that maps a step to further columns of the step's row.
      of_dispatches: columns of the last row of a dispatch.
      folder: the folder of metrics.jsonl; None keeps the rows in memory.
      shown: whether this process shows progress.
    """
    self.rows: list[dict[str, Any]] = []
    self._of_rows, self._of_dispatches = of_rows, of_dispatches
    self._pending: Rounds | None = None
    self._folder = folder
    self._file = self._opened(run)
    self.last = self._file.last if self._file else None
    if self.last:
      run.timing.resume(self.last["seconds"])
    self._progress = report.Progress(run.steps, label, shown)
    self._progress.start(run.step)

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if isinstance(event, Rounds):
      self._write(run)
      self._pending = event
    elif isinstance(event, Evaluation):
      self._write(run, event.row)
    elif isinstance(event, Pause):
      self._write(run)
    elif isinstance(event, Rewound):
      self._rewind(run)
    return ()

  def _opened(self, run: "BaseRun") -> report.Metrics | None:
    """Opens the file of rows, and keeps the rows up to the run's step."""
    if self._folder is None:
      return None
    return report.Metrics(self._folder, run.step, run.config.tensorboard)

  def _rewind(self, run: "BaseRun") -> None:
    """Drops the rows after the run's step."""
    self._pending, self.rows = None, [row for row in self.rows if row["step"] <= run.step]
    if self._file:
      self._file.close()
      self._file = self._opened(run)

  def _write(self, run: "BaseRun", evaluated: Mapping[str, Any] | None = None) -> None:
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
    self, run: "BaseRun", first: int, last: int, found: Mapping[str, Any]
  ) -> list[dict[str, Any]]:
    """Returns the rows of a dispatch: the mean loss since the previous row, and further columns."""
    columns = run.rows(first, last, found)
    stops = list(columns)
    counts = np.diff([first, *stops])
    places = np.subtract([first, *stops[:-1]], first)
    mean = lambda x: np.add.reduceat(x, places, dtype=np.float64) / counts
    seconds = round(run.timing.elapsed(), 4)
    rows = [
      {"step": stop, "loss": loss, "seconds": seconds, **self._of_rows(stop), **columns[stop]}
      for stop, loss in zip(stops, mean(found["loss"]).tolist(), strict=True)
    ]
    if own := {name: mean(x).tolist() for name, x in found.get("auxiliary", {}).items()}:
      for place, row in enumerate(rows):
        row["auxiliary"] = {name: values[place] for name, values in own.items()}
    return rows

  def close(self) -> None:
    self._progress.close()
    if self._file:
      self._file.close()
