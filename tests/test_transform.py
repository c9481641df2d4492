"""The optax face: aggregators and whole methods in a train step of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from problems import SIMULATED, distance, regression, simulated, split
from table import METHODS, NAMES

from research.aggregate.mean import mean
from research.comm import mesh as meshes
from research.methods.transform import aggregated, as_optax


@pytest.mark.parametrize("execution", ["vmap", "shard_map"])
@pytest.mark.parametrize("name", NAMES)
def test_the_optax_face_is_the_method(name, execution):
  """`as_optax` in a train step of one's own, all examples in each step."""
  method, task = METHODS[name], regression()
  examples, _ = split(task, (30,) * 8)
  params = task.init(jax.random.split(jax.random.key(0))[0])
  optimizer = as_optax(method)

  def steps(batch):
    def one(carry, _):
      params, state = carry
      grads = jax.grad(task.loss)(params, batch, None)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    count = 4 * method.period
    return jax.lax.scan(one, (params, optimizer.init(params)), None, count)[0]

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
  want = simulated(name, 4)
  assert distance(deployed, want) <= 1e-6
  if name in ("sgd", "adam", "accumulation"):
    assert distance(jax.tree.map(lambda x: x[3], local), want) <= 1e-6


def test_aggregated_chains_with_optax():
  """Clip each worker's gradient, average, step: against numpy."""
  grads = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
  clipped = grads * np.minimum(1, 0.5 / np.linalg.norm(grads, axis=1, keepdims=True))
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), aggregated(mean()), optax.sgd(2.0))

  def update(g):
    return optimizer.update(g, optimizer.init(g), g)[0]

  got = jax.vmap(update, axis_name="data")(grads)
  np.testing.assert_allclose(np.asarray(got), np.tile(-2 * clipped.mean(0), (8, 1)), rtol=1e-5)
