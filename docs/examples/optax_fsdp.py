"""Compressed gradients between replicas whose parameters the compiler shards (FSDP).

    JAX_NUM_CPU_DEVICES=8 python docs/examples/optax_fsdp.py

There are two replicas of four devices each. The aggregator exchanges 8-bit gradients over the axis
"replica". On the axis "fsdp", `jax.jit` shards parameters, gradients and optimizer state.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import research as dx


def main(steps: int = 200) -> tuple[float, jax.Array]:
  """Trains, and returns the last loss and the parameters."""
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(auto, auto))
  truth = jax.random.normal(jax.random.key(0), (16, 4))
  x = jax.random.normal(jax.random.key(1), (512, 16))
  y = x @ truth

  optimizer = optax.chain(
    dx.aggregated(dx.error_feedback(dx.gather_mean(dx.int8())), axis="replica"), optax.adam(0.05)
  )
  sharding = NamedSharding(mesh, P("fsdp"))
  params = jax.device_put({"w": jnp.zeros((16, 4))}, sharding)
  specs = dx.state_specs(optimizer, params, mesh, axis="replica")
  state = dx.init_state(optimizer, params, mesh, axis="replica")

  def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, jax.lax.pmean(loss, "replica")

  mapped = jax.shard_map(
    train_step,
    mesh=mesh,
    in_specs=(specs.params, specs.state, P("replica"), P("replica")),
    out_specs=(specs.params, specs.state, P()),
    axis_names={"replica"},
    check_vma=False,
  )
  shardings = specs.params_shardings, specs.state_shardings
  step = jax.jit(mapped, out_shardings=(*shardings, NamedSharding(mesh, P())))
  loss = jnp.inf
  for _ in range(steps):
    params, state, loss = step(params, state, x, y)
  assert params["w"].sharding.is_equivalent_to(sharding, 2), "parameters stay sharded"
  return float(loss), params["w"]


if __name__ == "__main__":
  print(f"loss {main()[0]:.2e}")
