"""Ranks the methods of a leaderboard, and predicts the hours of the same runs at a larger scale.

The prediction is for a stated model, chip and number of chips per worker. It assumes the number of
steps and the bytes per parameter and step of the small model:

    seconds per step = computing + exposed communication
    computing = 6 parameters tokens / (chips peak utilization)
    communication = 8 bytes per parameter and step * parameters / bits per second

This is the model of `analysis/cost.py`, in which methods whose exchange overlaps with local steps
wait only for the exposed part. Latency, encoding and the computation of optimizers are left out.
"""

import functools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from research.analysis import chips, cost, network
from research.core import checks, registry

LINKS = ("100gbit", "1gbit", "100mbit")
COLORS = {"iid": "C0", "roles": "C1"}
LABELS = {"iid": "i.i.d. data", "roles": "other roles on every worker"}


class Place(NamedTuple):
  """The model and the machines for which hours are predicted."""

  preset: str  # preset of `transformer`
  chip: str
  chips: int  # number of chips per worker
  tokens: int  # number of tokens per worker and step
  utilization: float  # share of the chip's peak rate

  def check(self) -> "Place":
    """Checks the values and returns the place.

    Raises:
      ValueError: if a value is invalid.
    """
    from research.models.transformer import PRESETS

    checks.one_of("preset", self.preset, PRESETS)
    checks.one_of("chip", self.chip, chips.CHIPS)
    checks.at_least("chips", self.chips)
    checks.at_least("tokens", self.tokens)
    checks.in_range("utilization", self.utilization, "(0, 1]")
    return self

  @property
  def computing(self) -> float:
    """Returns the seconds of computing per local step."""
    rate = self.chips * chips.CHIPS[self.chip].flops * self.utilization
    return 6 * parameters(self.preset) * self.tokens / rate

  def __str__(self) -> str:
    return (
      f"a model with the preset {self.preset} ({parameters(self.preset) / 1e9:.2g}e9 parameters), "
      f"{self.chips} {self.chip} chips per worker at {self.utilization:.0%} of their peak, "
      f"{self.tokens} tokens per worker and step ({self.computing:.3g} s)"
    )


@functools.cache
def parameters(preset: str) -> int:
  """Returns the number of parameters of a transformer preset with its usual vocabulary."""
  import jax
  import jax.numpy as jnp

  from research.models.transformer import transformer

  vocabulary = 128_256 if preset in ("1b", "8b") else 32_000
  module = transformer(preset)(vocabulary)
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(module.init, key, jax.ShapeDtypeStruct((1, 8), jnp.int32))["params"]
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def ranked(rows: list[dict[str, Any]], place: Place) -> dict[str, Any]:
  """Returns the contents of leaderboard.json: each row with its numbers, best loss first.

  Args:
    rows: the results of all methods so far; see `leaderboard.tuned`.
    place: the model and machines for which hours are predicted.
  """
  found = [{**row, **_figures(row, place)} for row in rows]
  best = lambda row: (row["data"], math.inf if row["loss"] is None else row["loss"])
  return {"place": place._asdict(), "rows": sorted(found, key=best)}


def _figures(row: dict[str, Any], place: Place) -> dict[str, Any]:
  """Returns the numbers of one method: losses, bytes, and hours by link."""
  fresh = [summary for summary in row["fresh"] if summary is not None]
  losses = [summary["eval"]["loss"] for summary in fresh]
  if len(losses) < len(row["fresh"]):
    return {"loss": None, "losses": losses, "diverged": len(row["fresh"]) - len(losses)}
  wire, steps, workers = fresh[0]["wire"], fresh[0]["steps"], fresh[0]["workers"]
  size = wire["dense_bytes_per_step_per_worker"] / (8 * (workers - 1) / workers)
  sent = wire["total_bytes_per_worker"] / steps / size
  method = registry.build("method", row["spec"])
  hours = {}
  for link in LINKS:
    step = cost.step(
      cost.Load(sent * parameters(place.preset), 0),
      network.parse(link),
      workers=workers,
      computing=place.computing,
      period=method.local_steps,
      delay=method.hidden_steps,
    )
    hours[link] = steps * step.seconds / 3600
  return {
    "loss": statistics.mean(losses),
    "losses": losses,
    "diverged": 0,
    "bytes_per_parameter_and_step": sent,
    "hours": hours,
    "steps": steps,
  }


