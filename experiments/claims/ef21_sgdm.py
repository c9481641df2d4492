"""With momentum, EF21 converges on stochastic gradients of a single example.

Paper: Fatkhullin, Tyurin, Richtarik 2023, Momentum provably improves error feedback,
arXiv:2305.15155, theorem 1 and figure 1 (EF21-SGD does not converge for any step size, while
EF21-SGDM does).

Same: ||x||^2 / 2 in two variables with noise that is uniform on sqrt(3/10) {(2, 0), (0, 1), (-2,
-1)}, Top-1, one worker, one example per step.

Scaled: the step sizes, the momentum and the starting point are our choice. The paper's theorem
gives a lower bound on the error of EF21-SGD. We run two step sizes and compare the squared gradient
norms in the second half of each run, when the distance to the starting point no longer matters.
EF21 starts from g = 0, not from the first gradient.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import calls

TITLE = "EF21 with single-example gradients stalls at every step size; momentum repairs it"
DATASET = ""
FULL = {
  "rate": 2e-4,
  "times": 5.0,  # ratio of the larger step size to `rate`
  "momentum": 0.97,
  "steps": 100_000,
  "ratio": 10.0,
  "remains": 0.5,  # share of the gradient norm at the smaller step size, EF21-SGD
  "falls": 0.5,  # the same, EF21-SGDM
}
QUICK = {"steps": 40_000}
SEEDS = {"full": 3, "quick": 1}
X64 = False

EF21, SGDM = "EF21-SGD", "EF21-SGDM"


def measure(lab: Lab) -> Findings:
  """Measures mean squared gradient norms with and without momentum, at two step sizes."""
  top_1 = calls.ef21(calls.gather_mean(calls.top_k(0.5)))
  methods = {EF21: top_1, SGDM: calls.worker_momentum(top_1, momentum=lab["momentum"])}
  rates = {"small": lab["rate"], "large": lab["times"] * lab["rate"]}
  level, lines = {}, []
  for size, rate in rates.items():
    for name, aggregator in methods.items():
      method = calls.data_parallel(calls.sgd(rate), aggregator)
      runs = [run(lab, method, seed) for seed in lab.seeds]
      squares = [found.column("gradient_norm") ** 2 for found in runs]
      level[name, size] = float(np.mean([one[len(one) // 2 :].mean() for one in squares]))
      lines.append(Line(f"{name}, step size {rate:g}", runs[0].column("step"), squares[0]))
  remains = lambda name: level[name, "small"] / level[name, "large"]
  return Findings(
    [
      *(
        Beside(f"{name}, step size {rates[size]:g}: mean squared gradient norm", value)
        for (name, size), value in level.items()
      ),
      Beside(f"{SGDM}: share that remains at the smaller step size", remains(SGDM)),
    ],
    [
      Gate(
        f"{EF21} over {SGDM}, step size {rates['small']:g}",
        level[EF21, "small"] / level[SGDM, "small"],
        ">=",
        lab["ratio"],
      ),
      Gate(
        f"{EF21}: share that remains at a smaller step size", remains(EF21), ">=", lab["remains"]
      ),
      Gate(f"{SGDM}: the same share", remains(SGDM), "<=", lab["falls"]),
    ],
    [Panel("Top-1 of two elements", "steps", "squared gradient norm", lines, y_scale="log")],
  )


def run(lab: Lab, method: object, seed: int) -> Found:
  """Runs one method on one worker with one example per step."""
  return lab.run(
    task="skewed_noise()",
    method=method,
    mesh="data:1",
    batch_size=1,
    steps=lab["steps"],
    eval_every=lab["steps"] // 400,
    steps_per_dispatch=lab["steps"] // 400,
    seed=seed,
    gradient=True,
  )
