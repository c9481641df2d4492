"""Compressed gradients in your own train step, with plain `jax.shard_map`.

    JAX_NUM_CPU_DEVICES=8 python docs/examples/optax_shard_map.py

Eight workers on a mesh axis named "batch" fit a linear model. Gradients are sent in 8 bits, with
error feedback. The memory of error feedback is private to each worker.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import research as dx


def main(steps: int = 200) -> float:
  """Trains, and returns the last loss."""
  mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
  truth = jax.random.normal(jax.random.key(0), (16, 4))
  x = jax.random.normal(jax.random.key(1), (512, 16))
  y = x @ truth

  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),  # of each worker's gradient
    dx.aggregated(dx.error_feedback(dx.two_phase(dx.int8())), axis="batch"),
    optax.sgd(0.1, momentum=0.9),  # the same step on all workers
  )
  params = {"w": jnp.zeros((16, 4))}
  specs = dx.state_specs(optimizer, params, mesh, axis="batch")
  state = dx.init_state(optimizer, params, mesh, axis="batch")

  def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, jax.lax.pmean(loss, "batch")

  step = jax.jit(
    jax.shard_map(
      train_step,
      mesh=mesh,
      in_specs=(specs.params, specs.state, P("batch"), P("batch")),
      out_specs=(specs.params, specs.state, P()),
      check_vma=False,
    )
  )
  loss = jnp.inf
  for _ in range(steps):
    params, state, loss = step(params, state, x, y)
  return float(loss)


if __name__ == "__main__":
  print(f"loss {main():.2e}")
