"""FedAvg needs about as many rounds to 97% as in the paper, with IID and with non-IID clients.

Paper: McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, arXiv:1602.05629, table 1: with E = 1,
B = 10, C = 0.1, the 2NN reaches 97% after 87 rounds with IID clients, and after 664 rounds with
non-IID clients.

Same: the 2NN of 199,210 parameters, 100 clients with 600 examples each, ten clients per round, one
pass in batches of 10; non-IID clients have two of 200 shards of the sorted examples; the best test
accuracy so far after every round, with the round of 97% by linear interpolation; the best learning
rate of a grid for each number.

Scaled: a grid of three learning rates instead of the paper's finer grid, and a single seed. Our
layers use He initialization.
"""

import math

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import calls

TITLE = "Federated averaging needs the paper's number of rounds to 97 percent on MNIST, or fewer"
DATASET = "mnist()"
FULL = {
  "target": 0.97,
  "learning_rates": [0.05, 0.1, 0.2],
  "rounds": [120, 500],
  "at_most": [87.0, 664.0],
  "ratio": [3.0, 15.0],
}
QUICK = {
  "target": 0.9,
  "learning_rates": [0.1],
  "rounds": [8, 50],
  "at_most": [5.0, 40.0],
  "ratio": [2.0, 30.0],
}
SEEDS = {"full": 1, "quick": 1}
X64 = False

PARTITIONS = {"like": "iid()", "unlike": "shards(2)"}
PAPER = {"like": 87.0, "unlike": 664.0}


def measure(lab: Lab) -> Findings:
  """Counts the rounds to the target at the best learning rate, for both kinds of clients."""
  best, lines = {}, {}
  for kind, most in zip(PARTITIONS, lab["rounds"], strict=True):
    curves = {
      rate: [_curve(_run(lab, kind, most, rate, seed)) for seed in lab.seeds]
      for rate in lab["learning_rates"]
    }
    score = lambda rate, curves=curves: _rounds(curves[rate], lab["target"])
    rate, scores = lab.tune(f"{kind} clients: learning rate, by rounds", curves, score)
    best[kind] = scores[rate]
    lines[kind] = [
      Line(f"learning rate {rate}", np.arange(1, len(curve)), curve[1:])
      for rate, of in curves.items()
      for curve in of
    ]
  paper = PAPER if lab["target"] == FULL["target"] else {}
  ratio = best["unlike"] / best["like"]
  of_paper = paper["unlike"] / paper["like"] if paper else None
  what = f"rounds to {lab['target']:.0%}"
  return Findings(
    [
      *[Beside(f"{what}, {kind} clients", best[kind], paper.get(kind)) for kind in PARTITIONS],
      Beside("times more of unlike clients", ratio, of_paper),
    ],
    [
      *[
        Gate(f"{what}, {kind} clients", best[kind], "<=", most)
        for kind, most in zip(PARTITIONS, lab["at_most"], strict=True)
      ],
      Gate("times more of unlike clients", ratio, ">=", lab["ratio"][0]),
      Gate("times more of unlike clients", ratio, "<=", lab["ratio"][1]),
    ],
    [
      Panel(
        f"{kind} clients" + (f" (the paper: {paper[kind]:g} rounds)" if paper else ""),
        "rounds",
        "best test accuracy so far",
        lines[kind],
        levels={f"{lab['target']:.0%}": lab["target"]},
      )
      for kind in PARTITIONS
    ],
  )


def _run(lab: Lab, kind: str, rounds: int, rate: float, seed: int) -> Found:
  return lab.run(
    until=lambda row: row["accuracy"] >= lab["target"],
    model="mlp(hidden=[200, 200])",
    method=calls.fed_avg(calls.sgd(rate), calls.mean(), epochs=1),
    population=100,
    mesh="data:10",
    partition=PARTITIONS[kind],
    batch_size=100,
    rounds=rounds,
    eval_every=1,
    seed=seed,
  )


def _curve(found: Found) -> np.ndarray:
  """Returns the best accuracy so far after 0, 1, ... rounds; the first value is 0."""
  return np.maximum.accumulate([0.0, *found.column("accuracy")])


def _rounds(curves: list[np.ndarray], target: float) -> float:
  return float(np.mean([crossing(curve, target) for curve in curves]))


def crossing(curve: np.ndarray, target: float) -> float:
  """Returns the interpolated point where a rising curve first reaches a level, or infinity."""
  if not curve[-1] >= target:
    return math.inf
  after = int(np.argmax(curve >= target))
  below, above = curve[after - 1], curve[after]
  return after - 1 + (target - below) / (above - below)
