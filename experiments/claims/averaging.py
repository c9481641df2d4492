"""The mean of SGD's iterates is asymptotically optimal; its last iterate is not.

Paper: Polyak, Juditsky 1992, SIAM J. Control Optim. 30(4), theorem 1: with steps that decrease more
slowly than 1/t, the mean of t iterates has the covariance H^-1 S H^-1 / t.

Same: linear regression with one random example per step, step sizes .4 t^-.6, and the covariance
over replicas.

Scaled: five features, 10,000 steps, 2000 replicas of the ordinary `averaged` method under `vmap`.
The first tenth of the iterates is left out, and t counts the other iterates. This choice makes no
difference in the limit of many steps, to which the theorem applies. Our number is the ratio to the
theory's covariance, so the paper's number is 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from research.core import registry
from research.core.task import Task
from research.optim.transform import as_optax
from research.tasks import sampling

TITLE = "The mean of SGD's iterates has the least covariance that there can be"
DATASET = "least_squares(samples=4000, features=5, noise=1.0, condition=2.0)"
FULL = {
  "steps": 10_000,
  "replicas": 2000,
  "records": 50,
  "rate": 0.4,
  "power": 0.6,
  "burn_in": 0.1,
  "off_theory": 0.1,
  "last_over_mean": 3.0,
}
QUICK = {"steps": 4000, "replicas": 500, "off_theory": 0.2, "last_over_mean": 2.0}
SEEDS = {}  # the claim uses a single seed
X64 = False


def measure(lab: Lab) -> Findings:
  """Compares the covariance traces of the mean and of the last iterate, over replicas."""
  task, burn_in = lab.task(), round(lab["burn_in"] * lab["steps"])
  least = theory(task)
  steps, averaged, last = replicas(lab, task, burn_in)
  terms = steps - burn_in
  mean_ratio = averaged[-1] * terms[-1] / least
  last_ratio = last[-1] * terms[-1] / least
  after = terms > 0
  return Findings(
    [
      Beside("trace of the mean's covariance over the theory's", mean_ratio, 1.0),
      Beside("trace of the last iterate's over the theory's of the mean", last_ratio),
      Beside("last iterate's over the mean's", last[-1] / averaged[-1]),
    ],
    [
      Gate(
        "mean: relative difference from the theory",
        abs(mean_ratio - 1),
        "<=",
        lab["off_theory"],
        True,
      ),
      Gate("last over mean", last[-1] / averaged[-1], ">=", lab["last_over_mean"]),
    ],
    [
      Panel(
        f"Error over {lab['replicas']} replicas",
        "steps",
        "trace of the covariance",
        [
          Line("last iterate", steps, last),
          Line("mean of iterates", steps[after], averaged[after]),
          Line("theory: tr(H^-1 S H^-1) / t", steps[after], least / terms[after]),
        ],
        x_scale="log",
        y_scale="log",
      )
    ],
  )


def theory(task: Task) -> float:
  """Computes tr H^-1 S H^-1; S is the covariance of one example's gradient at the optimum."""
  x, y = (np.asarray(task.train[name], np.float64) for name in ("x", "y"))
  best = np.linalg.lstsq(x, y)[0]
  gradients = x * (x @ best - y)[:, None]
  inverse = np.linalg.inv(x.T @ x / len(x))
  return float(np.trace(inverse @ (gradients.T @ gradients / len(x)) @ inverse))


def replicas(lab: Lab, task: Task, burn_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns steps [T], and squared distances [T] from the optimum to mean and last iterate."""
  rate, power, size = lab["rate"], lab["power"], len(task.train["y"])
  data_parallel, averaged = (
    registry.lookup(("method",), name) for name in ("data_parallel", "averaged")
  )
  sgd = optax.sgd(lambda count: rate * (count + 1.0) ** -power)
  mean = registry.build("aggregator", "mean()")
  optimizer: Any = as_optax(averaged(data_parallel(sgd, mean), burn_in=burn_in))
  train, each = jax.device_put(task.train), lab["steps"] // lab["records"]

  def worker(key):
    def step(held, number):
      params, state = held
      index = sampling.with_replacement(size, number, key, batch_size=1)
      grads = jax.grad(task.loss)(params, task.batch(train, index), key)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    def some(held, number):
      held, _ = jax.lax.scan(step, held, number * each + jnp.arange(each))
      return held, (held[1].state.mean, held[1].state.inner.params)

    params = task.init(key)
    start = params, optimizer.init(params)
    return jax.lax.scan(some, start, jnp.arange(lab["records"]))[1]

  def replica(key):
    found = jax.vmap(worker, axis_name="data")(key[None])  # mean() over a single worker
    away = jax.tree.map(lambda x, best: x[0] - best, found, (task.optimum, task.optimum))
    squares = lambda tree: sum(jnp.sum(x**2, range(1, x.ndim)) for x in jax.tree.leaves(tree))
    return [squares(tree) for tree in away]

  keys = jax.random.split(jax.random.key(0), lab["replicas"])
  means, lasts = (np.mean(np.asarray(x, np.float64), 0) for x in jax.jit(jax.vmap(replica))(keys))
  return each * np.arange(1, lab["records"] + 1), means, lasts
