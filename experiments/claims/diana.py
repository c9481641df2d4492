"""DIANA and MARINA converge linearly where compressed gradient descent stalls.

Papers: Mishchenko, Gorbunov, Takac, Richtarik 2019, DIANA, arXiv:1901.09269; Gorbunov, Burlachenko,
Li, Richtarik 2021, MARINA, arXiv:2102.07845. Compressed gradient descent (DCGD): Khirirat,
Feyzmahdavian, Johansson 2018, arXiv:1806.06573.

Same: a strongly convex logistic problem, workers with different data (mushrooms sorted by label, 10
workers), full gradients, k of d entries that each worker draws independently, and a constant step
size.

Scaled: one data set and one compressor (11 of 112 entries), condition number 101. Each method uses
the step size of its theory; none is tuned. We reproduce the ordering, and the straight lines of
DIANA and MARINA on a logarithmic axis.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from experiments.claims.support.optima import split_logistic
from research.core.spec import calls

TITLE = "DIANA and MARINA converge linearly where plain compression stalls"
DATASET = "libsvm('mushrooms')"
FULL = {"workers": 10, "fraction": 0.1, "ratio": 100.0, "steps": 12000, "every": 100}
FULL |= {"diana": 1e-10, "marina": 1e-14, "stalled": 1e-2}
QUICK = {"steps": 2000, "diana": 5e-3, "marina": 1e-3}
SEEDS = {"full": 1, "quick": 1}
X64 = True


def measure(lab: Lab) -> Findings:
  """Measures the squared distance to the optimum in each round, relative to the first round."""
  train = lab.task(model="logistic(bias=False)").train
  problem = split_logistic(train["x"], train["y"], lab["workers"], lab["ratio"])
  size = train["x"].shape[1]
  share = max(1, round(lab["fraction"] * size)) / size
  variance = 1 / share - 1  # omega, the variance of the compressor
  rates = steps_of_theory(problem.smoothness, problem.parts, variance, share)
  sent = calls.gather_mean(calls.seeded(calls.random_k(share, unbiased=True)))
  diana, marina, descent = rates
  methods = {
    "DIANA": calls.data_parallel(calls.sgd(diana), calls.diana(sent, alpha=1 / (1 + variance))),
    "MARINA": calls.marina(marina, sent, probability=share),
    "compressed descent": calls.data_parallel(calls.sgd(descent), sent),
  }

  def error(params, state):
    del state
    return {"error": problem.distance(np.asarray(params["kernel"]).T)}

  lines, last = [], dict[str, list[float]]()
  for name, method in methods.items():
    for seed in lab.seeds:
      found = lab.run(
        task=lab.data(l2=problem.l2),
        model="logistic(bias=False)",
        method=method,
        partition="sorted()",
        mesh=f"data:{lab['workers']}",
        batch_size="all",
        steps=lab["steps"],
        eval_every=lab["every"],
        x64=True,
        seed=seed,
        watch=error,
      )
      errors = found.column("error")
      lines.append(Line(name, found.column("step"), errors))
      # the final level of the method that stalls; the last value of methods that converge
      end = np.mean(errors[-len(errors) // 4 :]) if name == "compressed descent" else errors[-1]
      last.setdefault(name, []).append(float(end))
  return Findings(
    [Beside(f"{name}: squared error at the end", max(found)) for name, found in last.items()],
    [
      Gate("DIANA: squared error", max(last["DIANA"]), "<=", lab["diana"]),
      Gate("MARINA: squared error", max(last["MARINA"]), "<=", lab["marina"]),
      Gate(
        "compressed descent: squared error, mean of the last quarter",
        min(last["compressed descent"]),
        ">=",
        lab["stalled"],
      ),
    ],
    [
      Panel(
        f"{lab['workers']} workers, who send {share * size:g} of {size} entries",
        "rounds",
        "relative squared distance to the optimum",
        lines,
        y_scale="log",
      )
    ],
    "Squared errors are of the distance to the optimum, relative to that of the start; that of "
    "compressed descent is the mean over the last quarter of the rounds.",
  )


def steps_of_theory(
  smoothness: float, parts: np.ndarray, variance: float, probability: float
) -> tuple[float, float, float]:
  """Computes the step sizes of DIANA, MARINA and DCGD; `parts` contains the L_i.

  The step sizes are 1/(max L_i (1 + 6 w/n)); 1/(Lt (1 + sqrt(2 (1 - p) w/(p n)))), where Lt^2 is
  the mean of L_i^2; and 1/(L + 2 max L_i w/n).
  """
  noise = variance / len(parts)
  mean = np.sqrt(np.mean(parts**2))
  diana = 1 / (parts.max() * (1 + 6 * noise))
  marina = 1 / (mean * (1 + np.sqrt(2 * (1 - probability) / probability * noise)))
  return float(diana), float(marina), float(1 / (smoothness + 2 * parts.max() * noise))
