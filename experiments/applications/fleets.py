"""Trains driving policies for fleets: pooled, federated, alone; `bench.py` runs this module."""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.applications.measured import Rows, row
from research.core.spec import Call, calls
from research.tasks.driving import judging, recorded
from research.tasks.driving.episodes import Outcome
from research.tasks.driving.experts import EXPERTS
from research.tasks.driving.scenarios import SCENARIOS
from research.tasks.driving.scene import Driver
from research.training.config import UsageError, flag

ROUNDS = 2  # number of DAgger rounds in the recording
SEEDS = 3  # number of training seeds; each seed is judged on different episodes
EPISODES = 10  # number of episodes per scenario and seed
STEPS = 4000
BATCH = 128
CLIP = 0.5  # norm to which an update is clipped before noise is added
Judged = dict[str, list[Outcome]]  # by scenario


class Kind(NamedTuple):
  """A kind of training."""

  method: Call
  fleets: int = 4
  model: str = "ego_attention()"
  rounds: int = ROUNDS
  only: str = ""


def federated(aggregator: Call) -> Call:
  """Returns FedAvg with ten local steps."""
  return calls.fed_avg(calls.sgd(0.1, momentum=0.9), aggregator, period=10)


MEAN = federated(calls.mean())
INT8 = federated(calls.error_feedback(calls.two_phase(calls.int8())))
KINDS = {
  "pooled": Kind(MEAN, 1),
  "pooled, perceptron": Kind(MEAN, 1, "mlp(hidden=[128, 128])"),
  "pooled, without DAgger": Kind(MEAN, 1, rounds=0),
  "FedAvg": Kind(MEAN),
  "SCAFFOLD": Kind(calls.scaffold(0.1, calls.mean(), period=10)),
  "FedAvg, int8": Kind(INT8),
  "FedAvg, secure sum": Kind(federated(calls.secure_sum(clip=20.0))),
  "FedAvg, noise": Kind(federated(calls.noisy(calls.mean(), clip=CLIP, noise=0.05))),
  **{f"{name} alone": Kind(MEAN, 1, only=name) for name in SCENARIOS},
}


def driving(figure: Any) -> Rows:
  """Compares experts with pooled, federated and separate training on the same held-out episodes."""
  needs_simulator()
  with flag("suite", "applications"):
    next(recorded.blocks(recorded.found("driving")))
  judged = {name: judge(name, [driver] * SEEDS, SCENARIOS) for name, driver in EXPERTS.items()}
  notes = {}
  for name, kind in KINDS.items():
    drivers, epsilon = zip(*(trained(kind, seed) for seed in range(SEEDS)), strict=True)
    notes[name] = f" (epsilon {epsilon[0]:.3g} per fleet)" if epsilon[0] else ""
    judged[name] = judge(name, drivers, others(kind.only))
  whole = {name: found for name, found in judged.items() if len(found) == len(SCENARIOS)}
  rows = [line for name in whole for line in of_policy(name, whole, notes.get(name, ""))]
  for name in SCENARIOS:
    rows += of_fleet(name, judged[f"{name} alone"], judged["FedAvg"])
  draw(figure, judged)
  return rows


def needs_simulator() -> None:
  """Raises a UsageError if the simulator is not installed."""
  if importlib.util.find_spec("highway_env") is None:
    raise UsageError('the simulator is highway-env: pip install -e ".[driving]"')


def others(name: str) -> list[str]:
  """Returns the scenarios other than `name`, which a fleet has not seen; all if `name` is ''."""
  return [other for other in SCENARIOS if other != name]


def trained(kind: Kind, seed: int) -> tuple[Driver, float]:
  """Trains a policy; returns a driver with the policy, and epsilon, which is 0 without noise."""
  import research

  result = research.train(
    str(calls.driving(rounds=kind.rounds, only=kind.only)),
    str(kind.method),
    model=kind.model,
    mesh=f"data:{kind.fleets}",
    partition="by_owner()" if kind.fleets > 1 else "iid()",
    batch_size=BATCH,
    steps=STEPS,
    seed=seed,
    progress=False,
    eval_every=0,
    check_every=0,
  )
  return judging.policy(result.model), float(result.summary.get("epsilon") or 0)


