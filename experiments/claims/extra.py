"""EXTRA and gradient tracking are exact with a constant step; decentralized descent is biased.

Papers: Shi, Ling, Wu, Yin 2015, EXTRA, arXiv:1404.6264; Nedic, Olshevsky, Shi 2017, DIGing
(gradient tracking), arXiv:1607.03218; Yuan, Ling, Yin 2016, arXiv:1310.7063, for the bias of
decentralized gradient descent (DGD).

Same: a strongly convex logistic problem partitioned over the nodes of a graph, full gradients, a
constant step size, symmetric weights (a ring of 10 workers with weights 1/3).

Scaled: nothing. We chose the data (mushrooms sorted by label, condition number 101). All methods
use the step size 1/(2 max L_i), which is below EXTRA's limit of 2/(3 max L_i) on this ring; the
theory of gradient tracking allows only far smaller steps. We reproduce the ordering, and the
straight lines of EXTRA and gradient tracking on a logarithmic axis.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from experiments.claims.support.optima import split_logistic
from research.core.spec import calls

TITLE = "EXTRA and gradient tracking are exact with a constant step, plain descent is not"
DATASET = "libsvm('mushrooms')"
FULL = {"workers": 10, "ratio": 100.0, "steps": 3000, "every": 50}
FULL |= {"extra": 1e-9, "tracking": 1e-3, "falls": 0.1, "biased": 1e-2}
QUICK = {"steps": 1000, "extra": 1e-3}
SEEDS = {"full": 1, "quick": 1}
X64 = True

METHODS = {
  "EXTRA": calls.extra,
  "gradient tracking": calls.gradient_tracking,
  "decentralized descent": calls.dgd,
}


def measure(lab: Lab) -> Findings:
  """Measures the mean squared distance of the workers' models to the optimum in each round."""
  train, workers = lab.task(model="logistic(bias=False)").train, lab["workers"]
  problem = split_logistic(train["x"], train["y"], workers, lab["ratio"])
  rate = float(1 / (2 * problem.parts.max()))

  def error(params, state):
    del params
    return {"error": problem.distance(np.asarray(state.method.params["kernel"])[:, :, 0])}

  lines, last, falls = [], dict[str, list[float]](), dict[str, float]()
  for name, method in METHODS.items():
    for seed in lab.seeds:
      found = lab.run(
        task=lab.data(l2=problem.l2),
        model="logistic(bias=False)",
        method=method(rate, calls.gossip(calls.ring())),
        partition="sorted()",
        mesh=f"data:{workers}",
        batch_size="all",
        steps=lab["steps"],
        eval_every=lab["every"],
        x64=True,
        seed=seed,
        watch=error,
      )
      errors = found.column("error")
      marker = "." if name == "EXTRA" else ""  # the line of gradient tracking covers this one
      lines.append(Line(name, found.column("step"), errors, marker))
      last.setdefault(name, []).append(float(errors[-1]))
      falls[name] = float(errors[-1] / errors[len(errors) // 2])
  tracking = "gradient tracking"
  return Findings(
    [Beside(f"{name}: squared error at the end", max(found)) for name, found in last.items()],
    [
      Gate("EXTRA: squared error", max(last["EXTRA"]), "<=", lab["extra"]),
      Gate(f"{tracking}: squared error", max(last[tracking]), "<=", lab["tracking"]),
      Gate(f"{tracking}: end over middle", falls[tracking], "<=", lab["falls"]),
      Gate(
        "decentralized descent: squared error",
        min(last["decentralized descent"]),
        ">=",
        lab["biased"],
      ),
    ],
    [
      Panel(
        f"a ring of {workers}, one constant step",
        "rounds",
        "relative squared distance to the optimum",
        lines,
        y_scale="log",
      )
    ],
    "Squared errors are of the distance of a worker's model to the optimum, relative to that of "
    "the start, in the mean over the workers.",
  )
