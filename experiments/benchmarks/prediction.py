"""Compares predicted with measured step times, for several methods, links and numbers of hosts.

This is bench.py's suite prediction. The hosts are network namespaces that share the machine's
cores. For each number of hosts, `experiments/probe.py` first measures the machine and one link,
whose rate is not among the links that are predicted. The probe runs collectives and kernels, none
of the methods. Then one job times all methods on all links; between links, only the rates of the
hosts' links change. The prediction of a cell takes the constants of the probe, the rate of the
cell's link, and the method's messages and encoded elements, which are read from its traced program.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.constants import QUARTILE
from experiments.benchmarks.hosts import ROOT, ended, flags_of, netlab, run, tell
from experiments.benchmarks.on_links import PACE
from research.comm import counters

Cell = dict[str, Any]
Model = dict[str, Any]  # flags `task` and `model`, and the `batch_size` of one host
MODEL: Model = {"task": "mnist()", "model": "mlp(hidden=[512, 512])", "batch_size": 64}
STEPS = 8  # per dispatch
HOSTS = (2, 4)
PROBED = "300mbit"
LINKS = ("1gbit", "500mbit", "200mbit", "100mbit", "50mbit")
FEEDBACK = "data_parallel(sgd(0.1), error_feedback({}))"
NESTEROV = "sgd(0.7, momentum=0.9, nesterov=True)"
METHODS = {
  "dense": "data_parallel(sgd(0.1), mean())",
  "bf16": "data_parallel(sgd(0.1), two_phase(bf16()))",
  "int8": FEEDBACK.format("two_phase(int8())"),
  "top 1%": FEEDBACK.format("gather_mean(top_k(0.01))"),
  "block top-k": FEEDBACK.format("gather_mean(block_top_k())"),
  "random 1%": FEEDBACK.format("sum_mean(random_k(0.01))"),
  "PowerSGD": FEEDBACK.format("power_sgd(4)"),
  "majority vote": "signum(0.001, majority_vote())",
  "local SGD": "local_sgd(sgd(0.1), mean(), period=8)",
  "local SGD, int8": "local_sgd(sgd(0.1), error_feedback(two_phase(int8())), period=4)",
  "DiLoCo, block top-k": (
    f"diloco(sgd(0.05), {NESTEROV}, error_feedback(gather_mean(block_top_k())), period=8)"
  ),
  "gossip": "d_psgd(sgd(0.1), gossip(ring()))",
}
MOST, MEDIAN = 0.15, 0.07  # of the absolute relative errors


def config(hosts: int, model: Model) -> dict[str, Any]:
  """Returns the flags of a run, without the method."""
  return model | {
    "executor": "spmd",
    "mesh": f"data:{hosts}",
    "batch_size": hosts * model["batch_size"],
    "steps": 2**20,
    "steps_per_dispatch": STEPS,
  }


def probe(hosts: int, model: Model, folder: Path) -> dict[str, Any]:
  """Returns the contents of the probe's file, which is measured if it is not there yet."""
  place = folder / f"probe-{hosts}.json"
  if not place.exists():
    tell(f"probe between {hosts} hosts")
    total = hosts * model["batch_size"]
    flags = flags_of(model | {"batch_size": total, "out": place, "rate": PROBED})
    with tempfile.TemporaryDirectory() as logs:
      launcher = [f"--rate={PROBED}", "--cores_per_host=1", f"--logs={logs}"]
      run(netlab(hosts, launcher, ["probe.py", *flags], "env", "-u", counters.PLACES))
  return json.loads(place.read_text())


