"""Gossip of compressed differences finds the exact mean; gossip of compressed values does not.

Paper: Koloskova, Stich, Jaggi 2019, CHOCO-SGD and CHOCO-Gossip, arXiv:1902.00340, figures 2 and 3.

Same: a ring of 25 workers with weights 1/3, vectors of length 2000, QSGD of 256 levels with a
consensus step of 1, Top-1% with a consensus step of .046, the baselines (Q1-G) and (Q2-G).

Scaled: the vectors are Gaussian, whereas the paper uses rows of the data set epsilon; Top-1% runs
20 times as many iterations as the others. The figures give no numbers, so we reproduce only the
ordering. We count the bytes of the payload, 10 bits per element for 256 levels and a sign, whereas
the paper counts 8 bits. We compute in float64, because in float32 rounding errors of the large
initial differences remain in the workers' estimates of each other.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = "Gossip of compressed differences finds the exact mean, that of compressed values does not"
DATASET = "mean_estimation(vectors=25, features=2000)"
FULL = {
  "iterations": 500,
  "levels": 256,
  "top_k": 0.01,
  "top_k_gamma": 0.046,
  "top_k_iterations": 10_000,
  "off_exact": 0.05,
  "stalled": 1e-2,
  "top_k_fallen": 1e-6,
}
QUICK = {"iterations": 300, "top_k_iterations": 500, "top_k_fallen": 0.5}
SEEDS = {}  # the claim uses a single seed
X64 = True
EXACT, CHOCO, TOP_K = "exact gossip", "CHOCO, 256 levels", "CHOCO, Top-1%"
NAIVE = "values, 256 levels (Q1)", "values, 256 levels (Q2)"


def measure(lab: Lab) -> Findings:
  """Measures the mean squared distance to the mean of all vectors, over iterations and bytes."""
  features = lab.task().train["x"].shape[1]
  coded, ring = calls.qsgd(lab["levels"], bucket=features), calls.ring()
  some, many = lab["iterations"], lab["top_k_iterations"]
  schemes = {
    EXACT: (calls.gossip(ring), some),
    CHOCO: (calls.choco(coded, ring, gamma=1.0), some),
    TOP_K: (calls.choco(calls.top_k(lab["top_k"]), ring, gamma=lab["top_k_gamma"]), many),
    NAIVE[0]: (calls.q1_gossip(coded, ring), some),
    NAIVE[1]: (calls.q2_gossip(coded, ring), some),
  }
  found = {name: gossiped(lab, *scheme) for name, scheme in schemes.items()}
  error = {name: run.column("error") for name, run in found.items()}
  bytes_to = {name: run.column("step") * run.bytes_per_step for name, run in found.items()}
  least = error[TOP_K][-1]
  besides = [Beside(f"{EXACT}: squared distance after {some} iterations", error[EXACT][-1])]
  besides += [Beside(f"{name}: the same", error[name][-1]) for name in (CHOCO, *NAIVE)]
  besides += [
    Beside(f"{TOP_K}: squared distance after {many} iterations", least),
    Beside(f"{TOP_K}: MB sent by a worker until then", bytes_to[TOP_K][-1] / 1e6),
    Beside(f"{EXACT}: MB until it is as near", first(bytes_to[EXACT], error[EXACT], least) / 1e6),
  ]
  off = abs(error[CHOCO][-1] / error[EXACT][-1] - 1)
  fallen = least / error[TOP_K][0]
  return Findings(
    besides,
    [
      Gate(f"{CHOCO}: relative difference from {EXACT}", off, "<=", lab["off_exact"], True),
      *(Gate(f"{n}: squared distance", error[n][-1], ">=", lab["stalled"], True) for n in NAIVE),
      Gate(f"{TOP_K}: last over first squared distance", fallen, "<=", lab["top_k_fallen"]),
    ],
    [
      Panel(title, x, "mean squared distance", lines, x_scale="log", y_scale="log")
      for title, x, lines in (
        (
          "How far workers are from the mean of all vectors",
          "iterations",
          [Line(name, run.column("step"), error[name]) for name, run in found.items()],
        ),
        (
          "The same over what was sent",
          "MB sent by each worker",
          [Line(name, bytes_to[name] / 1e6, error[name]) for name in found],
        ),
      )
    ],
    "Quantised values leave an error in each iteration that is as large as the values, and "
    "differences one that falls with them. Exact gossip sends float64 here, twice what float32 is.",
  )


def gossiped(lab: Lab, aggregator: Call, iterations: int) -> Found:
  """Runs gossip: each worker repeatedly averages its vector with its neighbours' vectors."""
  vectors = lab.task().train["x"]
  mean = vectors.mean(0, dtype=np.float64)

  def watch(params, state):
    del params
    away = np.asarray(state.method.params["x"], np.float64) - mean
    return {"error": float((away**2).sum(1).mean())}

  # one gradient step of size 1 moves a worker to its vector
  once = calls.sgd(calls.piecewise_constant_schedule(1.0, {1: 0.0}))
  return lab.run(
    method=calls.d_psgd(once, aggregator),
    partition="in_order()",
    mesh=f"data:{len(vectors)}",
    batch_size="all",
    steps=iterations,
    eval_every=iterations // 50,
    x64=True,
    watch=watch,
  )


def first(bytes_to: np.ndarray, errors: np.ndarray, error: float) -> float:
  """Returns the bytes after which the errors first fall to `error`; infinity if they never do."""
  return next((float(b) for b, e in zip(bytes_to, errors, strict=True) if e <= error), np.inf)
