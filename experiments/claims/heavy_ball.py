"""Heavy ball contracts by (sqrt k - 1)/(sqrt k + 1); gradient descent contracts by (k - 1)/(k + 1).

Paper: Polyak 1964, Some methods of speeding up the convergence of iteration methods, USSR
Computational Mathematics and Mathematical Physics 4(5).

Same: a strongly convex quadratic with condition number k, and each method's best constants: the
step size 4/(sqrt L + sqrt mu)^2 with the momentum ((sqrt k - 1)/(sqrt k + 1))^2 for heavy ball, and
the step size 2/(L + mu) for gradient descent.

Scaled: nothing. Our quadratic is ridge regression on the labels of a9a with mu = L/k, and the
paper's numbers are its rates at this k. The fitted rates are slightly larger, since the largest
error component of heavy ball decreases like t q^t.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from experiments.claims.support.optima import curvature, optimum_of_squares
from research.core.spec import calls

TITLE = "Momentum replaces the condition number by its square root"
DATASET = "libsvm('a9a')"
FULL = {"condition": 1001.0, "steps": 450, "descent_steps": 9000, "every": 10, "tolerance": 1e-8}
FULL |= {"rate": 0.95, "faster": 10.0}
QUICK = {"descent_steps": 4000, "every": 25}
SEEDS = {"full": 1, "quick": 1}
X64 = True


def measure(lab: Lab) -> Findings:
  """Measures the distance to the optimum over the steps, and the slope of its logarithm."""
  x, y = (lab.task(task=lab.data(loss="squares"), model="linear()").train[name] for name in "xy")
  top = float(curvature(x)[-1])
  mu = top / (lab["condition"] - 1)
  optimum = optimum_of_squares(x, y, mu).at
  large, root = top + mu, np.sqrt(lab["condition"])
  rate = float(4 / (np.sqrt(top + mu) + np.sqrt(mu)) ** 2)
  theory = {
    "heavy ball": float((root - 1) / (root + 1)),
    "gradient descent": (lab["condition"] - 1) / (lab["condition"] + 1),
  }
  plans = {
    "heavy ball": (calls.sgd(rate, momentum=theory["heavy ball"] ** 2), lab["steps"]),
    "gradient descent": (calls.sgd(2 / (large + mu)), lab["descent_steps"]),
  }

  def distance(params, state):
    del state
    return {"distance": np.linalg.norm(params["kernel"][:, 0] - optimum) / np.linalg.norm(optimum)}

  lines, rates, taken = [], dict.fromkeys(plans, 0.0), dict.fromkeys(plans, 0.0)
  for name, (optimizer, steps) in plans.items():
    for seed in lab.seeds:
      found = lab.run(
        task=lab.data(loss="squares", l2=mu, sparse=True),
        model="linear()",
        method=calls.data_parallel(optimizer, calls.mean()),
        batch_size="all",
        steps=steps,
        eval_every=lab["every"],
        x64=True,
        seed=seed,
        watch=distance,
      )
      at, distances = found.column("step"), found.column("distance")
      lines.append(Line(name, at, distances))
      before = np.isfinite(distances) & (distances > lab["tolerance"])
      slope = np.polyfit(at[before], np.log(distances[before]), 1)[0]
      rates[name] = max(rates[name], float(np.exp(slope)))
      reached = found.first("distance", lambda d: d <= lab["tolerance"])
      taken[name] = max(taken[name], min(reached, steps))
  faster = taken["gradient descent"] / taken["heavy ball"]
  return Findings(
    [
      Beside(f"{name}: factor of the distance per step", rates[name], theory[name])
      for name in plans
    ]
    + [Beside(f"{name}: steps to {lab['tolerance']:g}", taken[name]) for name in plans],
    [
      Gate(
        "heavy ball: factor of the distance per step",
        rates["heavy ball"],
        "<=",
        lab["rate"],
        anywhere=True,
      ),
      Gate(
        "gradient descent's steps over heavy ball's", faster, ">=", lab["faster"], anywhere=True
      ),
    ],
    [
      Panel(
        f"ridge regression, condition {lab['condition']:g}",
        "steps",
        "relative distance to the optimum",
        lines,
        y_scale="log",
      )
    ],
    f"Where {lab['tolerance']:g} is not reached, the number of steps is that of the whole run.",
  )
