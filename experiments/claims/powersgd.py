"""PowerSGD of rank 2 and 4 trains as well as SGD, and sends a fiftieth of the bytes.

Paper: Vogels, Karimireddy, Jaggi 2019, PowerSGD, arXiv:1905.13727, table 3 (accuracy and traffic by
rank) and the ablation of error feedback.

Same: rank-r factors from one warm-started step of power iteration, averaged by all-reduce; error
feedback on each worker; momentum 0.9 on the averaged gradient; the same decreasing learning rate
for all methods.

Scaled: four epochs of the 2NN on MNIST with eight workers, instead of ResNet18 on CIFAR-10 with
sixteen. We reproduce the ordering. The bytes are those of the traced program; vectors are sent
uncompressed.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = "PowerSGD trains like SGD on a fiftieth of its traffic, and not without error feedback"
DATASET = "mnist()"
FULL = {
  "methods": ["SGD", "rank 2", "rank 4", "rank 2 without error feedback"],
  "learning_rate": 0.05,
  "batch_size": 128,
  "steps": 1872,
  "evaluations": 6,
  "within_points": 0.5,
  "worse_points": 1.5,
  "times_fewer_bytes": 50.0,
}
QUICK = {
  "methods": ["SGD", "rank 2", "rank 2 without error feedback"],
  "steps": 120,
  "evaluations": 3,
  "within_points": 2.0,
}
SEEDS = {"full": 3, "quick": 1}
X64 = False

AGGREGATORS = {
  "SGD": calls.mean(),
  "rank 2": calls.error_feedback(calls.power_sgd(2)),
  "rank 4": calls.error_feedback(calls.power_sgd(4)),
  "rank 2 without error feedback": calls.power_sgd(2),
}


def measure(lab: Lab) -> Findings:
  """Measures the final test accuracy, as a mean over the seeds, and the bytes per step."""
  runs = {
    name: [_run(lab, AGGREGATORS[name], seed) for seed in lab.seeds] for name in lab["methods"]
  }
  percent = {name: _percent(found) for name, found in runs.items()}
  fewer = {n: runs["SGD"][0].bytes_per_step / f[0].bytes_per_step for n, f in runs.items()}
  lost = percent["SGD"] - percent["rank 2"]
  without = percent["SGD"] - percent["rank 2 without error feedback"]
  return Findings(
    [
      *[
        Beside(f"{name}: times fewer bytes than SGD", fewer[name])
        for name in ("rank 2", "rank 4")
        if name in fewer
      ],
      *[Beside(f"{name}: test accuracy, percent", v) for name, v in percent.items()],
    ],
    [
      Gate("rank 2: points of accuracy below SGD", lost, "<=", lab["within_points"], True),
      Gate("without error feedback: points below SGD", without, ">=", lab["worse_points"]),
      Gate("rank 2: times fewer bytes", fewer["rank 2"], ">=", lab["times_fewer_bytes"]),
    ],
    [
      Panel(
        title,
        x,
        "test accuracy",
        [
          Line(name, found.column("step") * per_step(found), found.column("accuracy"), "o")
          for name, of in runs.items()
          for found in of
        ],
        x_scale=scale,
      )
      for title, x, scale, per_step in (
        ("by steps they are alike", "steps", "linear", lambda found: 1.0),
        ("by bytes they are not", "MB sent per worker", "log", lambda f: f.bytes_per_step / 1e6),
      )
    ],
  )


def _percent(found: list[Found]) -> float:
  return float(100 * np.mean([f.last("accuracy") for f in found]))


def _run(lab: Lab, aggregator: Call, seed: int) -> Found:
  rate = calls.linear_schedule(lab["learning_rate"], 0.0, lab["steps"])
  return lab.run(
    model="mlp(hidden=[200, 200])",
    method=calls.data_parallel(calls.sgd(rate, momentum=0.9), aggregator),
    mesh="data:8",
    batch_size=lab["batch_size"],
    steps=lab["steps"],
    eval_every=lab["steps"] // lab["evaluations"],
    seed=seed,
  )
