"""The optax face on one's own mesh: any axis name, FSDP, Flax NNX, what stands beside it."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import METHODS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import distance, regression
from subset import slow_except

from research.aggregate.mean import mean
from research.core import registry
from research.methods.data_parallel import data_parallel
from research.optim.transform import aggregated, as_optax
from research.parallel.state_specs import init_state, state_specs

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SPECS = (
  "mean()",
  "error_feedback(two_phase(int8()))",
  "error_feedback(gather_mean(top_k(0.3)))",
  "noisy(mean(), clip=1.0, noise=0.1)",
  "median()",
)


def example(name: str):
  """A program of docs/examples, as a module."""
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_examples_train():
  assert example("optax_shard_map").main() <= 1e-3
  assert example("optax_nnx").main() <= 0.35


@pytest.mark.slow
def test_fsdp_is_the_same_mathematics():
  """Two replicas of four devices, parameters cut by the compiler: as two workers of one each."""
  loss, params = example("optax_fsdp").main(steps=60)
  assert loss <= 0.1
  x = jax.random.normal(jax.random.key(1), (512, 16))
  y = x @ jax.random.normal(jax.random.key(0), (16, 4))
  exchange = registry.build("aggregator", "error_feedback(gather_mean(int8()))")
  optimizer = optax.chain(aggregated(exchange), optax.adam(0.05))

  def run(x, y):
    def one(held, _):
      grads = jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(held[0])
      updates, state = optimizer.update(grads, held[1], held[0])
      return (optax.apply_updates(held[0], updates), state), None

    start = {"w": jnp.zeros((16, 4))}
    return jax.lax.scan(one, (start, optimizer.init(start)), None, 60)[0][0]

  halves = jax.tree.map(lambda a: a.reshape(2, 256, -1), (x, y))
  want = jax.jit(jax.vmap(run, axis_name="data"))(*halves)["w"][0]
  assert distance(np.asarray(params), np.asarray(want)) <= 2e-2  # int8 may round a last bit apart


def updates_of(optimizer, axis, steps=3):
  """Parameters [8, ...] after steps of eight workers under vmap with that axis name."""
  task = regression()
  rows = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), dict(task.train))

  def run(batch):
    params = task.init(jax.random.key(0))
    state = optimizer.init(params)
    for _ in range(steps):
      grads = jax.grad(task.loss)(params, batch, None)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  return jax.jit(jax.vmap(run, axis_name=axis))(rows)


@pytest.mark.parametrize("spec", slow_except(SPECS[1:2], SPECS))
def test_any_axis_name(spec):
  """Bit for bit what the default name gives, also of two axes."""
  aggregator = registry.build("aggregator", spec)
  chain = lambda **axis: optax.chain(aggregated(aggregator, **axis), optax.sgd(0.1))
  want = updates_of(chain(), "data")
  got = updates_of(chain(axis="batch"), "batch")
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(a, b)


TALKATIVE = ("local_sgd", "easgd", "dc_asgd", "sgp", "zero_one_adam")


@pytest.mark.parametrize("name", slow_except(["easgd"], TALKATIVE))
def test_whole_methods_on_any_axis(name):
  """Also those that talk past their aggregator."""
  want = updates_of(as_optax(METHODS[name]), "data")
  got = updates_of(as_optax(METHODS[name], axis=("replica",)), "replica")
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_axis_that_is_not_there():
  with pytest.raises(ValueError, match="workers communicate over mesh axis 'batch'"):
    updates_of(aggregated(mean(), axis="batch"), "data")
  mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
  with pytest.raises(
    ValueError, match="axis='batches' is not an axis of the mesh, which has batch"
  ):
    state_specs(aggregated(mean(), axis="batches"), jnp.ones(3), mesh, axis="batches")


def test_sums_are_refused_on_any_axis():
  """Under check_vma=True `jax.grad` has summed the gradients of replicated parameters."""
  mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
  optimizer = aggregated(mean(), axis="batch")

  def step(params, x):
    grads = jax.grad(lambda p: jnp.sum(p * x))(params)
    return optimizer.update(grads, optimizer.init(params), params)[0]

  mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
  with pytest.raises(ValueError, match="pass check_vma=False to shard_map"):
    jax.jit(mapped)(jnp.ones(16), jnp.arange(8 * 16.0))


def test_what_stands_beside_it_in_a_chain():
  """Clipping before, decay with a mask inside and after: against the same by hand."""
  mask = {"b": False, "w": True}
  whole = optax.chain(
    optax.clip(0.5), aggregated(mean()), optax.add_decayed_weights(0.1, mask=mask), optax.sgd(0.1)
  )
  inside = optax.chain(
    optax.clip(0.5),
    as_optax(
      data_parallel(optax.chain(optax.add_decayed_weights(0.1, mask=mask), optax.sgd(0.1)), mean())
    ),
  )
  task = regression()
  rows = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), dict(task.train))
  params = task.init(jax.random.key(0))
  for _ in range(3):
    grads = jax.vmap(lambda batch, at=params: jax.grad(task.loss)(at, batch, None))(rows)
    g = jax.tree.map(lambda x: jnp.mean(jnp.clip(x, -0.5, 0.5), 0), grads)
    params = {n: params[n] - 0.1 * (g[n] + 0.1 * mask[n] * params[n]) for n in params}
  for optimizer in (whole, inside):
    got = jax.tree.map(lambda x: x[0], updates_of(optimizer, "data"))
    assert distance(got, params) <= 1e-6


def test_masked_parameters_are_left_to_others():
  """`optax.masked` around the exchange: biases never travel."""
  optimizer = optax.chain(optax.masked(aggregated(mean()), {"b": False, "w": True}), optax.sgd(0.1))
  got = updates_of(optimizer, "data", steps=1)
  assert np.ptp(np.asarray(got["w"]), axis=0).max() == 0
  assert np.ptp(np.asarray(got["b"]), axis=0).max() > 0


def test_where_state_lies_beside_sharded_parameters():
  """A memory is [W n, m], cut by workers and then as its parameter; moments lie as parameters."""
  auto = AxisType.Auto
  mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(auto, auto))
  sharding = NamedSharding(mesh, P("fsdp"))
  params = jax.device_put({"w": jnp.ones((8, 3)), "b": jnp.ones(5)}, {"w": sharding, "b": None})
  feedback = registry.build("aggregator", "error_feedback(gather_mean(int8()))")
  optimizer = optax.chain(aggregated(feedback, axis="replica"), optax.adam(0.1))
  specs = state_specs(optimizer, params, mesh, axis="replica")
  memory = specs.state_shardings[0].link.memory
  assert memory["w"].spec == P(("replica", "fsdp"), None)
  assert memory["b"].spec == P(("replica",))
  assert specs.state[0].link.memory["w"] == P(("replica",))
  assert specs.state_shardings[1][0].mu["w"].spec == P("fsdp")
  state = init_state(optimizer, params, mesh, axis="replica")
  assert state[0].link.memory["w"].shape == (16, 3)
  assert state[0].link.memory["w"].sharding.is_equivalent_to(memory["w"], 2)
