"""Writes and prints the reports of a run: JSON files, metrics.jsonl, progress, closing table."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax


def as_json(value: Any, indent: int | None = None) -> str:
  """Serializes a value as JSON; NaN and infinity, which JSON does not have, become null.

  Args:
    value: nested mappings, lists and numbers.
    indent: spaces per level; None for one line.
  """
  return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, Mapping):
    return {name: _without_nan(inner) for name, inner in value.items()}
  return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def with_nan(value: Any) -> Any:
  """Replaces null by NaN in a parsed value; the inverse of `as_json` for numbers.

  Args:
    value: a value parsed from JSON.
  """
  if isinstance(value, Mapping):
    return {name: with_nan(inner) for name, inner in value.items()}
  if isinstance(value, list):
    return [with_nan(inner) for inner in value]
  return math.nan if value is None else value


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file atomically.

  Args:
    path: the file.
    value: a value that `as_json` accepts.
  """
  write_text(path, as_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
  """Writes a UTF-8 file atomically.

  Args:
    path: the file.
    text: the contents.
  """
  with replacing(path) as partial:
    partial.write_text(text, encoding="utf-8", errors="surrogateescape")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Context manager that yields a temporary path, which replaces `path` if no exception is raised.

  Args:
    path: the final path.
  """
  partial = path.with_name(f".{path.name[:200]}.{os.getpid()}")
  try:
    yield partial
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


class Metrics:
  """Writes `metrics.jsonl`, one row per logged step, and optionally TensorBoard events."""

  def __init__(self, folder: Path, after: int, tensorboard: bool):
    """Opens the file for appending, and drops rows after a step.

    Args:
      folder: the run's folder.
      after: the step from which the run continues; later rows are dropped.
      tensorboard: whether to write TensorBoard events.
    """
    path = folder / "metrics.jsonl"
    self.last: dict[str, Any] | None = None  # the last row before the run was resumed
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as kept:
      for row in each_row(path):
        if row["step"] <= after:
          kept.write(as_json(row) + "\n")
          self.last = row
    self._file = path.open("a")
    self._events = None
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._events = SummaryWriter(str(folder / "tensorboard"))

  def write(self, rows: list[dict[str, Any]]) -> None:
    """Appends rows, and returns once the rows are on disk."""
    self._file.write("".join(as_json(row) + "\n" for row in rows))
    self._file.flush()
    if self._events:
      for row in rows:
        for name, value in _flat(row):
          self._events.add_scalar(name, value, row["step"])

  def close(self) -> None:
    self._file.close()
    if self._events:
      self._events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
  """Reads the rows of a metrics.jsonl, with NaN for null, up to a line that a crash truncated.

  Args:
    path: the file; it may be missing.
  """
  return list(each_row(path))


def each_row(path: Path) -> Iterator[dict[str, Any]]:
  """Iterates over the rows of `read_rows` without keeping all rows in memory.

  Args:
    path: the file; it may be missing.
  """
  if not path.exists():
    return
  with path.open("rb") as lines:
    for line in lines:
      try:
        row = json.loads(line)
      except ValueError:
        return
      if not isinstance(row, dict) or not {"step", "loss", "seconds"} <= set(row):
        return
      yield with_nan(row)


def thinned(rows: Iterable[Mapping[str, Any]], most: int = 2**13) -> list[Mapping[str, Any]]:
  """Selects evenly spaced rows, and the last row.

  Args:
    rows: the rows.
    most: maximum number of selected rows, not counting the last row.
  """
  kept: list[Mapping[str, Any]] = []
  every, last = 1, None
  for number, last in enumerate(rows):
    if number % every == 0:
      kept.append(last)
    if len(kept) == most:
      kept, every = kept[::2], 2 * every
  return [*kept, last] if last is not None and kept[-1] is not last else kept


def _flat(row: Mapping[str, Any]):
  for name, value in row.items():
    if isinstance(value, Mapping):
      yield from ((f"{name}/{inner}", x) for inner, x in value.items())
    elif name != "step":
      yield name, value


def note(line: str) -> None:
  """Prints a line on stderr, from process 0 only.

  Args:
    line: the line to print.
  """
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


def metric_label(name: str, evaluated_on: str, measured_on: Mapping[str, str]) -> str:
  """Returns a metric's name, preceded by the data that it was measured on: "test accuracy".

  Args:
    name: the name of the metric.
    evaluated_on: the data of evaluations, "test" or "train".
    measured_on: the data of each metric that the task measures itself; "" for none.
  """
  return f"{measured_on.get(name, evaluated_on)} {name}".strip()


class Progress:
  """Shows progress as a live bar on an interactive terminal, or as one line per evaluation."""

  def __init__(self, total: int, label: Callable[[str], str], shown: bool):
    self._label, self._evaluated = label, ""
    self._total, self._shown, self._bar = total, shown, None

  def start(self, step: int) -> None:
    """Starts the display at a step."""
    if not self._shown or not sys.stderr.isatty():
      return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_interactive:  # for example TERM=dumb, which cannot redraw a line
      return
    from rich.progress import (
      BarColumn,
      MofNCompleteColumn,
      Progress,
      TextColumn,
      TimeRemainingColumn,
    )

    self._bar = Progress(
      TextColumn("step"),
      MofNCompleteColumn(),
      BarColumn(),
      TextColumn("{task.fields[text]}"),
      TimeRemainingColumn(),
      console=console,
    )
    self._task = self._bar.add_task("", total=self._total, completed=step, text="compiling")
    self._bar.start()

  def update(self, row: Mapping[str, Any]) -> None:
    """Displays a row of the metrics."""
    if "eval" in row:
      found = row["eval"]
      others = {name: value for name, value in found.items() if name != "loss"} or found
      shown = {self._label(name): value for name, value in others.items()}
      if "gradient_norm" in row:
        shown["gradient norm"] = row["gradient_norm"]
      self._evaluated = "".join(f", {name} {value:.4g}" for name, value in shown.items())
    text = f"loss {row['loss']:.4g}{self._evaluated}"
    if self._bar:
      self._bar.update(self._task, completed=row["step"], text=text)
    elif self._shown and "eval" in row:
      print(f"step {row['step']:>7}/{self._total}  {text}", file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()


_OVER = {"push": "in pushes", "pull": "in pulls"}  # names for the traffic of a server


def _pipeline(plan: Mapping[str, Any] | None) -> list[tuple[str, str]]:
  if plan is None:
    return []
  repeats = f", {plan['repeats']} times" if plan["repeats"] > 1 else ""
  text = f"{plan['stages']} stages, {plan['microbatches']} micro-batches{repeats}"
  return [("pipeline", f"{text}: idle {plan['bubble']:.1%} of the time")]


def _server(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
  """Returns the rows about a parameter server; empty without a server."""
  if found is None:
    return []
  ages = sorted((int(age), count) for age, count in found["staleness"].items())
  mean = sum(age * count for age, count in ages) / max(1, sum(count for _, count in ages))
  counts = lambda kinds: ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
  idle = ", ".join(f"{row['idle']:.0%}" for row in found["workers"])
  rows = [
    ("pushes per second", _rate(found["pushes_per_second"])),
    ("staleness in updates", f"{mean:.3g} on average, at most {ages[-1][0]}" if ages else ""),
    ("idle, by worker", idle if any(row["pushes"] for row in found["workers"]) else ""),
    ("refused", counts(found["refused"])),
    ("died", counts(found["deaths"])),
  ]
  return [(name, text) for name, text in rows if text]


def _overlap(found: Mapping[str, float] | None) -> list[tuple[str, str]]:
  """Returns the rows about the hidden fraction of the exchange, with the measured times."""
  if not found:
    return []
  compute, exchange, step = (found[f"{x}_milliseconds"] for x in ("compute", "exchange", "step"))
  parts = f"{compute:.3g} ms of computing and {exchange:.3g} of exchange in {step:.3g} per step"
  return [("exchange hidden", f"{found['hidden']:.0%}: {parts}")]


def _rate(value: float) -> str:
  return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _virtual(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the row about virtual time, with the share of the network if there is one."""
  if "virtual_seconds" not in summary:
    return []
  text = f"{summary['virtual_seconds']:.6g}"
  if "network_share" in summary:
    share, present = summary["network_share"], summary["present"]
    text += f", of which {share:.1%} waiting for the network; {present} workers present at the end"
  return [("virtual seconds", text)]


def closing_table(summary: Mapping[str, Any], folder: Path) -> str:
  """Formats the results of a run, one result per line, and the path of the plot.

  Args:
    summary: the run's summary.
    folder: the run's folder.
  """
  wire = summary["wire"]
  dense = wire["dense_bytes_per_step_per_worker"]  # 0 for a single worker
  share = sum(wire["bytes_per_step_per_worker"].values()) / dense if dense else 1.0
  privacy = f"{summary.get('epsilon', 0):.4g}, {summary.get('delta', 0):.3g}"
  sample = f" on {summary['train_loss_on']}" if "train_loss_on" in summary else ""
  measured_on = summary.get("measured_on", {})
  rows = [
    ("stopped because", summary["stopped_because"]),
    ("steps", f"{summary['steps']}"),
    ("training loss", f"{summary['train_loss']:.6g}{sample}"),
    *(
      (metric_label(name, summary["evaluated_on"], measured_on), f"{value:.6g}")
      for name, value in summary["eval"].items()
      if (summary["evaluated_on"], name) != ("train", "loss")
    ),
    ("steps per second", _rate(summary["steps_per_second"])),
    ("seconds", f"{summary['seconds']:.1f}, of which compiling {summary['compile_seconds']:.1f}"),
    *(
      (f"bytes per step and worker {_OVER.get(axis, f'over {axis}')}", f"{value:,.0f}")
      for axis, value in wire["bytes_per_step_per_worker"].items()
    ),
    *([("of what the exact mean sends", f"{share:.2%}")] if abs(share - 1) > 1e-6 else []),
    *_overlap(summary.get("overlap")),
    *([("topology", summary["described"])] if "described" in summary else []),
    *_pipeline(summary.get("pipeline")),
    *_server(summary.get("server")),
    *_virtual(summary),
    *([("epsilon, delta", privacy)] if "epsilon" in summary else []),
    *([("privacy", summary["privacy"])] if "privacy" in summary else []),
    *([("aggregated", "per shard")] if summary["aggregated"] == "per shard" else []),
    ("plot", str(folder / "loss.png")),
  ]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
