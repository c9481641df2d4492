"""The result of a run: its model, metrics and summary."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.core.base import Params
from research.training.reports import figures, report


class Result:
  """The result of a finished run.

  Attributes:
    summary: the contents of summary.json: "steps", "stopped_because", "train_loss", "eval",
      "wire" and more.
    folder: the run's folder; None if it wrote no files.
  """

  def __init__(
    self,
    summary: dict[str, Any],
    folder: Path | None,
    rows: list[dict[str, Any]],
    params: Callable[[], Params],
  ):
    self.summary, self.folder, self._rows, self._params = summary, folder, rows, params

  @functools.cached_property
  def params(self) -> Params:
    """The model to deploy, a tree of JAX arrays; read from a checkpoint if the run was complete."""
    return self._params()

  @functools.cached_property
  def metrics(self) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: "step", "loss", "seconds", and what was measured at the step."""
    return report.read_rows(self.folder / "metrics.jsonl") if self.folder else self._rows

  def plot(self, what: str = "loss") -> Any:
    """Plots the run against steps.

    Args:
      what: "loss", with the other metrics below it, or "diagnostics".

    Returns:
      A matplotlib Figure.

    Raises:
      ValueError: for another value, or if the run recorded no diagnostics.
    """
    if what == "loss":
      return figures.loss_figure(self.metrics, self.summary)
    if what != "diagnostics":
      raise ValueError(f"plot {what!r}: legal: 'loss', 'diagnostics'")
    if not any("diagnostics" in row for row in self.metrics):
      raise ValueError("the run has no diagnostics: train(..., diagnostics=True)")
    return figures.diagnostics_figure(self.metrics, self.summary)

  def __repr__(self) -> str:
    found = self.summary
    loss = found["train_loss"]
    shown = "" if loss is None else f", training loss {loss:.6g}"
    return f"<Result of {found['steps']} steps ({found['stopped_because']}){shown}>"
