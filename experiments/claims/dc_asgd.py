"""Delay compensation helps asynchronous SGD at step sizes that are too large for stale gradients.

Paper: Zheng, Meng, Wang, Chen, Yu, Ma, Liu 2017, DC-ASGD, arXiv:1609.08326, errors on CIFAR-10.

Same: gradients at an old model, with and without the correction lambda g^2 (x_t - x_{t - tau}),
lambda adapted by the mean square (DC-ASGD-a), lambda_0 = 2; the same learning rate for both.

Scaled: a perceptron of 64 hidden units on MNIST, gradients that are 8 steps old, and 1500 steps;
the paper trains ResNet20 on four workers until convergence. We reproduce only the ordering, at a
step size that is too large for stale gradients. The table also shows that the two methods are
almost equal if each has its own best step size.
"""

from collections.abc import Callable

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = "Compensating for delay lowers the loss of asynchronous SGD where its step is too large"
DATASET = "mnist()"
FULL = {
  "large": 0.125,
  "small": 0.075,
  "delay": 8,
  "lambda": 2.0,
  "batch_size": 64,
  "steps": 1500,
  "evaluations": 10,
  "lower_by": 0.15,
  "worst_ratio": 1.0,
}
QUICK = {"steps": 300, "evaluations": 3, "lower_by": 0.05}
SEEDS = {"full": 6, "quick": 1}
X64 = False

METHODS = {
  "asynchronous": lambda rate, delay, lam: calls.delayed(
    calls.data_parallel(calls.sgd(rate), calls.mean()), calls.constant(delay)
  ),
  "compensated": lambda rate, delay, lam: calls.dc_asgd(
    rate, calls.mean(), calls.constant(delay), lam=lam
  ),
}


def measure(lab: Lab) -> Findings:
  """Measures the final training loss and test accuracy, as means over the seeds."""
  rates = [lab["large"], lab["small"]]
  runs = {
    (rate, name): [_run(lab, method, rate, seed) for seed in lab.seeds]
    for rate in rates
    for name, method in METHODS.items()
  }
  loss = {key: np.array([f.last("train_loss") for f in found]) for key, found in runs.items()}
  percent = {k: 100 * np.mean([f.last("accuracy") for f in found]) for k, found in runs.items()}
  ratios = loss[lab["large"], "compensated"] / loss[lab["large"], "asynchronous"]
  means = {key: float(values.mean()) for key, values in loss.items()}
  mean = means[lab["large"], "compensated"] / means[lab["large"], "asynchronous"]
  shown = lambda key: f"learning rate {key[0]}, {key[1]}"
  return Findings(
    [
      Beside(f"learning rate {lab['large']}: training loss, compensated over asynchronous", mean),
      *[Beside(f"{shown(key)}: training loss", value) for key, value in means.items()],
      *[Beside(f"{shown(key)}: test accuracy, percent", float(v)) for key, v in percent.items()],
    ],
    [
      Gate("large step: compensated over asynchronous loss", mean, "<=", 1 - lab["lower_by"]),
      Gate("large step: the same of the worst seed", ratios.max(), "<=", lab["worst_ratio"]),
    ],
    [
      Panel(
        f"learning rate {rate}, gradients {lab['delay']} steps old",
        "steps",
        "loss over the training set",
        [
          Line(name, found.column("step"), found.column("train_loss"))
          for name in METHODS
          for found in runs[rate, name]
        ],
        y_scale="log",
      )
      for rate in rates
    ],
  )


def _run(lab: Lab, method: Callable[..., Call], rate: float, seed: int) -> Found:
  return lab.run(
    on=("train", "test"),
    model="mlp(hidden=[64])",
    method=method(rate, lab["delay"], lab["lambda"]),
    mesh="data:1",
    batch_size=lab["batch_size"],
    steps=lab["steps"],
    eval_every=lab["steps"] // lab["evaluations"],
    seed=seed,
  )
