"""Lock-free updates cost almost nothing if examples share few features.

Paper: Recht, Re, Wright, Niu 2011, Hogwild, arXiv:1106.5730; inconsistent reads as in Mania et al.
2015, arXiv:1507.06970.

Same: stochastic gradient steps of one example each, computed at an old model and added to the
current model.

Scaled: the delays of up to 16 processors are drawn uniformly from [0, 16) updates, for the full
model or for each coordinate separately, so that a run is reproducible. We chose the problems: w8a
is sparse, and odd against even digits of MNIST is dense, with the learning rate rescaled to the row
norms of w8a. We reproduce the ordering. The cost of old models grows with the learning rate, and
appears first on dense data. On dense data, the cost depends on the product of the learning rate,
the bound on the delay and the overlap of two rows. We therefore gate the cost on dense data at the
larger of our learning rates. In addition, the cost must grow faster than the learning rate, and at
the smaller rate it must still be at least ten times the largest change on sparse data.
"""

from typing import Any

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from research.core.spec import calls

TITLE = "Lock-free SGD is as good as serial SGD where examples share few features"
DATASET = "libsvm('w8a')"
FULL = {"dense": "mnist(parity=True)", "rates": [0.1, 0.2], "bound": 16, "epochs": 2.0}
FULL |= {"kinds": ["old models", "old coordinates"], "sparse_change": 0.01, "dense_change": 0.02}
QUICK = {"rates": [0.5], "epochs": 0.25, "kinds": ["old models"]}
SEEDS = {"full": 3, "quick": 1}
X64 = False

MODEL = "logistic(bias=False)"
NOTE = (
  "A change of 0.01 is a training loss 1% above the serial one: the mean over the evaluations of "
  "the second half of a run, or the last of them, which on MNIST moves by more than the effect. "
  "What old models cost there grows faster than the rate. "
  "What decides is how much rows overlap, not how many zeros they have: in rotated coordinates the "
  "rows of w8a are dense, and SGD with old models does the same."
)


def measure(lab: Lab) -> Findings:
  """Measures training losses with old models, relative to the losses with current models."""
  rows = {task: floats(lab, task) for task in (lab.dataset, lab["dense"])}
  # from w = 0 on, SGD on x with the rate eta equals SGD on x/c with the rate eta c^2
  scale = (mean_norm(rows[lab.dataset]) / mean_norm(rows[lab["dense"]])) ** 2
  besides, panels, sparse, dense = [], [], list[float](), list[float]()
  for task, x in rows.items():
    for rate in lab["rates"]:
      own = rate if task == lab.dataset else rate * scale
      halves, ends, lines = trained(lab, task, own, len(x))
      for name in lab["kinds"]:
        change, at_end = (loss[name] / loss["serial"] - 1 for loss in (halves, ends))
        about = f"{task}, rate {rate:g}, {name}: change of the loss"
        besides += [Beside(about, change.mean()), Beside(f"{about} at the end", at_end.mean())]
        if task == lab.dataset:
          sparse += [*change, *at_end]
        elif name == "old models":
          dense.append(float(change.mean()))
    panels.append(Panel(f"{task}, rate {rate:g}", "updates", "training loss", lines))
  besides += [Beside(f"{task}: mean cosine of two rows", overlap(x)) for task, x in rows.items()]
  return Findings(besides, gates_of(lab, sparse, dense), panels, NOTE)


def gates_of(lab: Lab, sparse: list[float], dense: list[float]) -> list[Gate]:
  """Returns the gates on the changes of the loss that old models cause.

  Args:
    lab: the settings; the rates increase.
    sparse: all changes on sparse data.
    dense: the mean change on dense data at each rate.
  """
  what = f"dense, rate {lab['rates'][-1]:g}: mean change of the loss with old models"
  gates = [
    Gate("sparse: largest change of a loss", max(sparse), "<=", lab["sparse_change"]),
    Gate(what, dense[-1], ">=", lab["dense_change"]),
  ]
  if len(dense) > 1:
    growth = (dense[-1] / dense[0]) / (lab["rates"][-1] / lab["rates"][0])
    over = dense[0] / max(map(abs, sparse))
    first = f"dense, rate {lab['rates'][0]:g}"
    gates += [
      Gate("dense: growth of that change over the growth of the rate", growth, ">=", 1.0),
      Gate(f"{first}: that change over the largest on sparse data", over, ">=", 10.0),
    ]
  return gates


def trained(
  lab: Lab, task: str, rate: float, examples: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[Line]]:
  """Returns each seed's mean training loss over the second half, final loss, and loss curve."""
  serial, bound = calls.data_parallel(calls.sgd(rate), calls.mean()), lab["bound"]
  methods = {
    "serial": serial,
    "old models": calls.delayed(serial, calls.uniform(bound)),
    "old coordinates": calls.hogwild(rate, calls.mean(), bound=bound),
  }
  steps = round(lab["epochs"] * examples)
  halves, ends, lines = {}, {}, []
  for name in ("serial", *lab["kinds"]):
    for seed in lab.seeds:
      found = lab.run(
        task=task,
        model=MODEL,
        method=methods[name],
        mesh="data:1",
        batch_size=1,
        steps=steps,
        eval_every=steps // 20,
        steps_per_dispatch=steps,
        seed=seed,
        on=("train",),
      )
      measured = found.column("train_loss")
      halves.setdefault(name, []).append(measured[len(measured) // 2 :].mean())
      ends.setdefault(name, []).append(measured[-1])
      lines.append(Line(name, found.column("step"), measured))
  arrays = lambda found: {name: np.array(values) for name, values in found.items()}
  return arrays(halves), arrays(ends), lines


def floats(lab: Lab, task: str) -> np.ndarray:
  """Returns the rows of a task, with pixels scaled to [0, 1]."""
  x: Any = lab.task(task=task, model=MODEL).train["x"]
  return x.reshape(len(x), -1) / np.float32(255 if x.dtype == np.uint8 else 1)


def mean_norm(rows: np.ndarray) -> float:
  """Computes the mean of |x_i|."""
  return float(np.mean(np.linalg.norm(rows, axis=1)))


def overlap(rows: np.ndarray) -> float:
  """Computes the mean of x_i x_j / (|x_i| |x_j|) over all pairs."""
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  directions = rows / np.where(norms > 0, norms, 1)
  return float(np.sum(directions.mean(0) ** 2))
