"""SPARTA's selectors, and SPARTA within DiLoCo: recursions in numpy, coverage and bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import regression

from research.aggregate.feedback import error_feedback
from research.aggregate.mean import mean
from research.aggregate.turns import partitioned, shuffled
from research.core.base import EVERYONE
from research.methods.sparta import sparta
from research.methods.sparta_diloco import sparta_diloco
from research.parallel import inference, traffic
from research.parallel.job import Job

W, N = 4, 11
NESTEROV = optax.sgd(0.7, momentum=0.5, nesterov=True)


def supports(aggregator, rounds: int, size: int = N) -> np.ndarray:
  """Whether an element is averaged [rounds, n], for values that are nowhere zero."""
  x = 1 + jax.random.uniform(jax.random.key(0), (W, size))

  def worker(x):
    def one(state, _):
      value, sent, state = aggregator.aggregate(x, state, jax.random.key(1), EVERYONE)
      return state, (value, sent)

    return jax.lax.scan(one, aggregator.init(x), length=rounds)[1]

  value, sent = map(np.asarray, jax.jit(jax.vmap(worker, axis_name="data"))(x))
  for row, found, own in zip(x, value, sent, strict=True):
    np.testing.assert_array_equal(own, np.where(own != 0, row, 0))
    np.testing.assert_allclose(found, np.where(own != 0, np.mean(x, 0), 0), rtol=1e-6)
  return sent[0] != 0


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 41])
def test_each_element_is_averaged_once_in_a_cycle(size):
  """P = 4 rounds; a fixed order repeats, a new partition does not."""
  same, new = (
    supports(make(0.25), 12, size).reshape(3, 4, size) for make in (shuffled, partitioned)
  )
  np.testing.assert_array_equal(same.sum(1), 1)
  np.testing.assert_array_equal(new.sum(1), 1)
  np.testing.assert_array_equal(same[1:], same[:-1])
  if size > 10:
    assert not np.array_equal(new[0], new[1])
    assert not np.array_equal(supports(shuffled(0.25, seed=1), 4, size), same[0])


def test_a_fraction_that_does_not_divide_one_is_rounded_down():
  assert [shuffled(f).rounds for f in (1.0, 0.5, 0.3, 0.01, 0.005)] == [1, 2, 4, 100, 200]


def models(method, rounds: int) -> np.ndarray:
  """Models [rounds, W, n] of workers that minimize ||x - target||^2 / 2 from zero."""
  targets = np.random.default_rng(0).normal(size=(W, N))

  def worker(target):
    def one(state, key):
      local = method.step(state.params - target, method.begin(state), state, key=key)
      state = method.sync(local, state, key=key)
      return state, state.params

    keys = jax.random.split(jax.random.key(0), rounds)
    return jax.lax.scan(one, method.init(jnp.zeros_like(target)), keys)[1]

  run = jax.jit(jax.vmap(worker, axis_name="data", out_axes=1))
  return np.asarray(run(jnp.asarray(targets, jnp.float32)), np.float64)


def test_sparta_diloco_equals_numpy():
  targets = np.random.default_rng(0).normal(size=(W, N))
  method = sparta_diloco(optax.sgd(0.3), NESTEROV, shuffled(0.25), mean(), outer_period=3)
  x, common, velocity = np.zeros((W, N)), np.zeros(N), np.zeros(N)
  chosen = supports(shuffled(0.25), 4)
  sparse = iter(chosen)  # the order advances only in rounds with a sparse average
  for t, got in enumerate(models(method, 6)):
    x = x - 0.3 * (x - targets)
    if t % 3 < 2:
      x = np.where(next(sparse), x.mean(0), x)
    else:
      change = common - x.mean(0)
      velocity = 0.5 * velocity + change
      common = common - 0.7 * (0.5 * velocity + change)
      x = np.tile(common, (W, 1))
    np.testing.assert_allclose(got, x, atol=1e-6)


@pytest.mark.slow
def test_sparse_averages_do_not_change_the_outer_gradient():
  """On quadratics of equal curvature, the mean model is DiLoCo's."""
  combined = sparta_diloco(optax.sgd(0.3), NESTEROV, shuffled(0.25), mean(), outer_period=3)
  alone = sparta_diloco(optax.sgd(0.3), NESTEROV, shuffled(1e-3), mean(), outer_period=3)
  found, other = models(combined, 6), models(alone, 6)
  np.testing.assert_allclose(found.mean(1), other.mean(1), atol=1e-6)
  assert np.ptp(found[1], 0).max() < np.ptp(other[1], 0).max() + 1e-6


@pytest.mark.slow
def test_bytes_by_round():
  shapes = {"w": jnp.zeros((40, 10))}
  loss = lambda params, batch, key: jnp.sum(params["w"] ** 2) * jnp.mean(batch["x"])
  task = regression()._replace(init=lambda key: shapes, loss=loss)
  dense, part = 2 * 7 / 8 * 4 * 400, 2 * 7 / 8 * 4 * 4

  def sent(method):
    job = Job(method, task, {"data": 8}, np.full(8, 30), None)
    return traffic.of_method(job, inference.layout_of(job), 6).sent

  np.testing.assert_allclose(sent(sparta(optax.sgd(0.1), partitioned(0.01))), part)
  method = sparta_diloco(optax.sgd(0.1), NESTEROV, shuffled(0.01), mean(), outer_period=3)
  np.testing.assert_allclose(sent(method), [part, part, dense] * 2)


def test_what_sparta_refuses_is_refused():
  with pytest.raises(ValueError, match="sparta cannot be combined with this aggregator"):
    sparta_diloco(optax.sgd(0.1), NESTEROV, error_feedback(shuffled(0.1)), mean())
  with pytest.raises(ValueError, match="outer_period=0 is not at least 1"):
    sparta_diloco(optax.sgd(0.1), NESTEROV, shuffled(0.1), mean(), outer_period=0)
  with pytest.raises(ValueError, match=r"fraction=0 is not in \(0, 1\]"):
    shuffled(0)
