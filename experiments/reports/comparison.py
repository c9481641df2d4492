"""Formats a comparison of methods: table, recommendation, caption and figure.

The functions format the contents of compare.json; see `outcomes.compared`.
"""

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.training.reports import figures

Result = dict[str, Any]
Row = dict[str, Any]  # the known numbers of a method in a result

TOO_CLOSE = 1.1  # ratio of seconds below which a difference may be due to noise

# Title, entry and format of each column; columns without entries are left out.
COLUMNS = (
  ("training loss", "train_loss", ".4g"),
  ("{evaluated_on} accuracy", "accuracy_mean", ".4f"),
  ("least", "accuracy_least", ".4f"),
  ("greatest", "accuracy_greatest", ".4f"),
  ("bytes per step and worker", "bytes_per_step_per_worker", ",.0f"),
  ("of dense", "ratio_to_dense", ".4f"),
  ("steps/s here", "steps_per_second", ".4g"),
  ("steps to target", "steps_to_target", ",.0f"),
  ("bytes to target", "bytes_to_target", ",.0f"),
  ("s per step on {place}", "seconds_per_step", ".4g"),
  ("s to target on {place}", "seconds_to_target", ".4g"),
)


def table(result: Result) -> str:
  """Formats a table with one row per method; unknown numbers are left blank."""
  rows, place = result["methods"], result["place"]
  columns = [
    (title.format(**result), name, form)
    for title, name, form in COLUMNS
    if any(name in row for row in rows) and (place or "{place}" not in title)
  ]
  lines = [" | ".join(["| method", *(title for title, *_ in columns), "|"])]
  lines.append("|---" * (len(columns) + 2) + "|")
  for row in rows:
    cells = [format(row[name], form) if name in row else "" for _, name, form in columns]
    lines.append(" | ".join([f"| `{row['label']}`", *cells, f"{remark(row)} |"]))
  return "\n".join(lines)


def remark(row: Row) -> str:
  """Returns a remark on facts that a method's numbers do not show."""
  count = len(row["folders"])
  if row["diverged_seeds"]:
    return f"{len(row['diverged_seeds'])} of {count} seeds diverged"
  if row["unimproved_seeds"]:
    start = (
      f" on the start's {row['initial_train_loss']:.4g}" if "initial_train_loss" in row else ""
    )
    return f"{len(row['unimproved_seeds'])} of {count} seeds did not improve{start}"
  if "steps_to_target" not in row:
    return "target not reached"
  return "there by the first evaluation" if row["at_first_evaluation"] else ""


def recommendation(result: Result) -> str:
  """Names the method that reaches the target first on the network, and its lead, in one line."""
  rows, target, place = result["methods"], result["target"], result["place"]
  reach = [row for row in rows if "seconds_to_target" in row]
  if not reach:
    what = "improves on its start" if target is None else f"reaches training loss {target:.4g}"
    return f"no recommendation on {place}: no method {what} with all its seeds"
  first, *others = sorted(reach, key=lambda row: row["seconds_to_target"])
  dense = next((row for row in others if row["dense"]), None)
  factor = lambda row: row["seconds_to_target"] / first["seconds_to_target"]
  told = [
    f"{first['label']} is at training loss {target:.4g} after {first['seconds_to_target']:.3g} s"
  ]
  if others:
    named = f"{'the dense ' if others[0] is dense else ''}{others[0]['label']}"
    told.append(f"{factor(others[0]):.2f} times sooner than the next, {named}")
    if factor(others[0]) < TOO_CLOSE:
      told[-1] += " (too close to call by timings)"
  if dense and dense is not others[0]:
    told.append(f"{factor(dense):.2f} times sooner than the dense {dense['label']}")
  if not others and len(rows) > 1:
    told.append("where no other comes")
  if not any(row["dense"] for row in rows):
    told.append("no dense method was compared")
  elif others and not any(row["dense"] for row in reach):
    told.append("no dense method reaches it")
  dense_wins = first["dense"] and not all(row["dense"] for row in rows)
  return f"{'do not compress here' if dense_wins else 'recommended'}: on {place} {', '.join(told)}"


def caption(result: Result) -> list[str]:
  """Explains the numbers of the table, in one or two sentences per line."""
  if result["target"] is None:
    lines = ["Target: none, since no method improved on its start with all its seeds."]
  else:
    lines = [
      f"Target: training loss {result['target']:.4g}, {result['target_is']}. A method is there "
      f"where the mean over seeds of its least loss so far falls to it, on straight lines between "
      f"evaluations every {result['eval_every']} steps."
    ]
  shared = f"with all {result['workers']} workers on this machine, so no cluster's"
  where = shared if result["executor"] == "simulate" else "here"
  computing = f"the computing of a step as measured {where}"
  if result["clock"]:
    computing = f"those of the virtual clock {result['clock']}"
  elif result["compute_seconds"]:
    computing = f"{result['compute_seconds']:g} s of computing per step, as given, for every method"
  elif result["network_compute_seconds"]:
    known = result["network_compute_seconds"]
    computing = f"{known:.3g} s of computing per step, as in the file of --network, and encoding"
  if result["simulated_network"]:
    return [*lines, f"Seconds: {computing}, with exchanges over {result['simulated_network']}."]
  if not result["network"]:
    return [*lines, f"Seconds: {computing}; communication is not in them (--network predicts it)."]
  slices = ", within slices as between them" if "slice" in result["mesh"] else ""
  return [
    *lines,
    f"Seconds: {computing}; then the communication of what is sent by then, as predicted for "
    f"{result['network']}, a link for each worker{slices}, one collective per leaf on a ring.",
  ]


