"""Known optima are reached at the known rates, through specs, workers and executors."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from subset import slow_except

from experiments.claims.support.optima import curvature, optimum_of_logistic
from research.training import assemble
from research.training.config import Config


def run(steps: int, **flags: Any) -> tuple[assemble.Problem, Any]:
  """Parameters after so many steps of a run described by flags, and its parts."""
  config = Config(batch_size="all").replace(**flags)
  problem = assemble.assemble(config, assemble.check(config))
  state = problem.executor.init(jax.random.key(0))
  data_key = jax.random.key(config.seed)
  data = problem.executor.place(problem.examples, problem.sizes, data_key)
  state, _ = problem.executor.run(state, data, rounds=steps)
  return problem, jax.device_get(problem.executor.params(state))


def error(problem: assemble.Problem, params: Any) -> float:
  """Euclidean distance to the exact optimum, the leaves as one vector."""
  flat = lambda tree: np.concatenate(
    [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]
  )
  return float(np.linalg.norm(flat(params) - flat(problem.job.task.optimum)))


@pytest.mark.parametrize("executor", ["simulate", "spmd"])
@pytest.mark.parametrize("partition", slow_except(["sorted()"], ["iid()", "sorted()", "shards(3)"]))
def test_least_squares_reaches_numpys_solution(executor, partition):
  """To 1e-5 in max|d|/max|p|, with noise, and however the rows are spread."""
  flags = {"executor": executor, "partition": partition, "mesh": "data:8"}
  problem, params = run(
    300, task="least_squares(samples=1003, noise=0.1)",
    method="data_parallel(sgd(1.8181818), mean())", **flags,
  )  # fmt: skip
  x, y = problem.job.task.train["x"], problem.job.task.train["y"]
  want = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)[0]
  got = jax.tree.leaves(params)[0].reshape(-1)
  assert np.abs(got - want.reshape(-1)).max() <= 1e-5 * np.abs(want).max()


def rate(first: int, last: int, **flags: Any) -> float:
  """The mean factor per step by which the error falls between two steps."""
  errors = [error(*run(steps, **flags)) for steps in (first, last)]
  return (errors[1] / errors[0]) ** (1 / (last - first))


@pytest.mark.parametrize("kappa", [5.0, 20.0])
def test_gradient_descent_contracts_at_its_rate(kappa):
  """(kappa - 1) / (kappa + 1) per step at the best step size 2 / (L + mu), within 1%."""
  flags = {
    "task": f"least_squares(condition={kappa})",
    "method": f"data_parallel(sgd({2 / (1 + 1 / kappa)}), mean())",
  }
  want = (kappa - 1) / (kappa + 1)
  steps = int(math.log(1e-4) / math.log(want))
  assert rate(steps // 2, steps, **flags) == pytest.approx(want, rel=0.01)


def test_heavy_ball_contracts_at_its_rate():
  """(sqrt kappa - 1) / (sqrt kappa + 1) at Polyak's step size and momentum, within 3%."""
  root = math.sqrt(1000.0)
  want = (root - 1) / (root + 1)
  step = 4 / (1 + 1 / root) ** 2
  flags = {
    "task": "least_squares(condition=1000.0)",
    "method": f"data_parallel(sgd({step}, momentum={want**2}), mean())",
  }
  assert rate(100, 200, **flags) == pytest.approx(want, rel=0.03)


@pytest.mark.slow
def test_the_mean_iterate_beats_the_last():
  """Polyak and Juditsky: with slowly falling steps, by several times in squared error."""
  flags = {
    "task": "least_squares(samples=4000, features=5, condition=2.0, noise=1.0)",
    "mesh": "data:1",
    "batch_size": 1,
  }
  inner = "data_parallel(sgd(polynomial_schedule(0.4, 0.02, 1.0, 2000)), mean())"
  ratios = []
  for seed in range(4):
    mean = error(*run(4000, method=f"averaged({inner}, burn_in=400)", seed=seed, **flags))
    last = error(*run(4000, method=inner, seed=seed, **flags))
    ratios.append((last / mean) ** 2)
  assert np.median(ratios) >= 3


def test_ten_thousand_workers_run():
  problem, params = run(
    20,
    task="least_squares(samples=20000, features=100)",
    mesh="data:10000",
    method="data_parallel(sgd(1.0), mean())",
  )
  assert problem.job.workers == 10000
  assert error(problem, params) < error(problem, jax.tree.map(np.zeros_like, params))


def test_newton_finds_the_optimum_of_a_logistic_problem():
  """Its gradient vanishes to rounding, on separable data too, and no point near it is lower."""
  rng = np.random.default_rng(0)
  x, l2 = rng.normal(size=(60, 7)), 1e-3
  y = (x[:, 0] > 0).astype(np.int32)
  at, value = optimum_of_logistic(x, y, l2)
  gradient = x.T @ ((1 + np.tanh(x @ at / 2)) / 2 - y) / len(x) + l2 * at
  assert np.abs(gradient).max() <= 1e-15
  mean = lambda w: np.mean(np.logaddexp(0, x @ w) - y * (x @ w)) + l2 / 2 * w @ w
  assert value == pytest.approx(mean(at), rel=1e-12)
  assert all(value < mean(at + 1e-3 * step) for step in rng.normal(size=(20, 7)))


def test_curvature_is_that_of_half_the_mean_square():
  x = np.random.default_rng(0).normal(size=(30, 4))
  assert curvature(x) == pytest.approx(np.linalg.svd(x)[1][::-1] ** 2 / 30)