def judge(name: str, drivers: Sequence[Driver], scenarios: Iterable[str]) -> Judged:
  """Drives scenarios with one driver per training seed, each on different episodes."""
  found: Judged = {scenario: [] for scenario in scenarios}
  for seed, driver in enumerate(drivers):
    for scenario, outcomes in found.items():
      outcomes += judging.judge(driver, scenario, EPISODES, seed * EPISODES)
    crashed = sum(outcome.crashed for outcome in judging.together(found.values()))
    print(f"{name}, seed {seed}: {crashed} collisions until now", flush=True)
  return found


def measured(judged: Judged, scenarios: Iterable[str] = SCENARIOS) -> dict[str, judging.Interval]:
  """Computes the measures over several scenarios."""
  return judging.measures(judging.together(judged[name] for name in scenarios))


def of_policy(name: str, judged: dict[str, Judged], note: str) -> Rows:
  """Compares a policy's collisions with the planner's, and its success with pooled training's."""
  own, planner, pooled = (measured(judged[kind]) for kind in (name, "planner", "pooled"))
  each = {s: measured(judged[name], [s]) for s in SCENARIOS}
  figures = {s: {k: v.value for k, v in e.items() if np.isfinite(v.value)} for s, e in each.items()}
  more = {"speed": own["speed"], "headway": own["headway"], "scenarios": figures}
  crashes = "collisions per 100 km"
  return [
    _row(f"{name}{note}: {crashes}", own[crashes], "planner", planner[crashes], **more),
    _row(f"{name}{note}: success", own["success"], "pooled", pooled["success"]),
  ]


def of_fleet(name: str, alone: Judged, together: Judged) -> Rows:
  """Compares a fleet that trained alone with FedAvg, in the scenarios that it has not seen."""
  both = [measured(judged, others(name)) for judged in (alone, together)]
  return [
    _row(f"{name} alone, other scenarios: {what}", both[0][what], "FedAvg", both[1][what])
    for what in ("collisions per 100 km", "success")
  ]


def _row(
  what: str, own: judging.Interval, beside: str, other: judging.Interval, **more: Any
) -> dict[str, Any]:
  intervals = {"interval": own[1:], "interval_beside": other[1:]}
  return row(what, own.value, beside, other.value, **intervals, **more)


def draw(figure: Any, judged: dict[str, Judged]) -> None:
  """Draws each policy's collisions, and each fleet's success in new scenarios next to FedAvg's."""
  left, right = figure.subplots(1, 2)
  whole = [name for name in judged if len(judged[name]) == len(SCENARIOS)]
  crashes = [measured(judged[name])["collisions per 100 km"] for name in whole]
  _bars(left, whole, crashes, ["C1" if name in EXPERTS else "C0" for name in whole])
  left.set(title="Collisions per 100 km")
  names, values, colors = [], [], []
  for name in SCENARIOS:
    for kind, color in ((f"{name} alone", "gray"), ("FedAvg", "C0")):
      names.append(f"without the {name}: {kind}")
      values.append(measured(judged[kind], others(name))["success"])
      colors.append(color)
  _bars(right, names, values, colors)
  right.set(title="Success where a fleet has not driven", xlim=(0, 1))


def _bars(axis: Any, names: list[str], values: list[judging.Interval], colors: list[str]) -> None:
  for place, (found, color) in enumerate(zip(values, colors, strict=True)):
    axis.barh(place, found.value, color=color)
    axis.plot([found.low, found.high], [place, place], color="black", linewidth=1)
  axis.set_yticks(range(len(names)), names, fontsize=7)
  axis.invert_yaxis()
