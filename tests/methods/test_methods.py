"""The contracts of every method, over the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import BASIC, DRAWN, EXACT, GRAPHS, METHODS, SIGNS, SPECS, by_period
from problems import SIMULATED, Running, distance, regression, simulated
from side_by_side import regressions, side_by_side
from subset import slow_except

from research.core import registry

BY_PERIOD = by_period()


def together(names, task=None):
  """Methods with rounds of one length on all examples of eight workers."""
  methods = {name: METHODS[name] for name in names}
  tasks = regressions(names, task)
  return Running(side_by_side(methods), "simulate", SIMULATED, batch_size=None, task=tasks)


@pytest.mark.parametrize("name", EXACT)
def test_one_worker_is_the_inner_optimizer(name):
  """W = 1 against a loop that calls optax by hand."""
  spec, period = SPECS[name], METHODS[name].local_steps
  inner = spec[spec.index("data_parallel(") + len("data_parallel(") : spec.index(", mean()")]
  optimizer = registry.build("optimizer", inner)
  task = regression()
  run = Running(METHODS[name], "simulate", {"data": 1}, (240,), batch_size=None)
  params = jax.device_get(run.state.method.inner.params if name == "averaged" else run.params())
  state, iterates = optimizer.init(params), []
  for _ in range(6):
    grads = jax.grad(task.loss)(params, task.train, None)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    iterates.append(params)
  want = iterates[-1]
  if name == "averaged":
    want = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), *iterates[2:])
  assert period * 6 == int(run.rounds(6).state.round) * period
  assert distance(run.params(), want) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_identical_data_on_all_workers_is_one_worker(name):
  one = regression(30)
  same = one._replace(train={k: np.concatenate([v] * 8) for k, v in one.train.items()})
  many = Running(METHODS[name], "simulate", SIMULATED, (30,) * 8, None, task=same).rounds(8)
  single = Running(METHODS[name], "simulate", {"data": 1}, (30,), None, task=one).rounds(8)
  assert distance(many.params(), single.params()) <= 1e-6


@pytest.mark.parametrize("period", slow_except([2], BY_PERIOD))
def test_permuting_the_workers_changes_nothing(period):
  """But where a worker's number is its place in a graph, or the key of what it draws."""
  names, task = BY_PERIOD[period], regression()
  order = np.random.default_rng(3).permutation(8)
  rows = np.arange(240).reshape(8, 30)[order].reshape(-1)
  moved = task._replace(train={k: v[rows] for k, v in task.train.items()})
  run = together(names, task)
  want, got = (one.rounds(8).params() for one in (run, run.again(moved)))
  for name in {*names} - {*GRAPHS, *DRAWN, *SIGNS}:
    assert distance(got[name], want[name]) <= 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_full_gradient_does_not_depend_on_the_partition(name):
  """The objective is the mean over all examples, however unevenly the workers hold them."""
  uneven = Running(METHODS[name], "simulate", SIMULATED, (1, 2, 3, 4, 50, 60, 70, 50), None)
  assert distance(uneven.rounds(8).params(), simulated(name, 8)) <= 1e-5


@pytest.mark.parametrize("period", slow_except([2, 3], by_period(BASIC)))
def test_state_is_stable_and_rounds_depend_on_it_alone(period, compilations):
  """Types, shardings and programs stay; six rounds are three and three from a copy of the state."""
  run = together(by_period(BASIC)[period])
  kinds = lambda: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), run.state)
  before = kinds()
  run.rounds(3)
  saved = jax.device_get(run.state._replace(key=jax.random.key_data(run.state.key)))
  places = jax.tree.map(lambda x: x.sharding, run.state)
  assert before == kinds()
  assert compilations
  compilations.clear()
  whole = run.rounds(3).state
  assert not compilations
  state = saved._replace(key=jax.random.wrap_key_data(saved.key))
  run.state = jax.tree.map(jax.device_put, state, places)
  again = run.rounds(3).state
  same = jax.tree.map(lambda a, b: bool((a == b).all()), whole, again)
  assert all(jax.tree.leaves(same))


def test_three_steps_equal_numpy():
  """Heavy ball with two workers of unequal weight, transcribed."""
  task = regression(40)
  method = registry.build("method", "data_parallel(sgd(0.2, momentum=0.5), mean())")
  run = Running(method, "simulate", {"data": 2}, (10, 30), None, task=task)
  w, b = run.params()["w"].astype(np.float64), run.params()["b"].astype(np.float64)
  x, y = task.train["x"].astype(np.float64), task.train["y"].astype(np.float64)
  velocity = [np.zeros_like(w), np.zeros_like(b)]
  for _ in range(3):
    total = [np.zeros_like(w), np.zeros_like(b)]
    for rows, weight in ((slice(0, 10), 0.5), (slice(10, 40), 1.5)):
      error = x[rows] @ w + b - y[rows]
      total[0] += weight * x[rows].T @ error / len(error) / 2
      total[1] += weight * error.mean(0) / 2
    velocity = [0.5 * v + g for v, g in zip(velocity, total, strict=True)]
    w, b = w - 0.2 * velocity[0], b - 0.2 * velocity[1]
  assert distance(run.rounds(3).params(), {"b": b, "w": w}) <= 1e-6


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("data_parallel(sgd(0.1), mean(), period=0)", "period=0"),
    ("averaged(data_parallel(sgd(0.1), mean()), burn_in=-1)", "burn_in=-1"),
  ],
)
def test_ranges_are_checked_when_built(spec, words):
  with pytest.raises(ValueError, match=words):
    registry.build("method", spec)
