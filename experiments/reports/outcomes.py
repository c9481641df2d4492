"""The outcomes of trained methods, and their comparison in figures."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.training.config import Config


class Contender(NamedTuple):
  """A method and its runs."""

  spec: str
  label: str  # the part of the spec that distinguishes it from the others
  dense: bool
  configs: list[Config]  # by seed


class Curve(NamedTuple):
  """The evaluations of a method's runs."""

  steps: np.ndarray  # [n]
  sent: np.ndarray  # [n] bytes sent by a worker so far
  losses: np.ndarray  # [seeds, n] of all training data
  virtual: np.ndarray  # [n] mean seconds on the clock; NaN without one

  @property
  def best(self) -> np.ndarray:
    """[n], the mean over seeds of the lowest loss so far; infinite before the first."""
    return np.fmin.accumulate(np.where(np.isnan(self.losses), np.inf, self.losses), 1).mean(0)

  def improved(self, starts: Sequence[float | None]) -> list[bool]:
    """Whether each seed's loss fell below its start and does not end above it.

    Args:
      starts: the losses before the first step; None if unknown or not finite.
    """
    lowest, lasts = np.fmin.reduce(self.losses, 1), self.losses[:, -1]
    bounds = [math.inf if start is None or math.isnan(start) else start for start in starts]
    rows = zip(lowest, lasts, bounds, strict=True)
    return [bool(low < start and math.isfinite(end) and end <= start) for low, end, start in rows]


class Outcome(NamedTuple):
  """The outcome of a plan; summaries and curve are of the runs that did not diverge."""

  plan: Contender
  summaries: list[dict[str, Any]]
  curve: Curve | None
  diverged: list[int]  # seeds

  @property
  def unimproved(self) -> list[int]:
    """Seeds whose training loss did not fall below that of their initial model, or rose again."""
    if self.curve is None:
      return []
    seeds = [config.seed for config in self.plan.configs if config.seed not in self.diverged]
    # a summary of an earlier version has no initial loss
    improved = self.curve.improved([s.get("initial_train_loss") for s in self.summaries])
    return [seed for seed, well in zip(seeds, improved, strict=True) if not well]

  @property
  def eligible(self) -> bool:
    """Whether it can win and counts for the common target: all its seeds must have improved."""
    return self.curve is not None and not self.diverged and not self.unimproved


class Conditions(NamedTuple):
  """The conditions for which seconds are predicted."""

  link: str  # as in the flag; empty: none
  compute_seconds: float  # per local step of one worker; 0: as measured
  clock: str  # as in the flag; empty: none

  @property
  def place(self) -> str:
    """Label of the conditions in which seconds to the target are counted; empty: none."""
    return " and ".join(filter(None, (self.link, self.clock and "the virtual clock")))


def read_curve(folders: list[Path]) -> Curve:
  """Evaluations from runs' metrics.jsonl; a converged run is extended by its last values."""
  from research.training.reports import report

  runs = []
  for folder in folders:
    rows = [row for row in report.read_rows(folder / "metrics.jsonl") if "train_loss" in row]
    names = ("step", "bytes", "train_loss", "virtual_seconds")
    runs.append(np.array([[row.get(name, math.nan) for name in names] for row in rows]))
  steps = np.unique(np.concatenate([found[:, 0] for found in runs]))
  longest = max(runs, key=len)
  of = lambda column: np.stack([np.interp(steps, found[:, 0], found[:, column]) for found in runs])
  sent = np.interp(steps, longest[:, 0], longest[:, 1])
  return Curve(steps, sent, of(2), of(3).mean(0))


def common_target(outcomes: list[Outcome]) -> float | None:
  """The greatest mean best loss among the methods that improved; all of these methods reach it."""
  return max((float(o.curve.best[-1]) for o in outcomes if o.curve and o.eligible), default=None)


def steps_to(curve: Curve, target: float) -> float | None:
  """The step at which the best loss reaches the target, interpolated between evaluations."""
  best = curve.best
  below = np.flatnonzero(best <= target)
  if not below.size:
    return None
  around = slice(max(below[0] - 1, 0), below[0] + 1)
  if not np.isfinite(best[around]).all():
    return float(curve.steps[below[0]])
  return float(np.interp(-target, -best[around], curve.steps[around]))


