"""Reads from recorded results how many steps a method needs, relative to averaging every gradient.

A curve gives the ratio without extrapolation: the steps of the method's run, over the steps after
which the exact average of gradients had the method's last loss. One ratio per seed gives the range.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RESULTS = Path(__file__).parents[2] / "results"


class Evidence(NamedTuple):
  """Steps of a method over those of the exact average of gradients, for the same loss."""

  ratio: float
  low: float
  high: float
  source: str  # the folder of the recorded result

  @property
  def counted(self) -> float:
    """The ratio, or 1 if the seeds do not agree on which method needs more steps."""
    return 1.0 if self.low <= 1 <= self.high else self.ratio

  def times(self, other: "Evidence") -> "Evidence":
    """Returns the product, for a method that was compared with another method."""
    names = dict.fromkeys([*self.source.split(", "), *other.source.split(", ")])
    ratio, low, high = (a * b for a, b in zip(self[:3], other[:3], strict=True))
    return Evidence(ratio, low, high, ", ".join(names))


EXACT = Evidence(1.0, 1.0, 1.0, "by definition")
Line = dict[str, Any]  # with the keys label, x and y


def _contents(folder: str, name: str = "result.json") -> Any:
  return json.loads((RESULTS / folder / name).read_text())


def of_ratios(found: Sequence[float], source: str) -> Evidence:
  """Summarizes one ratio per seed."""
  return Evidence(statistics.mean(found), min(found), max(found), source)


def steps_at(x: Sequence[float], y: Sequence[float], level: float) -> float:
  """Returns where the best loss so far falls to a level, on straight lines between evaluations.

  Levels above the first loss are reached at the first evaluation, and levels below all losses at
  the last one.

  Args:
    x: steps.
    y: losses.
    level: the loss.
  """
  best = np.minimum.accumulate(np.asarray(y))
  return float(np.interp(-level, -best, np.asarray(x)))


def of_curves(lines: Sequence[Line], base: str, method: str, source: str) -> Evidence:
  """Returns the ratio of steps from the curves of two methods, paired by seed.

  Args:
    lines: the lines of both methods, with falling losses.
    base: the label of the method that the other is compared with.
    method: the label of the method.
    source: the folder of the result.

  Raises:
    ValueError: if a label has no line.
  """
  of = lambda label: [line for line in lines if line["label"] == label]
  if not of(base) or not of(method):
    raise ValueError(f"{source}: no line '{base}' or '{method}'")
  ratios = [
    mine["x"][-1] / steps_at(theirs["x"], theirs["y"], min(mine["y"]))
    for theirs, mine in zip(of(base), of(method), strict=True)
  ]
  return of_ratios(ratios, source)


def _of_claim(folder: str, base: str, method: str) -> Evidence:
  lines = _contents(folder)["curves"][0]["lines"]
  return of_curves(lines, base, method, f"results/{folder}")


def _of_compression(part: str) -> Evidence:
  """Steps to the common target of results/compression, one ratio per seed."""
  rows = _contents("compression", "compare.json")["methods"]
  (mine,) = [row for row in rows if part in row["method"]]
  target = max(min(np.mean(row["curve"]["losses"], 0)) for row in rows)
  steps = [
    [steps_at(row["curve"]["steps"], losses, target) for losses in row["curve"]["losses"]]
    for row in (mine, rows[0])
  ]
  ratios = [a / b for a, b in zip(*steps, strict=True)]
  return of_ratios(ratios, "results/compression")


def _of_local_sgd(period: int) -> Evidence:
  """Steps to the target at the best step size, over those of a period of one at its best."""
  values = {
    row["what"].split(": steps at its best")[0]: row for row in _contents("local_sgd")["values"]
  }
  ratio = values[f"H={period}"]["ours"] / values["H=1"]["ours"]
  return Evidence(ratio, ratio, ratio, "results/local_sgd")


def _diloco(period: int) -> Evidence:
  return _of_claim("diloco", "batch of all workers", f"DiLoCo, H={period}, 0.7 and 0.6")


READERS: dict[str, Callable[[], Evidence]] = {
  "exact": lambda: EXACT,
  "int8": lambda: _of_compression("two_phase(int8())"),
  "top_k": lambda: _of_compression("top_k(0.01)"),
  "sign": lambda: _of_compression("gather_mean(sign())"),
  "power_sgd": lambda: _of_compression("power_sgd(2)"),
  "local_sgd_4": lambda: _of_local_sgd(4),
  "local_sgd_16": lambda: _of_local_sgd(16),
  "diloco_8": lambda: _diloco(8),
  "diloco_32": lambda: _diloco(32),
  "diloco_32_int8": lambda: _diloco(32).times(_of_compression("two_phase(int8())")),
  "sparseloco": lambda: _diloco(32).times(_of_claim("sparseloco", "DiLoCo", "SparseLoCo")),
}


def leaderboard() -> dict[str, dict[str, Any]]:
  """Returns the rows of the leaderboard on i.i.d. data by name; none if it was not recorded."""
  place = RESULTS / "leaderboard" / "iid" / "leaderboard.json"
  rows = json.loads(place.read_text())["rows"] if place.exists() else []
  return {row["name"]: row for row in rows if row["data"] == "iid" and row["loss"] is not None}