def markdown(result: Result) -> str:
  """Formats title, table, recommendation, caption and provenance in Markdown."""
  made = result["env"]
  script, *arguments = made["command"]
  command = shlex.join(["python", f"experiments/{script}", *arguments])
  parts = [
    f"# {title(result)}",
    table(result),
    result["recommendation"],
    "Means over the seeds. " + " ".join(caption(result)),
    "\n".join(f"- `{row['label']}`: `{row['method']}`" for row in result["methods"]),
    f"Commit {made['commit'] or 'unknown'}, {made['device']}, {made['cores']} cores:",
    f"```\n{command}\n```",
  ]
  return "\n\n".join(filter(None, parts)) + "\n"


def title(result: Result) -> str:
  seeds, batch = result["seeds"], result["batch_size"]
  count = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
  return f"{result['task']}: {result['workers']} workers, batch {batch}, {count}"


def draw(path: Path, result: Result) -> None:
  """Draws the loss over steps, bytes and seconds: the mean over seeds with a shaded range."""
  with figures.drawing(path):
    figures.save(figure_of(result), path, dpi=110)


def figure_of(result: Result) -> Any:
  """Returns the figure that `draw` writes."""
  from matplotlib.figure import Figure

  rows = result["methods"]
  figure = Figure(figsize=(15, 6 + 0.22 * len(rows)), layout="constrained")
  axes = figure.subplots(1, 3, sharey=True)
  for place, row in enumerate(rows):
    style = {"color": f"C{place % 10}", "ls": ("-", "--", "-.", ":")[place % 4], "lw": 2}
    lost = f" ({remark(row)})" if row["diverged_seeds"] or row["unimproved_seeds"] else ""
    axes[0].plot([], [], label=figures.literal(row["label"] + lost), **style)
    if "curve" in row:
      draw_method(axes, row, result["target"], style)
  predicted = f"seconds on {result['place']} (predicted)"
  seconds = predicted if result["place"] else "seconds of computing"
  for ax, name in zip(axes, ("local steps", "bytes sent by a worker", seconds), strict=True):
    ax.set_xlabel(figures.literal(textwrap.fill(name, 60)))
    ax.grid(alpha=0.3)
  draw_scales(axes, result)
  axes[0].set_ylabel("loss on all training data")
  heading = figures.literal(f"{title(result)}: mean (line) and range (shade)")
  columns = 1 if max(len(row["label"]) for row in rows) > 70 else 2
  place = {"loc": "outside upper center", "handlelength": 4, "frameon": False}
  figure.legend(title=heading, title_fontsize=12, ncols=columns, **place)
  below = "\n".join(textwrap.fill(line, 180) for line in caption(result))
  figure.supxlabel(figures.literal(below), size=9)
  return figure


def draw_method(axes: Sequence[Any], row: Row, target: float | None, style: dict[str, Any]) -> None:
  """Draws a method's line in each panel, and a dot where the line reaches the target."""
  import numpy as np

  losses, steps = np.array(row["curve"]["losses"]), np.array(row["curve"]["steps"])
  seconds, color = row["curve"]["seconds"], style["color"]
  across = (steps, row["curve"]["sent"], seconds)
  there = row.get("steps_to_target", np.nan)
  dots = (there, row.get("bytes_to_target", 0.0), np.interp(there, steps, seconds))
  for ax, x, dot in zip(axes, across, dots, strict=True):
    if ax is axes[1] and "bytes_per_step_per_worker" not in row:
      continue
    ax.plot(x, losses.mean(0), **style)
    ax.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
    if "steps_to_target" in row:
      ax.plot(dot, target, "o", color=color, mec="black", ms=7, zorder=3)


def draw_scales(axes: Sequence[Any], result: Result) -> None:
  """Draws the target; uses logarithmic scales for positive losses and widely differing ranges."""
  import numpy as np

  drawn = [row for row in result["methods"] if "curve" in row]
  if drawn and all(np.min(row["curve"]["losses"]) > 0 for row in drawn):
    axes[0].set_yscale("log")
  ends = [
    [row["curve"]["sent"][-1] for row in drawn if "bytes_per_step_per_worker" in row],
    [row["curve"]["seconds"][-1] for row in drawn],
  ]
  for ax, last in zip(axes[1:], ends, strict=True):
    if last and 0 < 5 * min(last) < max(last):
      ax.set_xscale("log")
  if result["target"] is not None:
    for ax in axes:
      ax.axhline(result["target"], color="0.4", lw=1, ls=":")
    place, label = (0.01, result["target"]), f"target {result['target']:.3g}"
    axes[0].annotate(label, place, (0, 4), ("axes fraction", "data"), "offset points", color="0.3")
