"""Local SGD needs no more steps than mini-batch SGD, and communicates only every H steps.

Paper: Stich 2019, Local SGD converges fast and communicates little, arXiv:1805.09767, section 4:
logistic regression on w8a with lambda = 1/n, steps until f is within .005 of its minimum.

Same: w8a, lambda = 1/n, 16 workers with batches of 16, the accuracy .005, H up to 64.

Scaled: constant step sizes, and one data order. Steps are counted in multiples of 64. The gates use
the step size 8 for all H. With larger step sizes, which are best for H = 1, the claim reaches its
limit: the workers' models drift too far apart within H steps. We reproduce the ordering.
"""

import math

from experiments.claims.support import optima
from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import calls, parse

TITLE = "Local SGD takes as many steps as mini-batch SGD, and communicates in few of them"
DATASET = "libsvm('w8a')"
FULL = {
  "workers": 16,
  "batch": 16,
  "near": 0.005,
  "rates": [8.0, 16.0, 32.0],  # gates apply to the first rate
  "periods": [1, 4, 16, 64],
  "steps": 2048,
  "more_steps": 1.3,
}
QUICK = {"near": 0.02, "rates": [8.0], "periods": [1, 16], "steps": 512, "more_steps": 1.5}
SEEDS = {"full": 1, "quick": 1}
X64 = False


def measure(lab: Lab) -> Findings:
  """Counts the steps to the accuracy for each H and step size; the slowest seed counts."""
  train = lab.task(model="logistic(bias=False)").train
  l2 = parse(lab.dataset).kwargs.get("l2", 1 / len(train["y"]))
  least = optima.optimum_of_logistic(train["x"], train["y"], l2).value
  rates, periods = lab["rates"], lab["periods"]
  grid = [(rate, period) for rate in rates for period in periods]
  runs = {(r, p): [trained(lab, l2, p, r, seed) for seed in lab.seeds] for r, p in grid}
  near = lambda loss: loss - least <= lab["near"]
  took = {at: max(run.first("train_loss", near) for run in of) for at, of in runs.items()}
  best = {
    p: lab.tune(f"step size at H={p}", rates, lambda rate, p=p: took[rate, p])[0] for p in periods
  }
  rate, last = rates[0], periods[-1]
  shown = lambda p: f"H={p}: steps, at step size {rate:g}"
  return Findings(
    [
      Beside(f"steps of H={last} over those of H=1", took[rate, last] / took[rate, 1]),
      *(Beside(shown(p), took[rate, p]) for p in periods),
      Beside(f"H={last}: exchanges until then", took[rate, last] / last),
      *(Beside(f"H={p}: steps at its best step size, {r:g}", took[r, p]) for p, r in best.items()),
      *(
        Beside(f"H={p}: steps, at step size {r:g}", took[r, p])
        for r, p in grid
        if r != rate and math.isfinite(took[r, p])
      ),
    ],
    [
      Gate(
        f"steps of H={last} over those of H=1",
        took[rate, last] / took[rate, 1],
        "<=",
        lab["more_steps"],
      )
    ],
    [
      Panel(
        f"Step size {rate:g}: by steps",
        "steps of each worker",
        "objective above its least value",
        [line(p, run, least) for p in periods for run in runs[rate, p]],
        y_scale="log",
        levels={"to reach": lab["near"]},
      ),
      Panel(
        f"Step size {rate:g}: by exchanges",
        "exchanges",
        "objective above its least value",
        [line(p, run, least, p) for p in periods for run in runs[rate, p]],
        x_scale="log",
        y_scale="log",
        levels={"to reach": lab["near"]},
      ),
      Panel(
        f"Steps to {lab['near']:g} above; no point: not in {lab['steps']}",
        "H, steps between exchanges",
        "steps of each worker",
        [Line(f"step size {r:g}", periods, [took[r, p] for p in periods], "o") for r in rates],
        x_scale="log",
        y_scale="log",
      ),
    ],
    "At one step size H changes little. At their best step sizes they differ: that of H=1 is more "
    "than many local steps bear.",
  )


def trained(lab: Lab, l2: float, period: int, rate: float, seed: int) -> Found:
  """Runs local SGD with H equal to `period`."""
  return lab.run(
    task=lab.data(l2=l2),
    model="logistic(bias=False)",
    method=calls.local_sgd(calls.sgd(rate), calls.mean(), period=period),
    mesh=f"data:{lab['workers']}",
    batch_size=lab["workers"] * lab["batch"],
    steps=lab["steps"],
    eval_every=64,
    on=("train",),
    seed=seed,
  )


def line(period: int, found: Found, least: float, each: int = 1) -> Line:
  """Returns the curve of the objective minus its minimum, over units of `each` steps."""
  return Line(f"H={period}", found.column("step") / each, found.column("train_loss") - least)
