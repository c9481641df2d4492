"""Draws figures of results; text is drawn literally, and results survive a failure to draw."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.training.reports import report


def literal(text: str) -> str:
  """Escapes text for a figure: Matplotlib would typeset text between two $ as a formula.

  Args:
    text: any text.
  """
  return text.replace("$", r"\$")


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[Path]:
  """Context manager for drawing and saving a figure; reports a failure in one line on stderr.

  Args:
    path: the figure's file.
  """
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
      yield path
  except Exception as error:  # drawing may raise any exception; the results are already written
    reason = " ".join(str(error).split())[:200]
    report.note(f"warning: {path} was not drawn: {type(error).__name__}: {reason}")


def save(figure: Any, path: Path, dpi: int) -> None:
  """Writes a PNG file atomically.

  Args:
    figure: a matplotlib Figure.
    path: the file.
    dpi: dots per inch.
  """
  with report.replacing(path) as partial:
    figure.savefig(partial, dpi=dpi, format="png")


def write_result(folder: Path, summary: Mapping[str, Any]) -> None:
  """Writes summary.json, and then the plots, whose drawing may fail.

  Args:
    folder: the run's folder.
    summary: the run's summary.
  """
  report.write_json(folder / "summary.json", summary)
  loss_plot(folder, summary)
  diagnostics_plot(folder, summary)


def show_again(folder: Path, summary: Mapping[str, Any], *, told: bool = True) -> None:
  """Reports that a run is complete, and draws the run's plot if the plot is missing.

  Args:
    folder: the run's folder.
    summary: the run's summary.
    told: whether to report that the run is complete.
  """
  if not (folder / "loss.png").exists():
    loss_plot(folder, summary)
  if told:
    report.note(f"{folder} holds this run, complete; its result:")


def loss_plot(folder: Path, summary: Mapping[str, Any]) -> None:
  """Draws loss.png: the losses against steps, with the other metrics below.

  Args:
    folder: the run's folder.
    summary: the run's summary.
  """
  with drawing(folder / "loss.png") as path:
    rows = folder / "metrics.jsonl"
    thinned = report.thinned(report.each_row(rows))
    evaluated = report.thinned(row for row in report.each_row(rows) if "eval" in row)
    save(_figure(thinned, evaluated, summary), path, dpi=120)


def diagnostics_plot(folder: Path, summary: Mapping[str, Any]) -> None:
  """Draws diagnostics.png: the diagnostics against steps, if the run has any.

  Args:
    folder: the run's folder.
    summary: the run's summary.
  """
  rows = report.thinned(r for r in report.each_row(folder / "metrics.jsonl") if "diagnostics" in r)
  if rows:
    with drawing(folder / "diagnostics.png") as path:
      save(diagnostics_figure(rows, summary), path, dpi=120)


def _empty(height: float) -> Any:
  """Returns an empty Figure that notebooks display, without pyplot's global state.

  Args:
    height: the height of the figure in inches.
  """
  from matplotlib.figure import Figure

  class Displayed(Figure):
    def _repr_png_(self) -> bytes:
      self.savefig(picture := io.BytesIO(), format="png", dpi=100)
      return picture.getvalue()

  return Displayed(figsize=(7, height))


def diagnostics_figure(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Any:
  """Returns a matplotlib Figure with one panel per diagnostic, against steps.

  Args:
    rows: the rows of the metrics.
    summary: the run's summary.
  """
  rows = [row for row in rows if "diagnostics" in row]
  names = list(dict.fromkeys(name for row in rows for name in row["diagnostics"]))
  figure = _empty(1 + 1.6 * len(names))
  axes = figure.subplots(max(1, len(names)), 1, squeeze=False, sharex=True)[:, 0]
  for ax, name in zip(axes, names, strict=False):
    shown = [(row["step"], row["diagnostics"][name]) for row in rows if name in row["diagnostics"]]
    ax.plot(*zip(*shown, strict=True), lw=1)
    ax.set_ylabel(name.replace("_", "\n"), fontsize="small")
    if all(value > 0 for _, value in shown):
      ax.set_yscale("log")
    ax.grid(alpha=0.3)
  axes[0].set_title(literal(f"{summary['task']}: {summary['method']}"[:90]), fontsize="medium")
  axes[-1].set_xlabel("local step")
  figure.tight_layout()
  return figure


def loss_figure(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Any:
  """Returns a matplotlib Figure of the losses against steps, with the other metrics below.

  Args:
    rows: the rows of the metrics.
    summary: the run's summary.
  """
  evaluated = report.thinned(row for row in rows if "eval" in row)
  return _figure(report.thinned(rows), evaluated, summary)


def _figure(
  rows: Sequence[Mapping[str, Any]],
  evaluated: Sequence[Mapping[str, Any]],
  summary: Mapping[str, Any],
) -> Any:
  evaluated_on = summary["evaluated_on"]
  lines = textwrap.wrap(summary["method"], 78, break_on_hyphens=False)
  title = "\n".join([f"{summary['task']}, {summary['workers']} workers", *lines])
  names = sorted({name for row in evaluated for name in row["eval"]} - {"loss"})
  count = 1 + bool(names)
  figure = _empty(3 * count)
  axes = figure.subplots(count, 1, squeeze=False, sharex=True)
  top = axes[0, 0]
  top.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=1, label="mini-batches")
  steps = [row["step"] for row in evaluated]
  if any("train_loss" in row for row in evaluated):
    on = summary.get("train_loss_on", "all training data")
    top.plot(steps, [row["train_loss"] for row in evaluated], "o-", ms=3, label=on)
  if evaluated_on == "test" and evaluated and "loss" in evaluated[0]["eval"]:
    top.plot(steps, [row["eval"]["loss"] for row in evaluated], "s--", ms=3, label="test data")
  if all(row["loss"] > 0 for row in rows):
    top.set_yscale("log")
  top.set_ylabel("loss")
  top.set_title(literal(title), fontsize="medium")
  top.legend()
  for name in names:
    shown = report.metric_label(name, evaluated_on, summary.get("measured_on", {}))
    axes[-1, 0].plot(steps, [row["eval"][name] for row in evaluated], "o-", ms=3, label=shown)
  if names:
    axes[-1, 0].set(ylabel="metrics")
    axes[-1, 0].legend()
  axes[-1, 0].set_xlabel("local step")
  for ax in axes.flat:
    ax.grid(alpha=0.3)
  figure.tight_layout()
  return figure
