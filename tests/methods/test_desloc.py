"""DES-LOC and Local Adam: a transcription, what equals what, bytes, names and ranges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance, regression
from test_adaptive import Workers, flat, running

from research.aggregate.mean import mean
from research.core.base import Presence
from research.core.method import Method
from research.methods.desloc import desloc, moments_of
from research.methods.local import local_sgd
from research.parallel import inference, traffic, workers

ADAM = optax.adam(0.05, b1=0.8, b2=0.9)
APART = desloc(ADAM, mean(), period=2, moments={"mu": 3, "nu": 4})


def numpy_desloc(ours: Workers, x: np.ndarray, period: int, of_mu: int, of_nu: int):
  models = np.tile(x, (4, 1))
  m, v = np.zeros_like(models), np.zeros_like(models)
  for t in itertools.count(1):
    g = ours.gradients(models)
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
    models = models - 0.05 * m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
    everywhere = lambda rows: np.tile(ours.mean(rows), (4, 1))
    models = everywhere(models) if t % period == 0 else models
    m = everywhere(m) if t % of_mu == 0 else m
    v = everywhere(v) if t % of_nu == 0 else v
    yield models.mean(0)


def test_rounds_equal_numpy():
  methods = {"apart": APART, "local_adam": desloc(ADAM, mean(), period=1)}
  ours, run = Workers(), running(methods, axes={"data": 4}, sizes=Workers.sizes)
  start = flat(run.params()["apart"])
  apart, local = numpy_desloc(ours, start, 2, 3, 4), numpy_desloc(ours, start, 1, 1, 1)
  for _ in range(6):
    found = run.rounds(1).params()
    np.testing.assert_allclose(flat(found["apart"]), next(apart), atol=5e-6)
    np.testing.assert_allclose(flat(found["local_adam"]), next(local), atol=5e-6)


@pytest.mark.slow
def test_without_moments_it_is_local_sgd():
  alone = desloc(ADAM, mean(), period=3, moments={})
  got, want = (
    Running(method, "simulate", {"data": 4}, (60,) * 4).rounds(4)
    for method in (alone, local_sgd(ADAM, mean(), period=3))
  )
  assert distance(got.params(), want.params()) <= 1e-6


def test_a_round_is_the_divisor_of_the_periods():
  assert APART.local_steps == 1
  toy = desloc(ADAM, mean(), period=192, moments={"mu": 192, "nu": 692})
  assert toy.local_steps == 4
  assert desloc(ADAM, mean(), period=16).local_steps == 16
  assert desloc(ADAM, mean(), period=16, moments={"mu": 48, "nu": 96}).local_steps == 16


def sent(method: Method, rounds: int) -> np.ndarray:
  """Bytes by round, in means of the model."""
  job = workers.Job(method, regression(), {"data": 4}, np.full(4, 60), 8)
  dense = 2 * 3 / 4 * 4 * 21
  return traffic.of_method(job, inference.layout_of(job), rounds).sent / dense


def test_bytes_are_known_round_by_round():
  found = sent(desloc(ADAM, mean(), period=2, moments={"mu": 4, "nu": 6}), 6)
  np.testing.assert_allclose(found, [1, 2, 2, 2, 1, 3])
  np.testing.assert_allclose(sent(desloc(ADAM, mean(), period=2), 2), [3, 3])


def test_an_absent_worker_gets_the_model_and_keeps_its_moments():
  grads = {"w": jnp.asarray([1.0, -2.0, np.nan, 4.0])}
  method = desloc(optax.sgd(0.1, momentum=0.5), mean(), period=1)

  def one(grads, weight, active):
    state = method.init({"w": jnp.zeros(())})
    local = method.step(grads, method.begin(state), state, key=jax.random.key(0))
    return method.sync(local, state, key=jax.random.key(0), presence=Presence(weight, active))

  weight, active = jnp.asarray([1.0, 1.0, 0.0, 2.0]), jnp.asarray([True, True, False, True])
  found = jax.jit(jax.vmap(one, axis_name="data"))(grads, weight, active)
  np.testing.assert_allclose(found.params["w"], -0.1 * 7 / 4, rtol=1e-6)
  trace = found.inner[0].trace["w"]
  np.testing.assert_allclose(trace, [7 / 4, 7 / 4, 0, 7 / 4], rtol=1e-6)


def test_moments_are_found_in_any_state():
  assert moments_of(optax.sgd(0.1)) == []
  assert moments_of(optax.sgd(0.1, momentum=0.9)) == ["trace"]
  assert moments_of(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))) == ["mu", "nu"]
  assert moments_of(optax.adafactor(0.1)) == ["v_row", "v_col", "v"]
  assert moments_of(optax.contrib.muon(0.1)) == ["mu"]


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: desloc(ADAM, mean(), period=0), "period=0 is not at least 1"),
    (lambda: desloc(ADAM, mean(), moments={"nu": 0}), "period of nu=0 is not at least 1"),
    (lambda: desloc(ADAM, mean(), moments={"v": 3}), "mu, nu"),
    (lambda: desloc(optax.sgd(0.1), mean(), moments={"mu": 3}), "mu"),
  ],
)
def test_names_and_ranges_are_checked(make, words):
  with pytest.raises(ValueError, match=words):
    make()
