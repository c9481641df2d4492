"""Runs minimal hand-written JAX programs on several hosts, as baselines of bench.py's suite hosts.

    python experiments/baselines/by_hand_hosts.py dense 200 16

A launcher starts one process per host. The arguments are METHOD, steps, and steps per dispatch. The
program trains a 784-1024-1024-10 perceptron on MNIST by SGD with a learning rate of 0.1. Each host
draws 64 images per step with replacement. Process 0 prints a JSON line: the milliseconds per step
of each dispatch except the first two, and the last loss.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.baselines.by_hand import load

RATE, BATCH, PERIOD, RANK, FRACTION, GROUP = 0.1, 64, 8, 4, 0.01, 128
SIZES = (784, 1024, 1024, 10)
Step = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]


def init() -> list[tuple[jax.Array, jax.Array]]:
  keys = jax.random.split(jax.random.key(0), len(SIZES))
  he = lambda key, n, m: jax.random.normal(key, (n, m)) * (2 / n) ** 0.5
  pairs = zip(keys, SIZES[:-1], SIZES[1:], strict=False)
  return [(he(key, n, m), jnp.zeros(m)) for key, n, m in pairs]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  for w, b in params[:-1]:
    x = jax.nn.relu(x @ w + b)
  logits = jax.nn.log_softmax(x @ params[-1][0] + params[-1][1])
  return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))


def descend(params: Any, grads: Any) -> Any:
  return jax.tree.map(lambda p, g: p - RATE * g, params, grads)


def dense(params: Any) -> tuple[Any, Step]:
  """Averages the gradients."""

  def step(params, x, y):
    value, grads = jax.value_and_grad(loss)(params, x, y)
    return descend(params, jax.lax.pmean(grads, "data")), value

  return params, step


def int8(params: Any) -> tuple[Any, Step]:
  """Sends each part of the gradient as grouped int8 to one worker, which returns the mean."""
  flat, unravel = ravel_pytree(params)
  count = jax.device_count()
  size = -(-flat.size // (count * GROUP)) * count * GROUP

  def encode(x):
    groups = x.reshape(-1, GROUP)
    scale = jnp.max(jnp.abs(groups), 1, keepdims=True) / 127
    return jnp.round(groups / jnp.maximum(scale, 1e-30)).astype(jnp.int8), scale

  decode = lambda q, scale: q * scale
  shares = lambda q: q.reshape(count, -1, q.shape[-1])
  swap = lambda x: jax.lax.all_to_all(shares(x), "data", 0, 0)
  gather = lambda x: jax.lax.all_gather(x, "data")

  def step(state, x, y):
    flat, own, servers = state
    value, grads = jax.value_and_grad(lambda p: loss(unravel(p), x, y))(flat)
    corrected = own + jnp.pad(grads, (0, size - grads.size))
    q, scale = encode(corrected)
    own = corrected - decode(q, scale).reshape(-1)
    mean = servers + decode(swap(q), swap(scale)).mean(0).reshape(-1)
    q, scale = encode(mean)
    servers = mean - decode(q, scale).reshape(-1)
    found = decode(gather(q), gather(scale)).reshape(-1)[: flat.size]
    return (flat - RATE * found, own, servers), value

  return (flat, jnp.zeros(size), jnp.zeros(size // count)), step


def top_k(params: Any) -> tuple[Any, Step]:
  """Sends the largest 1% of each leaf with the positions, and keeps the rest in a memory."""

  def exchange(x):
    flat = x.reshape(-1)
    _, places = jax.lax.top_k(jnp.abs(flat), max(1, int(FRACTION * flat.size)))
    values = flat[places]
    all_values, all_places = (jax.lax.all_gather(part, "data") for part in (values, places))
    mean = jnp.zeros_like(flat).at[all_places].add(all_values / jax.device_count())
    return mean.reshape(x.shape), flat.at[places].set(0).reshape(x.shape)

  def step(state, x, y):
    params, memory = state
    value, grads = jax.value_and_grad(loss)(params, x, y)
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.add, grads, memory))
    mean, memory = (treedef.unflatten(part) for part in zip(*map(exchange, leaves), strict=True))
    return (descend(params, mean), memory), value

  return (params, jax.tree.map(jnp.zeros_like, params)), step


def power_sgd(params: Any) -> tuple[Any, Step]:
  """Sends rank-4 factors of all matrices in two messages; the first message includes the biases."""
  start = lambda i, w: jax.random.normal(jax.random.key(i), (w.shape[1], RANK))
  starts = [start(i, w) for i, (w, _) in enumerate(params)]

  def step(state, x, y):
    params, memory, q = state
    value, grads = jax.value_and_grad(loss)(params, x, y)
    m = [g + e for (g, _), e in zip(grads, memory, strict=True)]
    vector, unravel = ravel_pytree(
      ([a @ b for a, b in zip(m, q, strict=True)], [g for _, g in grads])
    )
    left, biases = unravel(jax.lax.pmean(vector, "data"))
    p = [jnp.linalg.qr(x)[0] for x in left]
    own = [a.T @ b for a, b in zip(m, p, strict=True)]
    vector, unravel = ravel_pytree(own)
    q = unravel(jax.lax.pmean(vector, "data"))
    products = lambda q: [a @ b.T for a, b in zip(p, q, strict=True)]
    memory = [a - b for a, b in zip(m, products(own), strict=True)]
    return (descend(params, list(zip(products(q), biases, strict=True))), memory, q), value

  return (params, [jnp.zeros_like(w) for w, _ in params], starts), step


def local(params: Any) -> tuple[Any, Step]:
  """Makes local steps, and averages the models after every eighth step."""

  def step(state, x, y):
    params, number = state
    value, grads = jax.value_and_grad(loss)(params, x, y)
    params, number = descend(params, grads), number + 1
    average = lambda p: jax.lax.pmean(p, "data")
    return (jax.lax.cond(number % PERIOD == 0, average, lambda p: p, params), number), value

  return (params, jnp.int32(0)), step


METHODS = {"dense": dense, "int8": int8, "top_k": top_k, "power_sgd": power_sgd, "local": local}


def main(method: str, steps: int, dispatch: int) -> None:
  """Trains the model, and prints the timings."""
  count, number = (int(os.environ[f"JAX_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
  jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
  mesh = Mesh(np.asarray(jax.devices()), ("data",))
  examples = load({"task": "mnist()", "mesh": f"data:{jax.device_count()}"})
  here = jax.process_index()
  x, y = (jnp.asarray(examples[name][here]) for name in ("x", "y"))
  state, step = METHODS[method](init())

  @partial(jax.jit, donate_argnums=0)
  @partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(P(), P("data"), P("data"), P()),
    out_specs=(P(), P("data")),
    check_vma=False,
  )
  def run(state, x, y, key):
    mine = jax.random.fold_in(key, jax.lax.axis_index("data"))

    def one(state, key):
      rows = jax.random.randint(key, (BATCH,), 0, x.shape[1])
      images = x[0, rows].reshape(BATCH, -1) / jnp.float32(255)
      return step(state, images, y[0, rows].astype(jnp.int32))

    state, losses = jax.lax.scan(one, state, jax.random.split(mine, dispatch))
    return state, losses[None]

  rows = NamedSharding(mesh, P("data"))
  whole = lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)[None])
  x, y = whole(x), whole(y)
  seconds, losses = [], None
  for number in range(steps // dispatch):
    start = time.perf_counter()
    state, losses = run(state, x, y, jax.random.key(number))
    jax.block_until_ready(losses)
    seconds.append(time.perf_counter() - start)
  assert losses is not None
  if here == 0:
    last = np.asarray(losses.addressable_shards[0].data)[0, -1]
    found = {"milliseconds": [1000 * s / dispatch for s in seconds[2:]], "loss": float(last)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