def figures(outcome: Outcome, target: float | None, conditions: Conditions) -> dict[str, Any]:
  """A method's figures: means over the seeds that did not diverge; unknown ones are left out."""
  plan, summaries, curve, diverged = outcome
  found: dict[str, Any] = {
    "method": plan.spec,
    "label": plan.label,
    "dense": plan.dense,
    "folders": [config.out for config in plan.configs],
    "diverged_seeds": diverged,
    "unimproved_seeds": outcome.unimproved,
  }
  if curve is None:
    return found
  wire = summaries[0]["wire"]
  by_axis, dense = wire["bytes_per_step_per_worker"], wire["dense_bytes_per_step_per_worker"]
  sent = sum(by_axis.values())
  counted = {"bytes_per_step_per_worker": sent, "ratio_to_dense": sent / dense if dense else 1.0}
  found |= counted if by_axis else {}  # a server's are not counted
  found |= {
    "train_loss": statistics.mean(s["train_loss"] for s in summaries),
    "steps_per_second": statistics.median(s["steps_per_second"] for s in summaries),
    "curve": {name: value.tolist() for name, value in curve._asdict().items()},
  }
  known = [s.get("initial_train_loss") for s in summaries]
  starts = [start for start in known if start is not None and math.isfinite(start)]
  if len(starts) == len(summaries):
    found["initial_train_loss"] = statistics.mean(starts)
  accuracies = [s["eval"]["accuracy"] for s in summaries if "accuracy" in s["eval"]]
  if accuracies:
    measures = {"mean": statistics.mean, "least": min, "greatest": max}
    found |= {f"accuracy_{name}": of(accuracies) for name, of in measures.items()}
  found |= step_seconds(summaries, conditions)
  computing, waiting = found["compute_seconds_per_step"], found["latency_seconds_per_step"]
  of_bytes = found["seconds_per_step"] - computing - waiting  # of a mean step; early ones vary
  computed = curve.virtual if conditions.clock else curve.steps * computing
  seconds = computed + curve.steps * waiting + curve.sent * (of_bytes / sent if sent else 0.0)
  found["curve"]["seconds"] = seconds.tolist()
  if target is not None and outcome.eligible:
    reached = to_target(curve, target, seconds if conditions.place else None)
    found |= {k: v for k, v in reached.items() if by_axis or k != "bytes_to_target"}
  return found


def to_target(curve: Curve, target: float, seconds: np.ndarray | None) -> dict[str, Any]:
  """Steps, bytes sent by a worker and seconds until the target is reached."""
  steps = steps_to(curve, target)
  if steps is None:
    return {}
  found = {
    "steps_to_target": steps,
    "at_first_evaluation": steps == float(curve.steps[0]),
    "bytes_to_target": float(np.interp(steps, curve.steps, curve.sent)),
  }
  if seconds is not None:
    found["seconds_to_target"] = float(np.interp(steps, curve.steps, seconds))
  return found


def step_seconds(summaries: list[dict[str, Any]], conditions: Conditions) -> dict[str, float]:
  """Seconds of a mean local step: computing, latency on the link if any, and the total."""
  from research.analysis import cost
  from research.comm import mesh as meshes

  measured = 1 / statistics.median(s["steps_per_second"] for s in summaries)
  computing, waiting, talking = conditions.compute_seconds or measured, 0.0, 0.0
  if conditions.clock:
    computing = statistics.mean(s["virtual_seconds"] / s["steps"] for s in summaries)
  if conditions.link:
    axes, link = meshes.parse_mesh(summaries[0]["mesh"]), cost.parse_link(conditions.link)
    rows = summaries[0]["wire"]["transfers"]
    talking = cost.seconds(rows, axes, link)
    waiting = cost.seconds(rows, axes, link._replace(bits_per_second=math.inf))
  return {
    "compute_seconds_per_step": computing,
    "communication_seconds_per_step": talking,
    "latency_seconds_per_step": waiting,
    "seconds_per_step": computing + talking,
  }


def compared(
  config: Config, outcomes: list[Outcome], wanted: float | None, conditions: Conditions
) -> dict[str, Any]:
  """The contents of compare.json, except the recommendation."""
  from research.comm import mesh as meshes
  from research.training import folder as folders

  target = common_target(outcomes) if wanted is None else wanted
  given = {name: value for name, value in config.as_dict().items() if name not in ("method", "out")}
  return given | {
    "workers": meshes.count(meshes.worker_axes(meshes.parse_mesh(config.mesh))),
    "seeds": [one.seed for one in outcomes[0].plan.configs],
    "evaluated_on": next((o.summaries[0]["evaluated_on"] for o in outcomes if o.summaries), "test"),
    **conditions._asdict(),
    "place": conditions.place,
    "target": target,
    "target_is": "the greatest of the methods' least losses" if wanted is None else "as given",
    "methods": [figures(outcome, target, conditions) for outcome in outcomes],
    "env": folders.environment(),
  }