def cells(
  hosts: int, model: Model, methods: Sequence[str], links: Sequence[str], computing: float
) -> Iterator[Cell]:
  """Measures the methods on the links, between hosts of one core each, in a job of its own.

  Args:
    hosts: the number of hosts.
    model: what they train.
    methods: names of METHODS.
    links: the links.
    computing: the probe's seconds of computing per step.
  """
  asked = {
    "config": config(hosts, model),
    "methods": [METHODS[name] for name in methods],
    "links": list(links),
    "computing": computing,
    "cache": str(Path(tempfile.gettempdir()) / f"prediction-{os.getuid()}"),
  }
  names = {spec: name for name, spec in METHODS.items()}
  line = [sys.executable, str(ROOT / "experiments" / "benchmarks" / "changing.py"), str(hosts)]
  with (
    tempfile.TemporaryFile("w+") as errors,
    subprocess.Popen(
      [*line, json.dumps(asked, allow_nan=False)], stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process,
    ended(process),
  ):
    assert process.stdout
    for said in process.stdout:
      cell = json.loads(said)
      cell |= {"hosts": hosts, "method": names[cell["method"]], "spec": cell["method"]}
      cell["measured"] = float(np.quantile(cell["milliseconds"], QUARTILE)) / 1000
      tell(f"{hosts} hosts, {cell['link']}, {cell['method']}: {1000 * cell['measured']:.1f} ms")
      yield cell
    if process.wait():
      errors.seek(0)
      raise RuntimeError("\n".join(errors.read().splitlines()[-20:]))


def measure(out: Path | None) -> tuple[dict[str, Any], list[str]]:
  """Measures the missing cells, and draws the figure.

  Args:
    out: the folder of the probes' files, the cells and the figure; None keeps nothing.

  Returns:
    The contents of result.json, and the lines of table.md.
  """
  with tempfile.TemporaryDirectory() as nothing:
    folder = out or Path(nothing)
    folder.mkdir(parents=True, exist_ok=True)
    found = prediction(folder, MODEL)
    draw(folder / "figure.png", found)
  return summary(found) | {"prediction": found}, table(found)


def prediction(folder: Path, model: Model) -> list[Cell]:
  """Measures the missing cells, and predicts all cells.

  Args:
    folder: the folder of the probes' files and the cells.
    model: what the hosts train.

  Returns:
    The cells of all hosts, links and methods, with `measured`, `predicted` and `parts` in seconds.
  """
  from research.training.reports import report

  done = _stored(folder / "cells.json")
  for hosts in HOSTS:
    found = probe(hosts, model, folder)
    missing = [(link, m) for link in LINKS for m in METHODS if (hosts, link, m) not in done]
    links = [link for link in LINKS if any(link == one for one, _ in missing)]
    methods = [method for method in METHODS if any(method == one for _, one in missing)]
    computing = found["constants"]["computing"]
    for cell in cells(hosts, model, methods, links, computing) if missing else ():
      done[hosts, cell["link"], cell["method"]] = cell
      report.write_json(folder / "cells.json", list(done.values()))
    _predict([cell for cell in done.values() if cell["hosts"] == hosts], model, found)
  return list(done.values())


def _stored(place: Path) -> dict[tuple[int, str, str], Cell]:
  found = json.loads(place.read_text()) if place.exists() else []
  return {(cell["hosts"], cell["link"], cell["method"]): cell for cell in found}


def _predict(found: list[Cell], model: Model, probed: dict[str, Any]) -> None:
  """Adds the predictions to the cells of one number of hosts."""
  from experiments.reports import work
  from research.analysis import network
  from research.training.config import Config

  constants, works = network.of_dict(probed), {}
  for cell in found:
    spec, hosts = cell["spec"], cell["hosts"]
    if spec not in works:
      works[spec] = work.of_config(Config(**config(hosts, model), method=spec))
    done = works[spec]
    step = done.step(constants.on(cell["link"]))
    cell |= {"load": done.load._asdict(), "encoding": done.encoding(constants)}
    cell |= {"period": done.period, "delay": done.delay}
    cell |= {"predicted": step.seconds, "parts": step._asdict()}
    cell["error"] = step.seconds / cell["measured"] - 1
    cell["median"] = statistics.median(cell["milliseconds"]) / 1000


def summary(found: Sequence[Cell]) -> dict[str, Any]:
  """Returns the errors of all cells, and whether they satisfy the gate.

  The errors of the medians are for comparison: a measured time is a lower quartile of dispatches,
  as in the probe, because other programs can only make them longer.
  """
  wanted = len(HOSTS) * len(LINKS) * len(METHODS)
  errors = _summary([abs(cell["error"]) for cell in found])
  of_medians = _summary([abs(cell["predicted"] / cell["median"] - 1) for cell in found])
  holds = errors["largest_error"] <= MOST and errors["median_error"] <= MEDIAN
  return {
    "cells": len(found),
    "wanted": wanted,
    **errors,
    "of_medians": of_medians,
    "holds": len(found) == wanted and holds,
  }


def _summary(errors: Sequence[float]) -> dict[str, Any]:
  return {
    "median_error": statistics.median(errors),
    "largest_error": max(errors),
    "above": sum(error > MOST for error in errors),
  }


def table(found: Sequence[Cell]) -> list[str]:
  """Formats the Markdown table: measured and predicted milliseconds, and the error."""
  total = summary(found)
  medians = total["of_medians"]
  lines = [
    f"{total['cells']} of {total['wanted']} cells: the median error is "
    f"{total['median_error']:.1%} (gate: at most {MEDIAN:.0%}), "
    f"the largest {total['largest_error']:.1%} (gate: at most {MOST:.0%}); "
    f"{total['above']} cells are above {MOST:.0%}. The gate "
    f"{'holds' if total['holds'] else 'does not hold'}.\n",
    "A measured time is the lower quartile of the dispatches, as in the probe. Relative to their "
    f"median, the median error is {medians['median_error']:.1%} and the largest "
    f"{medians['largest_error']:.1%}; {medians['above']} cells are above {MOST:.0%}.\n",
    "Milliseconds per local step, measured / predicted (error):\n",
    "| method | hosts | " + " | ".join(LINKS) + " |",
    "|---" * (2 + len(LINKS)) + "|",
  ]
  if paces := [pace for cell in found for pace in cell.get("paces", [])]:
    near = sum(abs(pace - 1) <= PACE for pace in paces) / len(paces)
    lines.insert(
      2,
      f"In {near:.0%} of the turns, a step without exchanges took as long as in the probe, within "
      f"{PACE:.0%}; the median turn took {statistics.median(paces):.2f} times as long.\n",
    )
  by_place = {(cell["hosts"], cell["link"], cell["method"]): cell for cell in found}
  for hosts in HOSTS:
    for method in METHODS:
      row = [by_place.get((hosts, link, method)) for link in LINKS]
      shown = [
        f"{1000 * c['measured']:.1f} / {1000 * c['predicted']:.1f} ({c['error']:+.0%})" if c else ""
        for c in row
      ]
      lines.append(f"| {method} | {hosts} | {' | '.join(shown)} |")
  lines.append("")
  lines += [f"- {method}: `{spec}`" for method, spec in METHODS.items()]
  return lines


def draw(path: Path, found: Sequence[Cell]) -> None:
  """Draws predicted against measured milliseconds, with a band of the largest legal error."""
  from matplotlib.figure import Figure

  from research.training.reports import figures

  with figures.drawing(path):
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, len(HOSTS), sharey=True)
    times = [1000 * cell[name] for cell in found for name in ("measured", "predicted")]
    ends = [0.8 * min(times), 1.25 * max(times)]
    for ax, hosts in zip(axes, HOSTS, strict=True):
      _draw_cells(ax, [cell for cell in found if cell["hosts"] == hosts], ends)
      ax.set_title(f"{hosts} hosts")
      ax.set_xlabel("measured milliseconds per local step")
    axes[0].set_ylabel("predicted milliseconds per local step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figures.save(figure, path, dpi=110)


def _draw_cells(ax: Any, found: Sequence[Cell], ends: list[float]) -> None:
  ax.plot(ends, ends, color="0.5", lw=1)
  low, high = ([(1 + sign * MOST) * x for x in ends] for sign in (-1, 1))
  ax.fill_between(ends, low, high, color="0.9", label=f"within {MOST:.0%}")
  for number, method in enumerate(METHODS):
    mine = [cell for cell in found if cell["method"] == method]
    x, y = ([1000 * cell[name] for cell in mine] for name in ("measured", "predicted"))
    marker = "os^Dv*"[number % 6]
    ax.plot(x, y, marker, color=f"C{number % 10}", label=method, ms=6, alpha=0.8)
  ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
  ax.grid(alpha=0.3)
