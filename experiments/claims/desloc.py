"""DES-LOC needs fewer exchanges of the second moment than Local Adam and ends as near the optimum.

Paper: Iacob, Sani, Safaryan, Giampouras, Horvath, Jovanovic, Kurmanji, Aleksandrov, Shen, Qiu, Lane
2025, DES-LOC, arXiv:2505.22549, figure 2: a toy problem on which averaged models converge only if
the moments are averaged too.

Same: Rosenbrock's function with noise of standard deviation 1.5 in each element of the gradient,
256 workers, models and first moments averaged every 192 steps, second moments every 192 (Local
Adam) or 692 (DES-LOC). All methods see the same noise. The paper's alternatives are moments that
stay private, and moments that are reset in each round; we add DiLoCo.

Scaled: nothing. We chose the decay rates, the learning rate, the start and the number of steps; the
half-life of the first moment equals the period of its average.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = (
  "Second moments need an average only once in three rounds; moments without one cost accuracy"
)
DATASET = "rosenbrock()"
FULL = {
  "workers": 256,
  "period": 192,
  "second": 692,  # period of the second moment
  "rounds": 60,
  "rate": 1e-2,
  "b1": 0.9964,  # half-life of 192 steps
  "b2": 0.999,  # half-life of 692 steps
  "apart": 0.1,  # relative
  "private": 2.0,
  "reset": 5.0,
  "methods": ["Local Adam", "DES-LOC", "private moments", "reset moments", "DiLoCo"],
}
QUICK = {"methods": ["Local Adam", "DES-LOC", "private moments", "reset moments"]}
SEEDS = {"full": 3, "quick": 1}
X64 = False


def measure(lab: Lab) -> Findings:
  """Measures the mean of f over the last quarter of the rounds, at the average of the models."""
  runs = {name: [run(lab, method_of(lab, name), s) for s in lab.seeds] for name in lab["methods"]}
  late = lab["rounds"] // 4
  value = {
    n: float(np.mean([f.column("train_loss")[-late:] for f in of])) for n, of in runs.items()
  }
  best = value["Local Adam"]
  sent = {name: of[0].bytes_per_step for name, of in runs.items()}
  return Findings(
    [
      Beside("DES-LOC: bytes over those of Local Adam", sent["DES-LOC"] / sent["Local Adam"]),
      *(Beside(f"{name}: f", f) for name, f in value.items()),
    ],
    [
      Gate(
        "DES-LOC: f over that of Local Adam, minus 1",
        abs(value["DES-LOC"] / best - 1),
        "<=",
        lab["apart"],
      ),
      Gate(
        "private moments: f over Local Adam's",
        value["private moments"] / best,
        ">=",
        lab["private"],
      ),
      Gate("reset moments: f over Local Adam's", value["reset moments"] / best, ">=", lab["reset"]),
    ],
    [
      Panel(
        title,
        x,
        "f at the mean of the models",
        [
          Line(n, f.column("step") * each(f), f.column("train_loss"))
          for n, of in runs.items()
          for f in of
        ],
        y_scale="log",
      )
      for title, x, each in (
        ("by steps", "steps of each worker", lambda f: 1.0),
        ("by traffic", "bytes sent by a worker", lambda f: f.bytes_per_step),
      )
    ],
  )


def method_of(lab: Lab, name: str) -> Call:
  """Returns the spec of a method of the comparison."""
  adam = calls.adam(lab["rate"], b1=lab["b1"], b2=lab["b2"])
  period = lab["period"]
  averaged = {"mu": period, "nu": period}
  several = {
    "Local Adam": averaged,
    "DES-LOC": averaged | {"nu": lab["second"]},
    "private moments": {},
  }
  if name in several:
    return calls.desloc(adam, calls.mean(), period=period, moments=several[name])
  if name == "reset moments":
    return calls.restarted(calls.local_sgd(adam, calls.mean(), period=period))
  outer = calls.sgd(0.7, momentum=0.9, nesterov=True)
  return calls.diloco(adam, outer, calls.mean(), period=period)


def run(lab: Lab, method: Call, seed: int) -> Found:
  """Runs a method and measures f after every round."""
  return lab.run(
    method=method,
    mesh=f"data:{lab['workers']}",
    batch_size=lab["workers"],
    steps=lab["period"] * lab["rounds"],
    eval_every=lab["period"],
    steps_per_dispatch=lab["period"],  # one length, compiled once
    on=("train",),
    seed=seed,
  )
