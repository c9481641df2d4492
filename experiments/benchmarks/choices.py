"""Compares the advisor's first choice with the best measured method, on the cells of prediction.py.

This is bench.py's suite advice. A case is a number of hosts, a link, and a set of methods to choose
from. The choice is the method with the least predicted time, and is good if its measured time is
within a tenth of the least measured one. In the cases "to the target", both times are multiplied by
the recorded ratio of steps, if there is one. No link is the one on which the constants were fitted.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.hosts import ROOT
from experiments.benchmarks.prediction import METHODS
from experiments.reports import advice, evidence
from research.analysis import cost, network
from research.analysis.network import Network

Case = dict[str, Any]
PLACE = ROOT / "results" / "prediction"
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


def choices(cells: Sequence[dict[str, Any]], probes: dict[int, Network]) -> list[Case]:
  """Returns one row per case.

  Args:
    cells: the cells of result.json of the suite prediction.
    probes: the constants by number of hosts.
  """
  known = {name: evidence.READERS[key]() for name, key in RATIOS.items()}
  places = dict.fromkeys((cell["hosts"], cell["link"]) for cell in cells)
  by_place = {(cell["hosts"], cell["link"], cell["method"]): cell for cell in cells}
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
    case = {"hosts": hosts, "link": link, "among": among, "choice": first, "best": best}
    found.append(case | {"over_best": over, "good": over <= WITHIN})
  return found


def _option(cell: dict[str, Any], ratio: float) -> advice.Option:
  load = cost.Load(**cell["load"])
  rest = (cell["encoding"], 0.0, cell["period"], cell["delay"])
  return advice.Option(cell["method"], cell["spec"], (), load, *rest, ratio, ratio, ratio)


def recorded() -> list[Case]:
  """Returns the cases of the recorded result of the suite prediction."""
  cells = json.loads((PLACE / "result.json").read_text())["prediction"]
  files = {hosts: PLACE / f"probe-{hosts}.json" for hosts in {cell["hosts"] for cell in cells}}
  probes = {hosts: network.of_dict(json.loads(f.read_text())) for hosts, f in files.items()}
  return choices(cells, probes)


def summary(cases: Sequence[Case]) -> dict[str, Any]:
  """Returns the share of good choices, and whether it satisfies the gate."""
  share = sum(case["good"] for case in cases) / len(cases)
  return {"cases": len(cases), "share": share, "holds": len(cases) >= LEAST and share >= SHARE}


def table(cases: Sequence[Case]) -> list[str]:
  """Formats the Markdown table of the cases."""
  total = summary(cases)
  lines = [
    f"In {total['share']:.0%} of {total['cases']} cases the first choice takes at most "
    f"{WITHIN - 1:.0%} longer than the best measured method (gate: at least {SHARE:.0%}). The gate "
    f"{'holds' if total['holds'] else 'does not hold'}.\n",
    "| hosts | link | among | first choice | best measured | time over the best |",
    "|---|---|---|---|---|---|",
  ]
  for case in cases:
    cells = [case[name] for name in ("hosts", "link", "among", "choice", "best")]
    lines.append(f"| {' | '.join(map(str, cells))} | {case['over_best']:.2f} |")
  return lines


def measure() -> tuple[dict[str, Any], list[str]]:
  """Returns the contents of result.json and the lines of table.md."""
  cases = recorded()
  return summary(cases) | {"advice": cases}, table(cases)
