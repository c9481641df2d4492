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
    folder: the run's folder; None if the run wrote no files.
    stopped_by: "interrupted" (Ctrl-C) or "terminated" (SIGTERM) if a signal stopped the run, or ''.
  """

  def __init__(
    self,
    summary: dict[str, Any],
    folder: Path | None,
    rows: list[dict[str, Any]],
    params: Callable[[], Params],
    model: Callable[[Params], Any] | None = None,
    stopped_by: str = "",
  ):
    self.summary, self.folder, self._rows = summary, folder, rows
    self.stopped_by = stopped_by
    self._params, self._model = params, model

  @functools.cached_property
  def params(self) -> Params:
    """The model to deploy, a tree of JAX arrays; read from a checkpoint if the run was complete."""
    return self._params()

  @functools.cached_property
  def model(self) -> Any:
    """The user's model with the trained parameters, ready to predict, with dropout off.

    An NNX model is in `eval` mode. An Equinox model, whose input is a single example, is in
    inference mode. A linen module is bound to its parameters, so that it can be called directly.
    The value is None if the task was not built from a model of one of these kinds.
    """
    return self._model(self.params) if self._model else None

  @functools.cached_property
  def metrics(self) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: "step", "loss", "seconds", and further metrics of the step."""
    return report.read_rows(self.folder / "metrics.jsonl") if self.folder else self._rows

  def curve(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Returns two columns of the metrics, from the rows that have both.

        steps, accuracy = result.curve("eval.accuracy")
        axes.plot(*result.curve("train_loss", against="bytes"))

    Args:
      name: the column, such as "loss", "train_loss", "bytes", "eval.accuracy",
        "diagnostics.memory_norm" or "auxiliary.NAME".
      against: the second column: "step" (local steps), "seconds", "bytes" or "virtual_seconds".

    Returns:
      The values of `against` and the values of `name`, arrays [rows].

    Raises:
      ValueError: if no row has one of the columns; the message lists the existing columns.
    """
    rows = [dict(_columns(row)) for row in self.metrics]
    legal = dict.fromkeys(column for row in rows for column in row)
    for column in (name, against):
      if column not in legal:
        raise ValueError(f"curve: {column!r} is {checks.unknown(column, legal)}")
    found = [(row[against], row[name]) for row in rows if name in row and against in row]
    x, y = zip(*found, strict=True)
    return np.array(x), np.array(y)

  def plot(self, what: str = "loss") -> Any:
    """Plots the run against steps.

    Args:
      what: "loss", which also shows the other metrics, or "diagnostics".

    Returns:
      A matplotlib Figure.

    Raises:
      ValueError: if `what` is neither of these, or the run recorded no diagnostics.
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
  """Yields the numbers of a row by name; a number in a group is named "group.name"."""
  for name, value in row.items():
    if isinstance(value, Mapping):
      yield from ((f"{name}.{inner}", x) for inner, x in value.items())
    else:
      yield name, value


class Interrupted(KeyboardInterrupt):
  """Ctrl-C has stopped a run of `train`.

  Attributes:
    result: the `Result` of the steps so far.
  """

  def __init__(self, result: Result):
    where = f"; the same call resumes the run in {result.folder}" if result.folder else ""
    super().__init__(f"stopped at step {result.summary['steps']}{where}")
    self.result = result
