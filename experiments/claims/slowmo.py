"""Slow momentum improves Local SGD.

Paper: Wang, Tantia, Ballas, Rabbat 2020, SlowMo, arXiv:1910.00643, table 1 (CIFAR-10, Local SGD
with tau = 12: 91.73% without slow momentum, 93.20% with slow momentum).

Same: tau = 12 local steps with Nesterov momentum 0.9, slow momentum 0.7 with alpha = 1; the
learning rates of both methods are tuned on the same grid. Both methods reset the workers' momenta
in every round, which is the first of the paper's three options.

Scaled: a perceptron of 64 hidden units on MNIST, 120 rounds, eight workers with an eighth of the
sorted examples each. These heterogeneous data replace the long training after which the two methods
differ on CIFAR-10. We reproduce the ordering.
"""

from collections.abc import Callable

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = "Slow momentum of the common model lifts Local SGD above its own best"
DATASET = "mnist()"
FULL = {
  "rounds": 120,
  "period": 12,
  "batch_size": 256,
  "learning_rates": [0.025, 0.05, 0.1, 0.15, 0.2],
  "evaluations": 12,
  "apart": 0.01,  # percent: one of 10,000 examples
}
QUICK = {"rounds": 20, "learning_rates": [0.1], "evaluations": 2, "apart": 2.0}
SEEDS = {"full": 3, "quick": 1}
X64 = False

PAPER_GAIN = 93.20 - 91.73
METHODS = {
  "Local SGD": lambda inner, period: calls.local_sgd(inner, calls.mean(), period=period),
  "SlowMo": lambda inner, period: calls.slow_mo(
    inner, calls.mean(), period=period, slow_momentum=0.7
  ),
}


def measure(lab: Lab) -> Findings:
  """Measures each method's test accuracy in percent, at the best learning rate for seed 0."""
  runs, percent, rates, grids = {}, {}, {}, {}
  for name, method in METHODS.items():
    tried = {rate: _run(lab, method, rate, 0) for rate in lab["learning_rates"]}
    score = lambda rate, tried=tried: -tried[rate].last("accuracy")
    rates[name], scores = lab.tune(f"{name}: learning rate, by - test accuracy", tried, score)
    grids[name] = Line(name, list(scores), [-value for value in scores.values()], "o")
    more = [_run(lab, method, rates[name], seed) for seed in lab.seeds if seed > 0]
    runs[name] = [tried[rates[name]], *more]
    percent[name] = 100 * np.array([found.last("accuracy") for found in runs[name]])
  gain = percent["SlowMo"].mean() - percent["Local SGD"].mean()
  apart = percent["SlowMo"].min() - percent["Local SGD"].max()
  return Findings(
    [
      Beside("points of accuracy that slow momentum adds", float(gain), PAPER_GAIN),
      *[Beside(f"{n}: test accuracy, percent", float(v.mean())) for n, v in percent.items()],
      *[Beside(f"{n}: learning rate", rate) for n, rate in rates.items()],
    ],
    [Gate("SlowMo's worst seed less Local SGD's best, points", apart, ">=", lab["apart"])],
    [
      Panel(
        f"{lab['period']} local steps per round, sorted data",
        "steps",
        "test accuracy",
        [
          Line(f"{name}, learning rate {rates[name]}", f.column("step"), f.column("accuracy"), "o")
          for name, found in runs.items()
          for f in found
        ],
      ),
      Panel(
        f"after {lab['rounds']} rounds, seed 0",
        "learning rate",
        "test accuracy",
        list(grids.values()),
      ),
    ],
  )


def _run(lab: Lab, method: Callable[..., Call], rate: float, seed: int) -> Found:
  inner = calls.sgd(rate, momentum=0.9, nesterov=True)
  return lab.run(
    model="mlp(hidden=[64])",
    method=calls.restarted(method(inner, lab["period"])),
    partition="sorted()",
    mesh="data:8",
    batch_size=lab["batch_size"],
    rounds=lab["rounds"],
    eval_every=lab["rounds"] // lab["evaluations"] * lab["period"],
    seed=seed,
  )
