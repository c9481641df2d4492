"""The result of a run: its model, metrics and summary."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.core import checks
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
    model: Callable[[Params], Any] | None = None,
  ):
    self.summary, self.folder, self._rows = summary, folder, rows
    self._params, self._model = params, model

  @functools.cached_property
  def params(self) -> Params:
    """The model to deploy, a tree of JAX arrays; read from a checkpoint if the run was complete."""
    return self._params()

  @functools.cached_property
  def model(self) -> Any:
    """The user's model with the trained parameters, ready to predict: its dropout is off.

    An NNX model is in its mode `eval`, and an Equinox model of single examples in inference mode; a
    linen module is bound, so that it is called without variables. None for a task that is not of
    such a model.
    """
    return self._model(self.params) if self._model else None

  @functools.cached_property
  def metrics(self) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: "step", "loss", "seconds", and what was measured at the step."""
    return report.read_rows(self.folder / "metrics.jsonl") if self.folder else self._rows

  def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of a column of the metrics, from those rows that have it.

        steps, accuracy = result.curve("eval.accuracy")

    Args:
      name: such as "loss", "train_loss", "bytes", "eval.accuracy", "diagnostics.memory_norm" or
        "auxiliary.NAME".

    Returns:
      The local steps, int64 [rows], and the values, float64 [rows].

    Raises:
      ValueError: if no row has the column, with those that there are.
    """
    rows = [(row["step"], dict(_columns(row))) for row in self.metrics]
    found = [(step, columns[name]) for step, columns in rows if name in columns]
    if not found:
      legal = dict.fromkeys(column for _, columns in rows for column in columns)
      raise ValueError(f"curve {name!r}: {checks.unknown(name, legal)}")
    steps, values = zip(*found, strict=True)
    return np.array(steps, np.int64), np.array(values, np.float64)

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


def _columns(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
  """The numbers of a row but its step, by name; those of a group as "group.name"."""
  for name, value in row.items():
    if isinstance(value, Mapping):
      yield from ((f"{name}.{inner}", x) for inner, x in value.items())
    elif name != "step":
      yield name, value
