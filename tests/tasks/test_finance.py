"""Finance: the frontier against all sets of assets and as published, CVaR against an LP."""

import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Running

from experiments.applications.portfolios import linear_program
from research.core import registry
from research.tasks.finance import cvar, frontier


def run(task, method: str, rounds: int, workers: int = 4):
  sizes = [len(part) for part in np.array_split(task.train["y"], workers)]
  built = registry.build("method", method)
  return Running(built, "simulate", {"data": workers}, sizes, None, task=task).rounds(rounds)


def market(assets: int = 5, seed: int = 0) -> frontier.Market:
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(4 * assets, assets))
  means = np.sort(rng.uniform(0.01, 0.1, assets))
  returns = np.linspace(means[0], means[-1], 4)
  covariance = x.T @ x / len(x)

  def least(required: float) -> float:
    """Over all sets of assets that may be held, the solution of the two equations alone."""
    found = []
    for count in range(1, assets + 1):
      for held in map(list, itertools.combinations(range(assets), count)):
        sides = np.stack([np.ones(count), means[held]])
        square = np.block([[covariance[np.ix_(held, held)], sides.T], [sides, np.zeros((2, 2))]])
        right = np.concatenate([np.zeros(count), [1, required]])
        w = np.linalg.lstsq(square, right)[0][:count]
        if w.min() > -1e-12 and np.allclose(sides @ w, [1, required], atol=1e-12):
          found.append(w @ covariance[np.ix_(held, held)] @ w)
    return min(found)

  return frontier.Market(means, covariance, returns, np.array([least(r) for r in returns]))


def test_a_projection_meets_its_conditions():
  """y - w = a - t means where something is held, and no more elsewhere."""
  rng = np.random.default_rng(0)
  means = rng.uniform(size=7)
  with jax.enable_x64(True):
    nearest = jax.jit(frontier.portfolio)
    for required in np.linspace(means.min(), means.max(), 5):
      y = rng.normal(size=7)
      w = np.asarray(nearest(y, jnp.asarray(means), required))
      np.testing.assert_allclose([w.sum(), w @ means], [1, required], atol=1e-9)
      assert w.min() >= 0
      held = w > 1e-12
      if held.sum() > 2:  # else the multipliers are not unique
        sides = np.stack([np.ones(7), -means], 1)
        a, t = np.linalg.lstsq(sides[held], (y - w)[held])[0]
        np.testing.assert_allclose((y - w)[held], sides[held] @ [a, t], atol=1e-8)
        assert (y[~held] <= sides[~held] @ [a, t] + 1e-8).all()


@pytest.mark.parametrize(
  "method",
  [
    "data_parallel(sgd(1.0, momentum=0.5, nesterov=True), mean())",
    "averaged(local_sgd(sgd(1.0), mean(), period=1), burn_in=1000000)",
    "consensus_admm(0.8, mean(), penalty=0.2, period=5)",
  ],
)
@pytest.mark.slow
def test_the_least_variances_are_those_of_a_solver(method):
  with jax.enable_x64(True):
    task = frontier.of_market(market())
    found = run(task, method, 300)
    metrics = {name: float(value) for name, value in task.measure(found.params()).items()}
  # workers that project steps of their own, not the mean step, stay near
  assert metrics["gap"] < (0.05 if "local" in method else 1e-5)
  assert metrics["violation"] < 1e-9


@pytest.mark.slow
def test_the_published_frontier():
  folder = os.environ.get("RESEARCH_DATA_DIR")
  if not folder or not list(Path(folder).rglob("portef1.txt")):
    pytest.skip("$RESEARCH_DATA_DIR has no portef1.txt")
  with jax.enable_x64(True):
    task = frontier.frontier("port1", points=3, data_dir=folder)
    found = run(task, "data_parallel(sgd(1.0, momentum=0.9, nesterov=True), mean())", 200, 8)
    assert task.measure(found.params())["gap"] < 1e-5


def test_the_tail_of_a_hundred_losses():
  losses = np.arange(100.0, 0.0, -1.0).astype(np.float32)
  found = jax.jit(lambda losses: cvar.tail(losses, 0.95))(losses)
  assert found["var"] == 95
  assert found["cvar"] == pytest.approx(98, abs=1e-4)
  assert found["var_low"] < 95 < found["var_high"]
  assert found["cvar_low"] < 98 < found["cvar_high"]


def test_intervals_hold_the_truth_as_often_as_they_say():
  """Normal losses: VaR 1.645, CVaR 2.063 at 95%; 90% intervals of 200 samples of 500."""
  draws = np.random.default_rng(0).normal(size=(200, 500)).astype(np.float32)
  found = jax.jit(jax.vmap(lambda losses: cvar.tail(losses, 0.95, 0.9)))(draws)
  for name, truth in (("var", 1.6449), ("cvar", 2.0627)):
    inside = (found[f"{name}_low"] <= truth) & (truth <= found[f"{name}_high"])
    assert 0.8 < inside.mean() < 0.98, name


DESCENT = "data_parallel(sgd(cosine_decay_schedule(0.01, 1500), momentum=0.9), mean())"


def test_the_least_cvar_is_that_of_a_linear_program():
  rng = np.random.default_rng(0)
  x = rng.normal(0.001, 0.02, (300, 4)) * np.array([1, 1.3, 0.8, 2])
  task = cvar.of_scenarios(x, x, 0.9)
  found = run(task, DESCENT, 1500)
  loss = task.evaluate(found.params(), task.train)["loss"]
  assert loss == pytest.approx(linear_program(x.astype(np.float32), 0.9), rel=1e-4)
