"""Runs minimal hand-written JAX loops, one per case, as the baselines of bench.py.

The case's flags give the model, loss, workers, batch, optimizer and steps per dispatch. Batches are
drawn with replacement. The loops do not evaluate or save checkpoints. They measure only the loss,
and fetch it once per dispatch, as the library's loop does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from research.training.config import Config


def least_squares(config: dict[str, Any]) -> Callable[[int], None]:
  """Averages eight workers' gradients of the mean squared error, and then makes an SGD step."""
  import jax.numpy as jnp

  examples = load(config)
  x, y = jnp.asarray(examples["x"]), jnp.asarray(examples["y"])

  def loss(w, x, y):
    return 0.5 * jnp.mean((x @ w - y) ** 2)

  def update(w, grads):
    return w - 0.1 * grads

  return dispatches(config, loss, update, jnp.zeros(x.shape[-1]), x, y)


def digits(config: dict[str, Any]) -> Callable[[int], None]:
  """Averages eight workers' gradients of a 64-128-10 perceptron, and makes a heavy-ball step."""
  import jax
  import jax.numpy as jnp

  examples = load(config)
  x = jnp.asarray(examples["x"].reshape(*examples["x"].shape[:2], -1) / 16, jnp.float32)
  y = jnp.asarray(examples["y"])

  def loss(params, x, y):
    w, _ = params
    hidden = jax.nn.relu(x @ w["a"] + w["b"])
    logits = jax.nn.log_softmax(hidden @ w["c"] + w["d"])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))

  def update(params, grads):
    w, momentum = params
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads[0])
    return jax.tree.map(lambda w, m: w - 0.1 * m, w, momentum), momentum

  keys = jax.random.split(jax.random.key(0))
  w = {
    "a": jax.random.normal(keys[0], (64, 128)) / 8,
    "b": jnp.zeros(128),
    "c": jax.random.normal(keys[1], (128, 10)) / 11,
    "d": jnp.zeros(10),
  }
  return dispatches(config, loss, update, (w, jax.tree.map(jnp.zeros_like, w)), x, y)


def dispatches(config, loss, update, state, x, y) -> Callable[[int], None]:
  """Runs mini-batch steps, with `steps_per_dispatch` steps in one scan."""
  import jax
  import jax.numpy as jnp

  workers, batch = x.shape[0], int(config["batch_size"]) // x.shape[0]

  def step(data, state, index):
    x, y = data
    take = jax.vmap(lambda rows, i: rows[i])
    value, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(
      state, take(x, index), take(y, index)
    )
    return update(state, jax.tree.map(lambda g: jnp.mean(g, 0), grads)), jnp.mean(value)

  def run(state, data, key, length):
    index = jax.random.randint(key, (length, workers, batch), 0, data[0].shape[1])
    return jax.lax.scan(partial(step, data), state, index)

  run = jax.jit(run, static_argnames="length", donate_argnums=0)
  return advancing(config, state, lambda state, i, n: run(state, (x, y), jax.random.key(i), n))


def a9a(config: dict[str, Any]) -> Callable[[int], None]:
  """Sums the logistic gradients of twenty workers over all their rows, and then makes a step."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  examples = load(config)
  x, y = jnp.asarray(examples["x"]), jnp.asarray(examples["y"], jnp.float32)
  present = jnp.asarray(np.abs(examples["x"]).sum(-1) > 0, jnp.float32)
  total = float(jnp.sum(present))

  def loss(params, x, y, present):
    logits = (x @ params[0])[:, 0] + params[1]
    return jnp.sum(present * (jax.nn.softplus(logits) - y * logits)) / total

  def step(data, params, _):
    value, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0, 0))(params, *data)
    moved = jax.tree.map(lambda p, g: p - 1.0 * jnp.sum(g, 0), params, grads)
    return moved, jnp.sum(value)

  def run(params, data, length):
    return jax.lax.scan(partial(step, data), params, None, length)

  run = jax.jit(run, static_argnames="length", donate_argnums=0)
  params = (jnp.zeros((x.shape[-1], 1)), jnp.zeros(()))
  return advancing(config, params, lambda params, i, n: run(params, (x, y, present), n))


def fed_avg(config: dict[str, Any]) -> Callable[[int], None]:
  """Runs FedAvg: each device trains its clients in turn, and gathers an epoch's data at once."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec as P

  examples = load(config)
  x = jnp.asarray(examples["x"].reshape(*examples["x"].shape[:2], -1))  # [clients, 600, 784] uint8
  y = jnp.asarray(examples["y"])
  clients, each = y.shape
  cohort, batch = 10, 10
  devices = max(n for n in range(1, jax.device_count() + 1) if cohort % n == 0)
  mesh = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

  def loss(w, x, y):
    hidden = jax.nn.relu(x @ w[0] + w[1])
    hidden = jax.nn.relu(hidden @ w[2] + w[3])
    logits = jax.nn.log_softmax(hidden @ w[4] + w[5])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))

  def local(w, x, y, ids, keys):
    def client(of_client):
      number, key = of_client
      order = jax.random.permutation(key, each).reshape(-1, batch)
      epoch = x[number, order].astype(jnp.float32) / 255, y[number, order]

      def step(w, of_step):
        value, grads = jax.value_and_grad(loss)(w, *of_step)
        return jax.tree.map(lambda w, g: w - 0.1 * g, w, grads), value

      return jax.lax.scan(step, w, epoch)

    models, losses = jax.lax.map(client, (ids, keys))
    total = jax.tree.map(lambda m: jnp.sum(m, 0), models)
    return jax.tree.map(lambda t: jax.lax.psum(t, "d") / cohort, total), jnp.mean(losses)[None]

  local = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P(), P(), P(), P("d"), P("d")),
    out_specs=(P(), P("d")),
    check_vma=False,
  )

  def run(w, x, y, key, length):
    def one(w, key):
      choice, order = jax.random.split(key)
      ids = jax.random.choice(choice, clients, (cohort,), replace=False)
      return local(w, x, y, ids, jax.random.split(order, cohort))

    return jax.lax.scan(one, w, jax.random.split(key, length * batch // each))

  run = jax.jit(run, static_argnames="length", donate_argnums=0)
  keys = jax.random.split(jax.random.key(0), 3)
  sizes = ((784, 200), (200, 200), (200, 10))
  w = []
  for key, size in zip(keys, sizes, strict=True):
    w += [jax.random.normal(key, size) / size[0] ** 0.5, jnp.zeros(size[1])]
  return advancing(config, w, lambda w, i, n: run(w, x, y, jax.random.key(i), n))


def advancing(config, state, run) -> Callable[[int], None]:
  """Returns `advance(steps)`, which fetches a dispatch's losses while the next dispatch runs."""
  import jax

  held = [state]

  def advance(steps: int) -> None:
    length, before = config["steps_per_dispatch"], None
    for i in range(steps // length):
      held[0], losses = run(held[0], i, length)
      if before is not None:
        jax.device_get(before)
      before = losses
    jax.device_get(before)

  return advance


def load(config: dict[str, Any], test: bool = False) -> dict[str, Any]:
  """Loads the training examples by worker or, with `test`, the test examples by device."""
  from research.training import assemble

  settings = Config(**config)
  problem = assemble.assemble(settings, assemble.check(settings))
  if not test:
    return problem.examples
  assert problem.test is not None
  return problem.test[0]
