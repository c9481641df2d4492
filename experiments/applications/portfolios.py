"""Compares portfolios with published values and a linear program; `bench.py` runs this module."""

import time
from typing import Any

import numpy as np

from experiments.applications.measured import STEADY, Rows, row, run
from research.core.spec import Call, calls
from research.training.config import Config

DESCENT = calls.data_parallel(calls.sgd(1.0, momentum=0.9, nesterov=True), calls.mean())


def finance(figure: Any) -> Rows:
  """Compares frontiers with published frontiers, and the CVaR with a linear program's CVaR."""
  import resource

  from research.tasks.finance import cvar, frontier

  rows, axes = [], figure.subplots(1, 1)
  admm = calls.consensus_admm(1.0, calls.mean(), penalty=0.1, period=10)
  for name in ("port1", "port2", "port3"):
    market, task = frontier.load(name), calls.frontier(name, points=20)
    for method, count in ((DESCENT, 400), (admm, 3000)):
      flags_ = {"mesh": "data:8", "x64": True, "steps": count}
      found, _ = run(task, method, **flags_)
      what = f"{name}, {method.name}: largest relative gap of a variance"
      rows.append(row(what, found["eval"]["gap"], "wanted", 1e-5, seconds=found["seconds"]))
    axes.plot(market.variances, market.returns, label=f"{name}, as published")
    w = _weights(task, DESCENT, 400)
    axes.plot(np.sum(w @ market.covariance * w, 1), w @ market.means, "k.", ms=4)
  axes.set(xlabel="variance", ylabel="expected return", title="Frontiers; dots: ours")
  axes.legend()
  found, _ = run(calls.cvar(scenarios=2000), _descent(2000), mesh="data:8", steps=2000)
  days = cvar.load()
  x = days[np.random.default_rng(0).integers(len(days), size=2000)].astype(np.float32)
  best = linear_program(x, 0.95)
  rows.append(row("CVaR of 2000 scenarios, percent", found["train_loss"], "HiGHS", best))
  start = time.perf_counter()
  large = {"mesh": "data:2", "batch_size": 20_000, "partition": "sorted()", "executor": "spmd"}
  found, _ = run(calls.cvar(scenarios=10_000_000), _descent(1500), steps=1500, **large)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  seconds = time.perf_counter() - start
  what = "CVaR of 10^7 scenarios of 20 assets: seconds, all included"
  return [*rows, row(what, seconds, "wanted", 60, loss=found["train_loss"], peak_gib=peak)]


def linear_program(x: np.ndarray, level: float) -> float:
  """Computes the minimum CVaR in percent over weights on the simplex, for scenarios [S, n]."""
  from scipy import optimize

  count, assets = x.shape
  cost = np.concatenate([np.zeros(assets), [1], np.full(count, 1 / (count * (1 - level)))])
  above = np.hstack([-100 * x, -np.ones((count, 1)), -np.eye(count)])
  total = np.concatenate([np.ones(assets), np.zeros(count + 1)])[None]
  bounds = [(0, None)] * assets + [(None, None)] + [(0, None)] * count
  return optimize.linprog(cost, above, np.zeros(count), total, [1], bounds, method="highs").fun


def _descent(steps: int) -> Call:
  rate = calls.cosine_decay_schedule(0.003, steps)
  return calls.data_parallel(calls.sgd(rate, momentum=0.9), calls.mean())


def _weights(task: Call, method: Call, steps: int) -> np.ndarray:
  """Runs a method; returns the weights of the final portfolios, [points, n]."""
  import jax

  from research.training import assemble
  from research.training.loop import Run, events

  given: dict[str, Any] = STEADY | {"mesh": "data:8", "batch_size": "all", "steps": steps}
  config = Config(task=str(task), method=str(method), x64=True, **given)
  with jax.enable_x64(True):
    problem = assemble.assemble(config, assemble.check(config))
    run = Run(config, problem)
    for _ in events(run):
      pass
    return jax.device_get(run.params())["weights"]
