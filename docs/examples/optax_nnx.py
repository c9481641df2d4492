"""Local SGD with compressed model changes in a training loop of Flax NNX.

    JAX_NUM_CPU_DEVICES=8 python docs/examples/optax_nnx.py

Eight workers take four local steps each between two exchanges. `as_optax` turns the whole method
into an optax optimizer. Every worker has its own model, so parameters have a leading worker axis.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import research as dx


class Network(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(8, 32, rngs=rngs)
    self.out = nnx.Linear(32, 1, rngs=rngs)

  def __call__(self, x):
    return self.out(jnp.tanh(self.hidden(x)))[:, 0]


def main(rounds: int = 60) -> float:
  """Trains, and returns the last loss."""
  mesh = jax.make_mesh((8,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
  x = jax.random.normal(jax.random.key(0), (512, 8))
  y = jnp.sin(x[:, 0]) + x[:, 1] * x[:, 2]

  graph, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
  method = dx.local_sgd(
    optax.sgd(0.05, momentum=0.9), dx.error_feedback(dx.gather_mean(dx.top_k(0.1))), period=4
  )
  optimizer = dx.as_optax(method, axis="workers")

  def loss_of(params, x, y):
    return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

  def round_(held, x, y):
    """Four local steps of one worker; the last one ends with an exchange."""
    held = jax.tree.map(lambda leaf: leaf[0], held)  # the row of this worker

    def step(held, _):
      params, state = held
      loss, grads = jax.value_and_grad(loss_of)(params, x, y)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), loss

    held, losses = jax.lax.scan(step, held, None, 4)
    return jax.tree.map(lambda leaf: leaf[None], held), jax.lax.pmean(losses[-1], "workers")

  rows = P("workers")
  on_workers = lambda f, i, o: jax.jit(
    jax.shard_map(f, mesh=mesh, in_specs=i, out_specs=o, check_vma=False)
  )
  start = lambda params: jax.tree.map(lambda leaf: leaf[None], (params, optimizer.init(params)))
  held = on_workers(start, P(), rows)(params)
  step = on_workers(round_, (rows, rows, rows), (rows, P()))
  loss = jnp.inf
  for _ in range(rounds):
    held, loss = step(held, x, y)
  nnx.update(model := nnx.merge(graph, params), jax.tree.map(lambda leaf: leaf[0], held[0]))
  assert jnp.allclose(loss_of(nnx.state(model, nnx.Param), x, y), loss, atol=0.05)
  return float(loss)


if __name__ == "__main__":
  print(f"loss {main():.3f}")
