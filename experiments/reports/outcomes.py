"""Reads the outcomes of trained methods, and computes numbers that compare the methods."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.analysis import network
from research.analysis.network import Network
from research.training.config import Config


class Contender(NamedTuple):
  """A method and its runs."""

  spec: str
  label: str  # the part of the spec that distinguishes this method from the other methods
  dense: bool
  configs: list[Config]  # one per seed


class Curve(NamedTuple):
  """The evaluations of a method's runs."""

  steps: np.ndarray  # [n]
  sent: np.ndarray  # [n] bytes sent by a worker so far
  losses: np.ndarray  # [seeds, n] mean loss over all training examples
  virtual: np.ndarray  # [n] mean seconds on the virtual clock; NaN without a clock

  @property
  def best(self) -> np.ndarray:
    """Returns the mean over seeds [n] of the lowest loss so far; infinite before the first loss."""
    return np.fmin.accumulate(np.where(np.isnan(self.losses), np.inf, self.losses), 1).mean(0)

  def improved(self, starts: Sequence[float | None]) -> list[bool]:
    """Returns whether each seed's loss fell below its initial value and did not end above it.

    Args:
      starts: each seed's loss before the first step; None if the loss is unknown or not finite.
    """
    lowest, lasts = np.fmin.reduce(self.losses, 1), self.losses[:, -1]
    bounds = [math.inf if start is None or math.isnan(start) else start for start in starts]
    rows = zip(lowest, lasts, bounds, strict=True)
    return [bool(low < start and math.isfinite(end) and end <= start) for low, end, start in rows]


class Outcome(NamedTuple):
  """The outcome of a method; `summaries` and `curve` cover the runs that did not diverge."""

  plan: Contender
  summaries: list[dict[str, Any]]
  curve: Curve | None
  diverged: list[int]  # seeds of diverged runs

  @property
  def unimproved(self) -> list[int]:
    """The seeds whose training loss did not fall below the initial value, or ended above it."""
    if self.curve is None:
      return []
    seeds = [config.seed for config in self.plan.configs if config.seed not in self.diverged]
    # summaries of earlier versions contain no initial loss
    improved = self.curve.improved([s.get("initial_train_loss") for s in self.summaries])
    return [seed for seed, well in zip(seeds, improved, strict=True) if not well]

  @property
  def eligible(self) -> bool:
    """Whether the method can win and counts for the common target: all of its seeds improved."""
    return self.curve is not None and not self.diverged and not self.unimproved


class Conditions(NamedTuple):
  """The conditions for which seconds are predicted."""

  network: str  # value of --network; '' if there is no network
  compute_seconds: float  # seconds per local step of one worker; 0 for the measured time
  clock: str  # value of --clock; '' if there is no clock

  @property
  def place(self) -> str:
    """A label of the conditions under which seconds to the target are counted, or ''."""
    return " and ".join(filter(None, (self.network, self.clock and "the virtual clock")))

  @property
  def parsed(self) -> Network:
    """The constants of the network; those of an ideal one if there is no network."""
    return network.parse(self.network) if self.network else Network()


def read_curve(folders: list[Path]) -> Curve:
  """Reads evaluations from metrics.jsonl; a converged run is extended by its last values."""
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
  """Returns the lowest mean loss over seeds that all improved methods reach."""
  return max((float(o.curve.best[-1]) for o in outcomes if o.curve and o.eligible), default=None)


def steps_to(curve: Curve, target: float) -> float | None:
  """Returns the step at which the best loss reaches the target, interpolated linearly."""
  best = curve.best
  below = np.flatnonzero(best <= target)
  if not below.size:
    return None
  around = slice(max(below[0] - 1, 0), below[0] + 1)
  if not np.isfinite(best[around]).all():
    return float(curve.steps[below[0]])
  return float(np.interp(-target, -best[around], curve.steps[around]))


def figures(outcome: Outcome, target: float | None, conditions: Conditions) -> dict[str, Any]:
  """Returns a method's known numbers, as means over the seeds that did not diverge."""
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
  found |= counted if by_axis else {}  # bytes sent to a server are not counted
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
  found |= step_seconds(outcome, conditions)
  computing, waiting = found["compute_seconds_per_step"], found["latency_seconds_per_step"]
  of_bytes = found["seconds_per_step"] - computing - waiting  # for a mean step; early steps vary
  computed = curve.virtual if conditions.clock else curve.steps * computing
  seconds = computed + curve.steps * waiting + curve.sent * (of_bytes / sent if sent else 0.0)
  found["curve"]["seconds"] = seconds.tolist()
  if target is not None and outcome.eligible:
    reached = to_target(curve, target, seconds if conditions.place else None)
    found |= {k: v for k, v in reached.items() if by_axis or k != "bytes_to_target"}
  return found


def to_target(curve: Curve, target: float, seconds: np.ndarray | None) -> dict[str, Any]:
  """Returns the steps, the bytes sent by a worker, and the seconds until the target is reached."""
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


def step_seconds(outcome: Outcome, conditions: Conditions) -> dict[str, float]:
  """Returns the seconds of a mean local step: computation, the part without bytes, and the total.

  The computation is that of --compute_seconds, of the file of --network, or as measured here. What
  is measured here contains the encoding of messages.
  """
  from research.analysis import cost
  from research.comm import mesh as meshes
  from research.core import registry

  summaries, config = outcome.summaries, outcome.plan.configs[0]
  measured = 1 / statistics.median(s["steps_per_second"] for s in summaries)
  network = conditions.parsed
  computing, encoding = conditions.compute_seconds or network.computing, 0.0
  if conditions.clock:
    computing = statistics.mean(s["virtual_seconds"] / s["steps"] for s in summaries)
  if computing and network.kernels:
    from experiments.reports import work

    encoding = work.of_config(config).encoding(network)
  axes = meshes.parse_mesh(summaries[0]["mesh"])
  method = registry.build("method", outcome.plan.spec)
  predict = lambda sent: cost.step(
    sent,
    network,
    workers=meshes.count(meshes.worker_axes(axes)),
    computing=computing or measured,
    encoding=encoding,
    period=method.local_steps,
    delay=method.hidden_steps,
  )
  sent = cost.load(summaries[0]["wire"]["transfers"] if conditions.network else [], axes)
  whole, empty = predict(sent), predict(sent._replace(sent=0.0))
  alone = whole.computing + whole.encoding
  return {
    "compute_seconds_per_step": alone,
    "communication_seconds_per_step": whole.host + whole.link,
    "latency_seconds_per_step": empty.seconds - alone,
    "seconds_per_step": whole.seconds,
  }


def compared(
  config: Config, outcomes: list[Outcome], wanted: float | None, conditions: Conditions
) -> dict[str, Any]:
  """Returns the contents of compare.json, except the recommendation."""
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
    "simulated_network": config.network,
    "network_compute_seconds": conditions.parsed.computing,
    "target": target,
    "target_is": "the greatest of the methods' least losses" if wanted is None else "as given",
    "methods": [figures(outcome, target, conditions) for outcome in outcomes],
    "env": folders.environment(),
  }
