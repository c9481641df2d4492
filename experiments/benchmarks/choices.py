"""Compares the advisor's first choice with the best measured method, for several models.

This is bench.py's suite advice. A place is a model, a number of hosts and a link, each measured as
in prediction.py; the cells of the first model are those of the recorded suite prediction. A case is
a place and a set of methods to choose from. The choice is the method with the least predicted time,
and is good if its measured time is within a tenth of the least measured one. In the set "to the
target", both times are multiplied by the recorded ratio of steps. No link is the one on which the
constants were fitted.
"""

import collections
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import prediction
from experiments.benchmarks.hosts import ROOT, tell
from experiments.benchmarks.prediction import METHODS, Cell
from experiments.reports import advice, evidence
from research.analysis import cost, network
from research.analysis.network import Network

Case = dict[str, Any]
RESULTS = ROOT / "results"
FIRST = "perceptron"  # whose cells the suite prediction measures


class Subject(NamedTuple):
  """A model that the hosts train."""

  model: prediction.Model
  text: str  # for the table


SUBJECTS = {
  FIRST: Subject(prediction.MODEL, "perceptron, 0.67 million parameters, 64 images"),
  "small": Subject(
    {"task": "mnist()", "model": "mlp(hidden=[64])", "batch_size": 64},
    "perceptron, 51 thousand parameters, 64 images",
  ),
  "convolution": Subject(
    {"task": "mnist()", "model": "cnn()", "batch_size": 8},
    "convolutions, 0.42 million parameters, 8 images",
  ),
}
WITHIN, SHARE, LEAST = 1.10, 0.90, 30
TO_TARGET = "to the target"
RATIOS = {  # keys of `evidence.READERS`
  "dense": "exact",
  "int8": "int8",
  "top 1%": "top_k",
  "PowerSGD": "power_sgd",
  "local SGD": "local_sgd_16",
  "DiLoCo, block top-k": "diloco_8",
}
SETS = {
  "any method": tuple(METHODS),
  "an exchange in each step": tuple(n for n, spec in METHODS.items() if "period" not in spec),
  "without a memory of errors": ("dense", "bf16", "majority vote", "local SGD", "gossip"),
  TO_TARGET: tuple(RATIOS),
}


def choices(subject: str, cells: Sequence[Cell], probes: Mapping[int, Network]) -> list[Case]:
  """Returns one row per case of a model, in the places where all methods were measured.

  Args:
    subject: a name of SUBJECTS.
    cells: its cells, as in result.json of the suite prediction.
    probes: the constants by number of hosts.
  """
  known = {name: evidence.READERS[key]() for name, key in RATIOS.items()}
  by_place = {(cell["hosts"], cell["link"], cell["method"]): cell for cell in cells}
  number = collections.Counter((cell["hosts"], cell["link"]) for cell in cells)
  places = [place for place, count in number.items() if count == len(METHODS)]
  found = []
  for (hosts, link), (among, members) in itertools.product(places, SETS.items()):
    ratio = lambda name, among=among: known[name].ratio if among == TO_TARGET else 1.0
    mine = {name: by_place[hosts, link, name] for name in members}
    options = [_option(cell, ratio(name)) for name, cell in mine.items()]
    network = probes[hosts].on(link)
    rows = advice.ranked(options, network, workers=hosts, computing=network.computing)
    measured = {name: ratio(name) * cell["measured"] for name, cell in mine.items()}
    best, first = min(measured, key=lambda name: measured[name]), rows[0]["name"]
    over = measured[first] / measured[best]
    case = {"model": subject, "hosts": hosts, "link": link, "among": among}
    case |= {"choice": first, "best": best, "over_best": over, "good": over <= WITHIN}
    found.append(case)
  return found


def _option(cell: Cell, ratio: float) -> advice.Option:
  load = cost.Load(**cell["load"])
  rest = (cell["encoding"], 0.0, cell["period"], cell["delay"])
  return advice.Option(cell["method"], cell["spec"], (), load, *rest, ratio, ratio, ratio)


def _folder(subject: str, out: Path) -> Path:
  return RESULTS / "prediction" if subject == FIRST else out / subject


