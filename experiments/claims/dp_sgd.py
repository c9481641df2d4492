"""A network reaches 94% on MNIST while revealing almost nothing about any single example.

Paper: Abadi et al. 2016, DP-SGD, arXiv:1607.00133, algorithm 1. The numbers are those of TensorFlow
Privacy's tutorial for MNIST (rate 0.25, noise 1.3, clip 1.5, 256 examples in a batch, 15 epochs,
delta 1e-5: epsilon 1.19, accuracy 95.0%).

Same: the tutorial's network, noise, clip and rate, and on average 256 of 60,000 examples per batch.
Every example is a client with a separate worker, so every example's gradient is clipped separately.
Examples are sampled independently, as the accountant assumes, whereas the tutorial shuffles.

Scaled: we train for 8 of the 15 epochs, since each of 400 worker slots draws noise and computes a
gradient, even without a client; the privacy loss is computed for all 15 epochs. The tutorial's
epsilon uses an older conversion of Renyi divergences; the table also shows today's conversion and
privacy loss distributions.
"""

import math

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from research.aggregate.privacy import accounting
from research.core.spec import calls

TITLE = "Differentially private SGD learns MNIST to 94% at an epsilon of about one"
DATASET = "mnist()"
FULL = {
  "steps": 1872,
  "counted": 3515,
  "rate": 0.25,
  "noise": 1.3,
  "clip": 1.5,
  "batch": 256,
  "delta": 1e-5,
  "model": "cnn([16, 32], 32, kernels=[8, 4], strides=[2, 2], padding=['SAME', 'VALID'], "
  "pool_stride=1)",
  "accuracy": 0.94,
  "epsilon": 1.19,
  "within": 0.02,
}
QUICK = {"steps": 30, "model": "logistic()", "accuracy": 0.6}
SEEDS = {"full": 1, "quick": 1}
X64 = False

CONVERSIONS = {
  "rdp_old": "older conversion",
  "rdp": "today's conversion",
  "pld": "loss distribution",
}


def measure(lab: Lab) -> Findings:
  """Measures the accuracy over the epochs, and the privacy that the epochs spend."""
  examples = len(lab.task().train["y"])
  share, places = lab["batch"] / examples, places_for(lab["batch"], examples)
  # our mean is over all slots; the tutorial's mean is over the expected batch size
  sgd = calls.sgd(lab["rate"] * places / lab["batch"])
  noisy = calls.noisy(calls.mean(), clip=lab["clip"], noise=lab["noise"])
  found = [
    lab.run(
      model=lab["model"],
      method=calls.data_parallel(sgd, noisy),
      partition="in_order()",
      mesh=f"data:{places}",
      batch_size=places,
      population=examples,
      sampling_rate=share,
      steps=lab["steps"],
      eval_every=max(1, lab["steps"] // 10),
      steps_per_dispatch=lab["steps"],
      seed=seed,
    )
    for seed in lab.seeds
  ]
  spent = lambda steps, how: accounting.epsilon(lab["noise"], share, steps, lab["delta"], how)
  whole = {how: spent(lab["counted"], how) for how in CONVERSIONS}
  run = {how: spent(lab["steps"], how) for how in CONVERSIONS}
  least = min(of.last("accuracy") for of in found)
  counts = [round(lab["counted"] * i / 4) for i in range(1, 5)]
  off = abs(whole["rdp_old"] / lab["epsilon"] - 1)
  return Findings(
    [Beside(f"accuracy after {lab['steps']} steps", least, 0.95)]
    + [
      Beside(
        f"epsilon of {lab['counted']} steps, {name}",
        whole[how],
        lab["epsilon"] if how == "rdp_old" else None,
      )
      for how, name in CONVERSIONS.items()
    ]
    + [
      Beside(f"epsilon of {lab['steps']} steps, {name}", run[how])
      for how, name in CONVERSIONS.items()
    ],
    [
      Gate("accuracy, worst seed", least, ">=", lab["accuracy"]),
      Gate("epsilon by the older conversion: relative error", off, "<=", lab["within"]),
    ],
    [
      Panel(
        "on test examples",
        "epochs",
        "accuracy",
        [
          Line("noise 1.3, clip 1.5", of.column("step") * share, of.column("accuracy"), "o")
          for of in found
        ],
        levels={"tutorial, 15 epochs": 0.95},
      ),
      Panel(
        f"privacy spent at delta {lab['delta']:g}",
        "epochs",
        "epsilon",
        [
          Line(name, [steps * share for steps in counts], [spent(n, how) for n in counts], "o")
          for how, name in CONVERSIONS.items()
        ],
        levels={"tutorial, 15 epochs": lab["epsilon"]},
      ),
    ],
  )


def places_for(batch: int, examples: int) -> int:
  """Returns the least even divisor of the examples that a Poisson batch almost never exceeds."""
  most = min(examples, math.ceil(batch + 6 * math.sqrt(batch) + 6))
  return next(
    n for n in range(most, examples + 1) if (examples % n == 0 and n % 2 == 0) or n == examples
  )
