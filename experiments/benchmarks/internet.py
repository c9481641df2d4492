"""Trains thousands of simulated workers over the internet, and measures the time to a target.

This is bench.py's suite internet. Four methods train a least-squares model; a factor on the bytes
lets the small model stand for messages of 5 MB. Case `workers` varies the number of workers, case
`churn` the mean time of a presence, and case `decile` the upload rate of the slowest tenth of the
workers. Each run is a process of its own; the bytes, the virtual time and the number of workers
that are present are those of the summary and the rows of `run.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.hosts import ROOT, flags_of, tell

TASK = "least_squares(samples=20000, features=50, noise=1.0, condition=20.0)"
TARGET = 0.55  # training loss; noise of variance 1 leaves 0.5
SCALE = 25_000.0  # 200 bytes of parameters stand for 5 MB
CLOCK = "lognormal(1.0, 0.5)"
REGIONS = ("eastus", "westeurope", "brazilsouth", "southeastasia", "japaneast")
PERIOD = 20
OUTER = "mean(), period=20)"
METHODS = {
  "DiLoCo": f"diloco(sgd(0.02), sgd(0.7), {OUTER}",
  "gossip": "d_psgd(sgd(0.02), gossip(one_peer_exponential()), period=20)",
  "buffered asynchrony": "delayed(diloco(sgd(0.02), chain(apply_every(BUFFER), sgd(RATE)), "
  f"{OUTER}, last_pull())",
  "hierarchical averaging": "hierarchical_local_sgd(sgd(0.02), mean(axis='data'), "
  "mean(axis='slice'), inner_period=20, outer_period=4)",
}
ASYNCHRONOUS, HIERARCHICAL = "buffered asynchrony", "hierarchical averaging"
PART = 4  # the server's buffer holds the messages of a fourth of the workers
# Number of rounds, and of messages to the asynchronous server: of 10,000 workers, and of others.
ROUNDS, MESSAGES = {True: 1000, False: 200}, {True: 400_000, False: 25_000}
MIDDLE = 1000  # number of workers in all cases but one
VALUES: dict[str, tuple[float, ...]] = {
  "workers": (10, 100, 1000, 10_000),
  "churn": (0.0, 600.0, 120.0),
  "decile": (10.0, 3.0, 1.0, 0.3, 0.1),
}
AXES = {
  "workers": "number of workers",
  "churn": "mean seconds of a presence; absent for a fourth of it",
  "decile": "upload rate of the slowest tenth, Mbit/s",
}


def internet(cases: list[str]) -> list[dict[str, Any]]:
  """Runs all methods for all values of some cases."""
  return [one(case, value, name) for case in cases for value in VALUES[case] for name in METHODS]


def one(case: str, value: float, name: str) -> dict[str, Any]:
  """Trains one method; returns the time to the target and the costs, or the reason of a refusal."""
  from research.sim.churn import Always, OnOff
  from research.sim.network import Internet

  workers = int(value) if case == "workers" else MIDDLE
  network = Internet(
    REGIONS,
    scale=SCALE,
    churn=OnOff(value, value / 4) if case == "churn" and value else Always(),
    slowest_decile=value if case == "decile" else 0.0,
  )
  buffer = max(1, workers // PART)
  method = METHODS[name].replace("BUFFER", f"{buffer}").replace("RATE", f"{0.7 / buffer!r}")
  is_served = name == ASYNCHRONOUS
  is_large = workers == max(VALUES["workers"])
  rounds = (MESSAGES if is_served else ROUNDS)[is_large]
  every = PERIOD * (max(1, buffer // 5) if is_served else 4)
  config = {
    "task": TASK,
    "method": method,
    "mesh": f"slice:5,data:{workers // 5}" if name == HIERARCHICAL else f"data:{workers}",
    "batch_size": workers,
    "rounds": rounds,
    "clock": CLOCK,
    "network": repr(network),
    "eval_every": every,
    "log_every": every,
    "steps_per_dispatch": max(every, 2000),
    "checkpoint_every": 0,
    "check_every": 0,
  }
  row = {"case": case, "value": value, "name": name, "workers": workers, **_run(config)}
  tell(f"{case} {value:g}, {name}: {row.get('refused') or row['seconds_to_target']}")
  return row


def _run(config: dict[str, Any]) -> dict[str, Any]:
  """Runs one command; returns its flags and its results."""
  flags = {name: value for name, value in config.items() if name in ("method", "mesh", "network")}
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    line = [sys.executable, str(ROOT / "experiments" / "run.py"), *flags_of(config | {"out": out})]
    start = time.perf_counter()
    with (Path(folder) / "log").open("w+") as log:
      process = subprocess.Popen(line, stdout=log, stderr=log)
      _, status, usage = os.wait4(process.pid, 0)
      process.returncode = os.waitstatus_to_exitcode(status)
      log.seek(0)
      lines = log.read().splitlines()
    took = {"wall_seconds": time.perf_counter() - start, "peak_gib": usage.ru_maxrss / 2**20}
    if process.returncode == 2:
      return {**flags, "refused": lines[-1].removeprefix("error: ").split(": ", 1)[-1]}
    if process.returncode not in (0, 4):
      raise RuntimeError("\n".join(lines[-20:]))
    text = (out / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if row.get("train_loss") is not None]
    summary = json.loads((out / "summary.json").read_text()) if process.returncode == 0 else {}
  return {**flags, **took, **_results(config, rows), "wire": summary.get("wire")}


def _results(config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the time to the target, interpolated between evaluations, and the last evaluation."""
  found: dict[str, Any] = {"seconds_to_target": None, "rounds_to_target": None}
  losses = [row["train_loss"] for row in rows]
  after = next((i for i, loss in enumerate(losses) if loss <= TARGET), 0)
  if after:  # no run is there at the first evaluation
    between = lambda name: float(
      np.interp(
        -TARGET,
        [-x for x in losses[after - 1 : after + 1]],
        [row[name] for row in rows[after - 1 : after + 1]],
      )
    )
    found = {
      "seconds_to_target": between("virtual_seconds"),
      "rounds_to_target": between("step") / PERIOD,
    }
  last = rows[-1] if rows else {}
  names = ("train_loss", "virtual_seconds", "network_share", "present")
  return {"rounds": config["rounds"], **found, **{name: last.get(name) for name in names}}