def chosen(cells: Mapping[str, Sequence[Cell]], out: Path) -> list[Case]:
  """Returns the cases of all models.

  Args:
    cells: the cells of each model.
    out: the folder of the suite's result, with a folder of probes per model but the first.
  """
  found = []
  for subject, mine in cells.items():
    hosts = {cell["hosts"] for cell in mine}
    files = {count: _folder(subject, out) / f"probe-{count}.json" for count in hosts}
    probes = {count: network.of_dict(json.loads(f.read_text())) for count, f in files.items()}
    found += choices(subject, mine, probes)
  return found


def recorded() -> list[Case]:
  """Returns the cases of the recorded cells."""
  out = RESULTS / "advice"
  cells = {FIRST: json.loads((RESULTS / "prediction" / "result.json").read_text())["prediction"]}
  return chosen(cells | json.loads((out / "result.json").read_text())["cells"], out)


def summary(cases: Sequence[Case]) -> dict[str, Any]:
  """Returns the share of good choices in each set, and whether all satisfy the gate."""
  among = {name: [case for case in cases if case["among"] == name] for name in SETS}
  shares = {name: sum(case["good"] for case in mine) / len(mine) for name, mine in among.items()}
  places = len(among[TO_TARGET])
  return {
    "places": places,
    "shares": shares,
    "holds": places >= LEAST and min(shares.values()) >= SHARE,
  }


def errors(cells: Mapping[str, Sequence[Cell]]) -> dict[str, dict[str, Any]]:
  """Returns the errors of the predicted times of each model that this suite measures."""
  return {name: prediction.summary(mine) for name, mine in cells.items() if name != FIRST}


def table(cases: Sequence[Case], cells: Mapping[str, Sequence[Cell]]) -> list[str]:
  """Formats the Markdown table: a row per place and a column per set of methods."""
  total = summary(cases)
  lines = [
    f"The first choice takes at most {WITHIN - 1:.0%} longer than the best measured method in the "
    f"following shares of {total['places']} places, each measured on its own (gate: at least "
    f"{SHARE:.0%} of at least {LEAST}): "
    + "; ".join(f"{name} {share:.0%}" for name, share in total["shares"].items())
    + f". The gate {'holds' if total['holds'] else 'does not hold'}.\n",
    "Each cell is the first choice; if another method was faster, also that method and how many "
    "times as long as it the choice took.\n",
    "| model | hosts | link | " + " | ".join(SETS) + " |",
    "|---" * (3 + len(SETS)) + "|",
  ]
  by_place = {}
  for case in cases:
    place = (SUBJECTS[case["model"]].text, case["hosts"], case["link"])
    by_place.setdefault(place, {})[case["among"]] = _shown(case)
  for place, row in by_place.items():
    lines.append(f"| {' | '.join(map(str, place))} | {' | '.join(row[name] for name in SETS)} |")
  lines.append("")
  for name, error in errors(cells).items():
    lines.append(
      f"- Errors of the predicted times, {SUBJECTS[name].text}: median "
      f"{error['median_error']:.1%}, largest {error['largest_error']:.1%}, {error['above']} of "
      f"{error['cells']} above {prediction.MOST:.0%}"
    )
  return lines


def _shown(case: Case) -> str:
  if case["choice"] == case["best"]:
    return case["choice"]
  return f"{case['choice']} ({case['best']}, {case['over_best']:.2f})"


def measure(out: Path | None) -> tuple[dict[str, Any], list[str]]:
  """Measures the missing cells of the models but the first.

  Args:
    out: the folder of the cells and probes; None keeps nothing.

  Returns:
    The contents of result.json, and the lines of table.md.
  """
  with tempfile.TemporaryDirectory() as nothing:
    out = out or Path(nothing)
    mine = {}
    for subject in SUBJECTS:
      if subject != FIRST:
        tell(SUBJECTS[subject].text)
        folder = _folder(subject, out)
        folder.mkdir(parents=True, exist_ok=True)
        mine[subject] = prediction.prediction(folder, SUBJECTS[subject].model)
    first = json.loads((RESULTS / "prediction" / "result.json").read_text())["prediction"]
    cells = {FIRST: first} | mine
    cases = chosen(cells, out)
  kept = {name: [_without_times(cell) for cell in found] for name, found in mine.items()}
  return summary(cases) | {"errors": errors(cells), "advice": cases, "cells": kept}, table(
    cases, cells
  )


def _without_times(cell: Cell) -> Cell:
  """Returns a cell without the times of single dispatches, which cells.json keeps."""
  return {name: x for name, x in cell.items() if name not in ("milliseconds", "others", "paces")}
