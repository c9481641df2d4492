"""Exchanges on devices of their own: bit for bit what `spmd` computes, in flight or landed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running
from subset import slow_except

from research.aggregate.mean import mean
from research.core import registry
from research.core.base import EVERYONE, Aggregator, Tree
from research.core.method import Method
from research.methods.easgd import EASGD
from research.methods.late import Late
from research.methods.overlap_local_sgd import OverlapLocalSGD
from research.training import loop
from research.training.config import Config, UsageError

OUTER = "sgd(0.7, momentum=0.9)"
METHODS = {
  "no delay": f"late(diloco(sgd(0.1, momentum=0.5), {OUTER}, mean(), period=4), 0)",
  "late": f"late(diloco(sgd(0.1, momentum=0.5), {OUTER}, mean(), period=4), 3)",
  "beyond": f"late(diloco(sgd(0.1, momentum=0.5), {OUTER}, mean(), period=4), 9)",
  "fragments": f"late(diloco(sgd(0.1, momentum=0.5), {OUTER}, mean(), period=4), 3, fragments=2)",
  "streaming": f"streaming_diloco(sgd(0.1), {OUTER}, mean(), period=4, fragments=2, delay=2)",
  "memory": "late(local_sgd(sgd(0.1), error_feedback(gather_mean(top_k(0.3))), period=4), 5)",
  "int8": "late(local_sgd(sgd(0.1), error_feedback(two_phase(int8())), period=4), 3)",
  "signum": "late(signum(0.01, mean()), 1)",
  "eager": "eager_diloco(adam(0.01), sgd(0.4, momentum=0.5), mean(), period=4)",
  "eager memory": "eager_diloco(sgd(0.1), sgd(0.4), error_feedback(two_phase(int8())), period=4)",
  "masked": "late(local_sgd(sgd(0.1), secure_sum(clip=1.0), period=4), 3)",
  "overlap": "overlap_local_sgd(sgd(0.1), mean(), period=4)",
}
QUICK = ("beyond",)
UNEVEN = (20, 30, 40, 30)


def running(name: str, executor: str, sizes=(30,) * 4, axes=None) -> Running:
  method = registry.build("method", METHODS[name])
  return Running(method, executor, axes or {"data": 4}, sizes)


def state_of(run: Running) -> Tree:
  state = run.executor.settled(run.state)
  return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def assert_same(a: Tree, b: Tree, rtol: float = 0.0) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol, 1e-6 * (rtol > 0), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", slow_except(QUICK, METHODS))
def test_rounds_are_those_of_spmd(name):
  """Over two dispatches: the model, the losses, and the state with what is on its way."""
  want, got = (running(name, executor).rounds(5, 2) for executor in ("spmd", "overlapped"))
  assert_same(got.params(), want.params())
  assert_same(jax.device_get(got.metrics), jax.device_get(want.metrics))
  # two programs may round what one fused program rounds once
  assert_same(state_of(got), state_of(want), rtol=1e-5)


@pytest.mark.parametrize("name", slow_except((), ("memory", "overlap")))
def test_workers_of_unequal_weights(name):
  want, got = (running(name, executor, UNEVEN).rounds(6) for executor in ("spmd", "overlapped"))
  assert_same(got.params(), want.params())


@pytest.mark.parametrize("name", slow_except((), ("beyond", "fragments", "eager memory")))
def test_a_run_goes_on_from_what_was_saved_in_flight(name):
  """In the same executor, and in the other one."""
  whole = running(name, "overlapped").rounds(5)
  saved = jax.tree.map(jnp.copy, whole.executor.settled(whole.state))
  whole.rounds(3)
  for resumed in (whole.again(), running(name, "spmd")):
    place = lambda x, like: jax.device_put(jnp.copy(x), like.sharding)
    resumed.state = jax.tree.map(place, saved, resumed.state)
    assert_same(resumed.rounds(3).params(), whole.params())


@pytest.mark.slow
def test_a_worker_of_several_devices():
  """Every device of a worker has a communication device, which sends its shard."""
  axes = {"data": 2, "fsdp": 2}
  want, got = (running("memory", one, (30,) * 2, axes).rounds(6) for one in ("spmd", "overlapped"))
  assert_same(got.params(), want.params())


def config(**flags) -> Config:
  given = {"task": "mean_estimation(8, 4)", "mesh": "data:2", "batch_size": 2, "steps": 16}
  return Config(executor="overlapped", **given | flags)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ({"method": "local_sgd(sgd(0.1), mean())"}, r"use late\(local_sgd\(...\), delay=...\)"),
    (
      {"method": METHODS["late"], "mesh": "data:8", "batch_size": 8},
      "8 CPU devices that communicate.*=16",
    ),
    ({"method": METHODS["late"], "dropout": 0.5}, "all workers take part"),
    ({"method": METHODS["late"], "population": 4}, "all workers take part"),
    ({"method": METHODS["late"], "diagnostics": True}, "use --executor=spmd"),
  ],
)
def test_what_cannot_overlap_is_refused(flags, words, tmp_path):
  with pytest.raises(UsageError, match=words):
    loop.train(config(**flags, out=str(tmp_path)))


@pytest.mark.slow
def test_a_number_that_is_not_finite_is_seen_before_it_is_saved():
  """It is in the aggregator's memory and in the air, and not yet in any model."""
  run = running("memory", "overlapped").rounds(4)
  flight: Any = run.state
  links = jax.tree.map(lambda x: x * np.nan, flight.links)
  found = run.executor.settled(flight._replace(links=links))
  finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), found.method.inner[0])
  assert all(jax.tree.leaves(finite.params))
  assert not all(jax.tree.leaves(finite.link))