def front(rows: list[dict[str, Any]], cost_of: Any) -> list[dict[str, Any]]:
  """Returns the rows that no other row beats in both cost and loss, in order of cost.

  Args:
    rows: rows with a loss.
    cost_of: maps a row to its cost.
  """
  found: list[dict[str, Any]] = []
  for row in sorted(rows, key=lambda row: (cost_of(row), row["loss"])):
    if not found or row["loss"] < found[-1]["loss"]:
      found.append(row)
  return found


def markdown(found: dict[str, Any]) -> str:
  """Formats the leaderboard as one table per kind of data."""
  parts = [f"Hours are predicted for {Place(**found['place'])}."]
  for data, label in LABELS.items():
    rows = [row for row in found["rows"] if row["data"] == data]
    if rows:
      parts.append(f"## {label[0].upper()}{label[1:]}\n\n{_table(rows)}")
  return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
  links = " | ".join(f"hours, {link}" for link in LINKS)
  lines = [f"| method | held-out loss | range | bytes per parameter and step | {links} | tuned |"]
  lines.append("|---" * (5 + len(LINKS)) + "|")
  for row in rows:
    tuned = next(t["values"] for t in row["trials"] if _is_best(t, row["trials"]))
    values = ", ".join(f"{name} {value:g}" for name, value in tuned.items())
    if row["loss"] is None:
      cells = [f"{row['diverged']} of {len(row['fresh'])} diverged", *[""] * (2 + len(LINKS))]
    else:
      spread = f"{min(row['losses']):.3f} to {max(row['losses']):.3f}"
      hours = [f"{row['hours'][link]:.3g}" for link in LINKS]
      cells = [f"{row['loss']:.3f}", spread, f"{row['bytes_per_parameter_and_step']:.3g}", *hours]
    lines.append(f"| {row['name']} | {' | '.join(cells)} | {values} |")
  return "\n".join(lines)


def _is_best(trial: dict[str, Any], trials: list[dict[str, Any]]) -> bool:
  losses = [math.inf if one["train_loss"] is None else one["train_loss"] for one in trials]
  return trials.index(trial) == losses.index(min(losses))


def draw(path: Path, found: dict[str, Any]) -> None:
  """Draws held-out loss against bytes and against predicted hours, with the Pareto fronts."""
  from matplotlib.figure import Figure

  from research.training.reports import figures

  panels = [("bytes per parameter and step", lambda row: row["bytes_per_parameter_and_step"])]
  for link in LINKS[1:]:
    panels.append((f"predicted hours at {link}", lambda row, link=link: row["hours"][link]))
  with figures.drawing(path):
    figure = Figure(figsize=(17, 7), layout="constrained")
    for ax, (label, of) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
      for data, color in COLORS.items():
        rows = [r for r in found["rows"] if r["data"] == data and r["loss"] is not None]
        if rows:
          _draw_points(ax, rows, of, color, LABELS[data])
      ax.set_xscale("log")
      ax.margins(x=0.25)  # for the names at the right
      ax.set_xlabel(label)
      ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss, nats per character")
    figure.axes[0].legend(loc="best")
    figures.save(figure, path, dpi=110)


def _draw_points(ax: Any, rows: list[dict[str, Any]], of: Any, color: str, label: str) -> None:
  best = front(rows, of)
  ax.plot([of(r) for r in rows], [r["loss"] for r in rows], "o", color=color, label=label)
  ax.plot([of(r) for r in best], [r["loss"] for r in best], color=color, lw=1, alpha=0.6)
  for row in rows:
    at = {"xytext": (4, 3), "textcoords": "offset points", "size": 7, "color": color}
    ax.annotate(row["name"], (of(row), row["loss"]), **at)


def draw_curves(path: Path, found: dict[str, Any]) -> None:
  """Draws the training loss of the fresh seeds against the steps, with a panel per kind of data."""
  import matplotlib
  from matplotlib.figure import Figure

  from research.training.reports import figures

  kinds = [data for data in LABELS if any(row["data"] == data for row in found["rows"])]
  names = sorted({row["name"] for row in found["rows"]})
  with figures.drawing(path):
    figure = Figure(figsize=(6 * len(kinds) + 3, 5.5), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, data in zip(axes, kinds, strict=True):
      for row in found["rows"]:
        if row["data"] == data and row["curve"]:
          number = names.index(row["name"])
          color = matplotlib.colormaps["tab20"](number % 20)
          style = {"color": color, "ls": "-" if number % 2 else "--", "lw": 1.3}
          ax.plot(*zip(*row["curve"], strict=True), label=row["name"], **style)
      ax.set(title=LABELS[data], xlabel="step", yscale="log")
      ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("training loss, nats per character")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figures.save(figure, path, dpi=110)
