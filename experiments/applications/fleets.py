"""Driving over fleets: pooled, federated, private and alone, in closed loop. An application of
`bench.py`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.applications.measured import Rows, row
from research.core.spec import Call, calls
from research.tasks.driving import judging
from research.tasks.driving.episodes import Driver, Outcome
from research.tasks.driving.experts import EXPERTS
from research.tasks.driving.scenarios import SCENARIOS

ROUNDS = 1  # of DAgger in the recording
SEEDS = 3  # of training; each is judged on episodes of its own
EPISODES = 10  # of each scenario and seed
STEPS = 4000
BATCH = 128
CLIP = 0.5  # of an update, for its noise
Judged = dict[str, list[Outcome]]  # by scenario


class Kind(NamedTuple):
  """A way to train."""

  method: Call
  fleets: int = 4
  model: str = "ego_attention()"
  rounds: int = ROUNDS
  only: str = ""


def federated(aggregator: Call) -> Call:
  """FedAvg with ten local steps."""
  return calls.fed_avg(calls.sgd(0.1, momentum=0.9), aggregator, period=10)


MEAN = federated(calls.mean())
INT8 = federated(calls.error_feedback(calls.two_phase(calls.int8())))
TOP = federated(calls.error_feedback(calls.gather_mean(calls.top_k(0.05))))
KINDS = {
  "pooled": Kind(MEAN, 1),
  "pooled, perceptron": Kind(MEAN, 1, "mlp(hidden=[128, 128])"),
  "pooled, without DAgger": Kind(MEAN, 1, rounds=0),
  "FedAvg": Kind(MEAN),
  "SCAFFOLD": Kind(calls.scaffold(0.1, calls.mean(), period=10)),
  "FedAvg, int8": Kind(INT8),
  "FedAvg, 5% of the elements": Kind(TOP),
  "FedAvg, secure sum": Kind(federated(calls.secure_sum(clip=20.0))),
  "FedAvg, noise": Kind(federated(calls.noisy(calls.mean(), clip=CLIP, noise=0.05))),
  **{f"{name} alone": Kind(MEAN, 1, only=name) for name in SCENARIOS},
}


def driving(figure: Any) -> Rows:
  """The experts, and policies trained pooled, federated and alone, on the same held-out roads."""
  judged = {name: judge(name, [driver] * SEEDS) for name, driver in EXPERTS.items()}
  notes = {}
  for name, kind in KINDS.items():
    drivers, epsilon = zip(*(trained(kind, seed) for seed in range(SEEDS)), strict=True)
    notes[name] = f" (epsilon {epsilon[0]:.3g} per fleet)" if epsilon[0] else ""
    judged[name] = judge(name, drivers)
  rows = [
    line for name in judged for line in of_policy(name, judged[name], judged, notes.get(name, ""))
  ]
  for name in SCENARIOS:
    others = [other for other in SCENARIOS if other != name]
    both = [share(judged[kind], others) for kind in (f"{name} alone", "FedAvg")]
    what = f"{name} alone: success in the other scenarios"
    rows.append(row(what, both[0].value, "FedAvg", both[1].value, interval=both[0][1:]))
  draw(figure, judged)
  return rows


def trained(kind: Kind, seed: int) -> tuple[Driver, float]:
  """Trains a policy; returns it as a driver, and the epsilon of its noise, 0 without any."""
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


def judge(name: str, drivers: Sequence[Driver]) -> Judged:
  """Drives every scenario with a driver per seed, each on episodes of its own."""
  found: Judged = {scenario: [] for scenario in SCENARIOS}
  for seed, driver in enumerate(drivers):
    for scenario in SCENARIOS:
      found[scenario] += judging.judge(driver, scenario, EPISODES, seed * EPISODES)
    print(f"{name}, seed {seed}: {share(found, [*SCENARIOS])}", flush=True)
  return found


def share(judged: Judged, names: Sequence[str]) -> judging.Interval:
  """The share of episodes of some scenarios that succeeded."""
  outcomes = judging.together(judged[name] for name in names)
  return judging.measures(outcomes)["success"]


def of_policy(name: str, judged: Judged, everyone: dict[str, Judged], note: str) -> Rows:
  """Collisions beside the planner's, and success beside pooled training's."""
  measures = lambda kind: judging.measures(judging.together(everyone[kind].values()))
  own, planner, pooled = measures(name), measures("planner"), measures("pooled")
  per = {s: {k: v.value for k, v in judging.measures(judged[s]).items()} for s in judged}
  per = {s: {k: v for k, v in found.items() if np.isfinite(v)} for s, found in per.items()}
  crashes = "collisions per 100 km"
  return [
    row(
      f"{name}{note}: {crashes}",
      own[crashes].value,
      "planner",
      planner[crashes].value,
      interval=own[crashes][1:],
      speed=own["speed"],
      headway=own["headway"],
      scenarios=per,
    ),
    row(
      f"{name}{note}: success",
      own["success"].value,
      "pooled",
      pooled["success"].value,
      interval=own["success"][1:],
    ),
  ]


def draw(figure: Any, judged: dict[str, Judged]) -> None:
  """Bars of collisions and success, with their intervals."""
  axes = figure.subplots(1, 2, sharey=True)
  for axis, what in zip(axes, ("collisions per 100 km", "success"), strict=True):
    for place, (name, found) in enumerate(judged.items()):
      value, low, high = judging.measures(judging.together(found.values()))[what]
      color = "C1" if name in EXPERTS else "gray" if name.endswith("alone") else "C0"
      axis.barh(place, value, color=color)
      axis.plot([low, high], [place, place], color="black", linewidth=1)
    axis.set(title=f"{what}, with 95% intervals")
  axes[0].set_yticks(range(len(judged)), [*judged], fontsize=7)
  axes[0].invert_yaxis()
