"""The optax face: aggregators and whole methods in a train step of one's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import DRAWN, METHODS, SIGNS, SYNCHRONOUS, by_period
from jax.sharding import PartitionSpec as P
from problems import SIMULATED, Running, distance, regression, split
from side_by_side import regressions, side_by_side
from subset import slow_except

from research.aggregate.mean import mean
from research.comm import mesh as meshes
from research.core import registry
from research.methods.data_parallel import data_parallel
from research.optim.transform import aggregated, as_optax
from research.parallel.state_specs import state_specs

BY_PERIOD = by_period()
DEVICES = (*SYNCHRONOUS, "local_sgd", "drifting", "residual")  # with a device for each worker


EXECUTIONS = [(period, execution) for period in BY_PERIOD for execution in ("vmap", "shard_map")]


@pytest.mark.parametrize(
  ("period", "execution"),
  slow_except([(2, "vmap"), (3, "shard_map")], EXECUTIONS),
)
def test_the_optax_face_is_the_method(period, execution):
  """`as_optax` in a train step of one's own, all examples in each step."""
  names = tuple(n for n in BY_PERIOD[period] if execution == "vmap" or n in DEVICES)
  method, task = side_by_side({name: METHODS[name] for name in names}), regressions(names)
  examples, _ = split(regression(), (30,) * 8)
  params = task.init(jax.random.split(jax.random.key(0))[0])
  optimizer = as_optax(method)

  def steps(batch):
    def one(carry, _):
      params, state = carry
      grad_fn = lambda params: jax.grad(task.loss)(params, batch, None)
      updates, state = optimizer.update(grad_fn(params), state, params, grad_fn=grad_fn)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(one, (params, optimizer.init(params)), None, 4 * period)[0]

  if execution == "vmap":
    local, state = jax.jit(jax.vmap(steps, axis_name="data"))(examples)
  else:
    lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
    body = lambda batch: lead(steps(jax.tree.map(lambda x: x[0], batch)))
    mesh = meshes.device_mesh(SIMULATED)
    mapped = jax.shard_map(
      body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    local, state = jax.jit(mapped)(examples)
  deployed = jax.tree.map(lambda x: jnp.mean(x, 0), jax.vmap(method.params)(state.state))
  want = simulated(names)
  for name in {*names} - {*SIGNS, *DRAWN, "sparta", "noloco"}:  # some of which draw, by other keys
    assert distance(deployed[name], want[name]) <= 1e-6, name
    if name in ("sgd", "adam", "accumulation"):
      assert distance(jax.tree.map(lambda x: x[3], local[name]), want[name]) <= 1e-6


@functools.cache
def simulated(names: tuple[str, ...]) -> Any:
  """What the same rounds leave in eight simulated workers."""
  methods = side_by_side({name: METHODS[name] for name in names})
  run = Running(methods, "simulate", SIMULATED, batch_size=None, task=regressions(names))
  return run.rounds(4).params()


def test_aggregated_chains_with_optax():
  """Clip each worker's gradient, average, step: against numpy."""
  grads = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
  clipped = grads * np.minimum(1, 0.5 / np.linalg.norm(grads, axis=1, keepdims=True))
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), aggregated(mean()), optax.sgd(2.0))

  def update(g):
    return optimizer.update(g, optimizer.init(g), g)[0]

  got = jax.vmap(update, axis_name="data")(grads)
  np.testing.assert_allclose(np.asarray(got), np.tile(-2 * clipped.mean(0), (8, 1)), rtol=1e-5)


@pytest.mark.parametrize("spec", ["mean()", "error_feedback(gather_mean(top_k(0.3)))"])
def test_sums_that_shard_map_has_made_are_refused(spec):
  """Under its default, gradients of replicated parameters are sums; of workers' own ones not."""
  optimizer = aggregated(registry.build("aggregator", spec))
  whole = as_optax(data_parallel(optax.sgd(1.0), mean()))
  mesh = meshes.device_mesh(SIMULATED)

  def step(params, x, optimizer=optimizer):
    grads = jax.grad(lambda p: jnp.sum(p * x))(params)
    return optimizer.update(grads, optimizer.init(params), params)[0]

  def mapped(step, check):
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs))

  params, x = jnp.ones(16), jnp.arange(8 * 16.0)
  for each in (optimizer, whole):
    with pytest.raises(ValueError, match="pass check_vma=False to shard_map"):
      mapped(functools.partial(step, optimizer=each), True)(params, x)
  if spec == "mean()":
    want = x.reshape(8, 16).mean(0)
    np.testing.assert_allclose(mapped(step, False)(params, x), want)
    own = lambda params, x: step(jax.lax.pcast(params, "data", to="varying"), x)
    np.testing.assert_allclose(mapped(own, True)(params, x), want)


@pytest.mark.parametrize(
  "build",
  [
    pytest.param(lambda: aggregated(mean()), marks=pytest.mark.slow),
    lambda: optax.chain(
      optax.clip_by_global_norm(1.0),
      aggregated(registry.build("aggregator", "error_feedback(gather_mean(top_k(0.3)))")),
      optax.adam(0.1),
    ),
    pytest.param(lambda: as_optax(METHODS["two_phase"]), marks=pytest.mark.slow),
    pytest.param(lambda: as_optax(METHODS["local_sgd"]), marks=pytest.mark.slow),
  ],
)
def test_state_lies_where_its_specs_say(build):
  """Every worker's memory leaves `shard_map` and comes back: as if no step had left it."""
  optimizer, task, mesh = build(), regression(), meshes.device_mesh(SIMULATED)
  params = task.init(jax.random.key(0))
  found = state_specs(optimizer, params, mesh)
  specs, of_params = found.state, found.params
  batch, of_batch = dict(task.train), P("data")

  def step(params, state, batch):
    grads = jax.grad(task.loss)(params, batch, None)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  mapped = lambda f, i, o: jax.jit(
    jax.shard_map(f, mesh=mesh, in_specs=i, out_specs=o, check_vma=False)
  )
  start = lambda params: (params, optimizer.init(params))
  held = mapped(start, P(), (of_params, specs))(params)
  one = mapped(step, (of_params, specs, of_batch), (of_params, specs))
  for _ in range(4):
    held = one(*held, batch)

  def at_once(batch):
    held = start(params)
    for _ in range(4):
      held = step(*held, batch)
    return held

  rows = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
  want = jax.jit(jax.vmap(at_once, axis_name="data"))(rows)
  for spec, got, each in zip(*map(jax.tree.leaves, ((of_params, specs), held, want)), strict=True):
    if jnp.issubdtype(each.dtype, jax.dtypes.prng_key):
      continue
    whole = each.reshape(-1, *each.shape[2:]) if spec != P() else each[0]
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)
    if spec == P():  # one value indeed
      copies = [np.asarray(shard.data) for shard in got.addressable_shards]
      assert all((copy == copies[0]).all() for copy in copies)
