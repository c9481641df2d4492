"""EF21 converges linearly where error feedback stalls at a plateau.

Paper: Richtarik, Sokolov, Fatkhullin 2021, EF21, arXiv:2106.05203, figure 1.

Same: logistic loss with the penalty 0.1 sum x^2/(1 + x^2) on a9a over 20 workers in the order of
the file, Top-1, full gradients, a start from N(0, I), a step size that is a power of two times the
theory's 1/(L + Lt sqrt(beta/theta)), float64.

Scaled: 4000 steps, and the power 64 for both methods (with the power 1, the methods do not differ
  within 4000 steps). The figure gives no numbers, so we reproduce only the ordering. EF21
starts from g_i = 0, not from full gradients.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from experiments.claims.support.optima import curvature
from research.core.spec import calls

TITLE = "EF21 converges linearly where error feedback stalls"
DATASET = "libsvm('a9a')"
FULL = {"factor": 64.0, "steps": 4000, "workers": 20, "smallest": 1e-15, "apart": 1e6}
QUICK = {"steps": 1400, "smallest": 1e-9, "apart": 1e3}
SEEDS = {"full": 1, "quick": 1}
X64 = True

METHODS = {"EF21": calls.ef21, "error feedback": calls.error_feedback}


def measure(lab: Lab) -> Findings:
  """Measures the squared gradient norms of both methods over the steps, at one step size."""
  workers, model = lab["workers"], "logistic(bias=False, deviation=1.0)"
  x = lab.task(model=model).train["x"]
  rate = lab["factor"] * step_size(x, workers)
  top_1 = calls.gather_mean(calls.top_k(1 / x.shape[1]))
  lines, least = [], {}
  for name, aggregator in METHODS.items():
    for seed in lab.seeds:
      found = lab.run(
        task=lab.data(nonconvex=0.1, sparse=True),  # the rows are mostly zero
        model=model,
        method=calls.data_parallel(calls.sgd(rate), aggregator(top_1)),
        partition="in_order()",
        mesh=f"data:{workers}",
        batch_size="all",
        steps=lab["steps"],
        eval_every=50,
        x64=True,
        seed=seed,
        gradient=True,
      )
      squares = found.column("gradient_norm") ** 2
      lines.append(Line(name, found.column("step"), squares))
      least[name] = max(least.get(name, 0.0), float(np.fmin.reduce(squares)))
  apart = least["error feedback"] / least["EF21"]
  return Findings(
    [Beside(f"{name}: least squared norm of the gradient", least[name]) for name in METHODS],
    [
      Gate("EF21: least squared norm of the gradient", least["EF21"], "<=", lab["smallest"]),
      Gate("error feedback's over EF21's", apart, ">=", lab["apart"]),
    ],
    [
      Panel(
        f"Top-1, {workers} workers, {lab['factor']:g} times the step of the theory",
        "steps",
        "squared norm of the gradient",
        lines,
        y_scale="log",
      )
    ],
  )


def step_size(x: np.ndarray, workers: int) -> float:
  """Computes 1/(L + Lt sqrt(beta/theta)) for Top-1, by theorem 1 of the paper."""
  smoothness = lambda rows: float(curvature(rows)[-1]) / 4 + 0.2  # the penalty adds 2 * 0.1
  alpha = 1 / x.shape[1]  # contraction of Top-1
  theta = 1 - np.sqrt(1 - alpha)
  beta = (1 - alpha) / (1 - np.sqrt(1 - alpha))
  parts = [smoothness(rows) for rows in np.array_split(x, workers)]
  rate = 1 / (smoothness(x) + np.sqrt(np.mean(np.square(parts))) * np.sqrt(beta / theta))
  return float(rate)