class Hasty(EASGD):
  """Says that it is eager, although its first local step uses the centre."""

  eager = True


def test_a_method_that_needs_its_result_at_once_is_not_eager():
  method = Hasty(optax.sgd(0.1), mean(), period=4)
  with pytest.raises(ValueError, match=r"Hasty is not eager: .* \.centre\['b'\], \.centre\['w'\]$"):
    Running(method, "overlapped", {"data": 4}, (30,) * 4)


class Weighting(OverlapLocalSGD):
  """Weights what it receives by the worker's weight."""

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    value = jax.tree.map(lambda v: presence.weight * v, value)
    return super().receive(value, sent, state, key=key, presence=presence)


def test_an_eager_method_may_not_need_a_workers_weight_later():
  with pytest.raises(ValueError, match=r"Weighting: .* on the worker's weight"):
    Running(Weighting(optax.sgd(0.1), mean()), "overlapped", {"data": 4}, UNEVEN)


@pytest.mark.slow
def test_a_method_of_another_package_whose_local_is_its_state():
  """Its Local then has the aggregator's state, which the workers do not hold."""
  aggregator = registry.build("aggregator", "error_feedback(gather_mean(top_k(0.3)))")
  method = Late(Relaxed(0.1, aggregator, period=3), 2)
  want, got = (
    Running(method, executor, {"data": 4}, UNEVEN).rounds(5) for executor in ("spmd", "overlapped")
  )
  assert_same(got.params(), want.params())


class RelaxedState(NamedTuple):
  params: Any
  link: Any


class Relaxed(Method):
  """Gradient descent, and half of the mean change."""

  learning_rate: float
  aggregator: Aggregator
  period: int = 4

  def init(self, params):
    return RelaxedState(params, self.aggregator.init(params))

  def begin(self, state):
    return state

  def step(self, grads, local, state, *, key, grad_fn=None):
    return local._replace(params=optax.tree.add_scale(local.params, -self.learning_rate, grads))

  def message(self, local, state, *, key, presence=EVERYONE):
    return optax.tree.sub(local.params, state.params), state

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    return state._replace(params=optax.tree.add_scale(state.params, 0.5, value))