def merged(
  earlier: list[dict[str, Any]], found: list[dict[str, Any]], commit: str
) -> list[dict[str, Any]]:
  """Returns the earlier rows of other cases, and the new rows with their commit."""
  cases = {row["case"] for row in found}
  kept = [row for row in earlier if row["case"] not in cases]
  rows = kept + [row | {"commit": commit} for row in found]
  return sorted(rows, key=lambda row: list(VALUES).index(row["case"]))


def internet_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown tables: the virtual hours to the target by case, and the costs."""
  lines = []
  for case in dict.fromkeys(row["case"] for row in rows):
    own = {(row["value"], row["name"]): row for row in rows if row["case"] == case}
    lines += [f"\nHours to a training loss of {TARGET} by {AXES[case]}:\n"]
    lines += [f"| | {' | '.join(METHODS)} |", f"|---|{'---|' * len(METHODS)}"]
    for value in dict.fromkeys(value for value, _ in own):
      cells = [_cell(own.get((value, name))) for name in METHODS]
      lines.append(f"| {_label(case, value)} | {' | '.join(cells)} |")
  large = [row for row in rows if row["workers"] == max(VALUES["workers"])]
  if large:
    lines += ["\nThe runs with 10,000 workers:\n"]
    lines += [
      "| method | rounds or messages | virtual hours | share of time waiting for the network | "
      "loss at the end | minutes of this machine | GiB at most |",
      "|---|---|---|---|---|---|---|",
    ]
    lines += [_costs(row) for row in large]
  return lines


def _label(case: str, value: float) -> str:
  return "always" if case == "churn" and not value else f"{value:,g}"


def _cell(row: dict[str, Any] | None) -> str:
  if row is None:
    return "not run"
  if "refused" in row:
    return "refused"
  seconds = row["seconds_to_target"]
  return f"not reached ({row['train_loss']:.3g})" if seconds is None else f"{seconds / 3600:.2f}"


def _costs(row: dict[str, Any]) -> str:
  cells = [row["name"], f"{row['rounds']:,}", f"{row['virtual_seconds'] / 3600:.1f}"]
  cells += [f"{row['network_share']:.0%}", f"{row['train_loss']:.4f}"]
  cells += [f"{row['wall_seconds'] / 60:.1f}", f"{row['peak_gib']:.2f}"]
  return "| " + " | ".join(cells) + " |"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
  """Draws the time to the target against the quantity that each case varies."""
  from matplotlib.figure import Figure

  cases = list(dict.fromkeys(row["case"] for row in rows))
  figure = Figure(figsize=(4.2 * len(cases), 3.8), layout="constrained")
  axes = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
  for ax, case in zip(axes, cases, strict=True):
    values = list(dict.fromkeys(row["value"] for row in rows if row["case"] == case))
    for number, name in enumerate(METHODS):
      own = [row for row in rows if (row["case"], row["name"]) == (case, name)]
      reached = [row for row in own if row.get("seconds_to_target") is not None]
      places = [values.index(row["value"]) for row in reached]
      hours = [row["seconds_to_target"] / 3600 for row in reached]
      style = {"color": f"C{number}", "marker": "osD^"[number], "lw": 1.5, "ms": 5}
      ax.plot(places, hours, label=name, **style)
    ax.set_xticks(range(len(values)), [_label(case, value) for value in values])
    ax.set(yscale="log", xlabel=AXES[case])
    ax.grid(alpha=0.3, which="both")
  axes[0].set_ylabel(f"virtual hours to a training loss of {TARGET}")
  axes[0].legend(fontsize="small")
  figure.savefig(path, dpi=120)
