"""Hand-written parts of steps with Muon, Dion and block top-k, as baselines of bench.py.

A step consists of parts: the gradient, the exchange between workers and the update. Each part is a
function of one worker's values. `Running` compiles each part as a program of its own, and times
them one after the other. The parts compute the same steps as the library's methods, on the model
that `transformer` builds. Parameters are a dictionary by path; all matrices are kernels.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.baselines import by_hand_top_k as top_k

AXIS = "data"
Leaves = dict[str, jax.Array]  # by path, such as "layers_0/attention/query/kernel"


class Part(NamedTuple):
  """A part of a step: a function of one worker's values, and the names of these values."""

  name: str
  function: Callable[..., tuple[Any, ...]]
  takes: tuple[str, ...]
  gives: tuple[str, ...]


class Steps(NamedTuple):
  """The parts of a step in order, the values before the first step, and those of one worker."""

  parts: tuple[Part, ...]
  values: dict[str, Any]
  own: set[str]  # names of the values that differ between workers


def gradient(loss: Callable[[Leaves, jax.Array], jax.Array], params: str) -> Part:
  """Returns the part that computes each worker's loss and gradient."""

  def function(params, examples):
    value, grads = jax.value_and_grad(loss)(params, examples)
    return grads, value

  return Part("gradient", function, (params, "examples"), ("grads", "loss"))


def muon(loss, params: Leaves, rate=0.02, adam_rate=3e-3, beta=0.95, decay=0.1) -> Steps:
  """Averages the gradients, and updates matrices by Muon and all other leaves by AdamW."""
  adamw = optax.adamw(adam_rate, weight_decay=0.0)

  def update(params, momentum, adam, grads):
    matrices, new = {}, {}
    for name, m in momentum.items():
      m = new[name] = beta * m + grads[name]
      direction = newton_schulz(as_matrix(name, grads[name] + beta * m))
      step = math.sqrt(direction.shape[1] / direction.shape[0]) * direction
      matrices[name] = params[name] - rate * (decay * params[name] + step.reshape(m.shape))
    vectors, adam = adam_step(adamw, params, adam, grads)
    return matrices | vectors, new, adam

  mean = Part("mean", lambda grads: (jax.lax.pmean(grads, AXIS),), ("grads",), ("mean",))
  names = "params", "momentum", "adam"
  parts = gradient(loss, "params"), mean, Part("update", update, (*names, "mean"), names)
  momentum, rest = jax.tree.map(jnp.zeros_like, divided(params))
  values = {"params": params, "momentum": momentum, "adam": adamw.init(rest)}
  return Steps(parts, values, {"examples", "grads", "loss"})


def dion(loss, params: Leaves, rate=0.01, adam_rate=3e-3, rank=0.25, mu=0.95) -> Steps:
  """Updates matrices by Dion, and all other leaves by AdamW; workers have their own momenta."""
  adamw = optax.adamw(adam_rate)

  def factors(params, momentum, right, grads):
    b = {name: as_matrix(name, momentum[name] + grads[name]) for name in momentum}
    rest = divided(grads)[1]
    left, rest = jax.lax.pmean(({name: b[name] @ right[name] for name in b}, rest), AXIS)
    p = {name: jnp.linalg.qr(x)[0] for name, x in left.items()}
    r = jax.lax.pmean({name: b[name].T @ p[name] for name in b}, AXIS)
    new, moved, q = {}, {}, {}
    for name, x in r.items():
      shape = params[name].shape
      q[name] = x / jnp.linalg.norm(x, axis=0, keepdims=True)
      new[name] = (b[name] - (1 - mu) * p[name] @ x.T).reshape(shape)
      step = math.sqrt(b[name].shape[1] / b[name].shape[0]) * p[name] @ q[name].T
      moved[name] = params[name] - rate * step.reshape(shape)
    return params | moved, new, q, rest

  def others(params, adam, rest):
    vectors, adam = adam_step(adamw, params, adam, rest)
    return params | vectors, adam

  matrices, rest = divided(params)
  right = {}
  for number, (name, x) in enumerate(matrices.items()):
    m, n = as_matrix(name, x).shape
    key = jax.random.fold_in(jax.random.key(0), number)
    right[name] = jax.random.normal(key, (n, math.ceil(rank * min(m, n))))
  momentum = jax.tree.map(jnp.zeros_like, matrices)
  names = "params", "momentum", "right"
  parts = (
    gradient(loss, "params"),
    Part("factors and their exchange", factors, (*names, "grads"), (*names, "mean")),
    Part("AdamW", others, ("params", "adam", "mean"), ("params", "adam")),
  )
  values = {"params": params, "momentum": momentum, "right": right, "adam": adamw.init(rest)}
  return Steps(parts, values, {"examples", "grads", "loss", "momentum"})


def compressed(loss, params: Leaves, adam_rate=3e-3) -> Steps:
  """Exchanges the gradients by block top-k with error feedback, and updates by AdamW."""
  adamw = optax.adamw(adam_rate)

  def update(params, adam, mean):
    return adam_step(adamw, params, adam, mean)

  encode, gather, decode = exchange(params, 1.0)
  names = "params", "adam"
  parts = (
    gradient(loss, "params"),
    encode,
    gather,
    decode,
    Part("AdamW", update, (*names, "mean"), names),
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  values = {"params": params, "adam": adamw.init(params), "memory": zeros}
  return Steps(parts, values, {"examples", "grads", "loss", "memory", "payload"})


def sparse_loco(loss, params: Leaves, period=15, adam_rate=3e-3, outer=1.0) -> Steps:
  """Exchanges the changes of `period` local AdamW steps by block top-k with error feedback."""
  adamw = optax.adamw(adam_rate)

  def local(params, adam, grads):
    return adam_step(adamw, params, adam, grads)

  def change(params, local):
    return (jax.tree.map(jnp.subtract, params, local),)

  def move(params, mean):
    params = jax.tree.map(lambda x, change: x - outer * change, params, mean)
    return params, params

  encode, gather, decode = exchange(params, 0.95)
  steps = (
    gradient(loss, "local"),
    Part("AdamW", local, ("local", "adam", "grads"), ("local", "adam")),
  )
  parts = (
    *steps * period,
    Part("change", change, ("params", "local"), ("grads",)),
    *(encode, gather, decode),
    Part("outer step", move, ("params", "mean"), ("params", "local")),
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  values = {"params": params, "local": params, "adam": adamw.init(params), "memory": zeros}
  return Steps(parts, values, {"examples", "grads", "loss", "memory", "payload", "local", "adam"})


def exchange(params: Leaves, decay: float) -> tuple[Part, Part, Part]:
  """Returns the parts of an exchange by block top-k: encode, gather, decode and average."""
  plans = {name: top_k.plan(x.shape) for name, x in params.items()}

  def encode(grads, memory):
    corrected = jax.tree.map(lambda g, e: g + decay * e, grads, memory)
    found = {name: top_k.encode(x, plans[name]) for name, x in corrected.items()}
    payload = [one for one, _ in found.values()]
    together = (
      jnp.concatenate([one.codes for one in payload]),
      jnp.stack([one.table for one in payload]),
    )
    return together, {name: left for name, (_, left) in found.items()}

  def gather(payload):
    return (jax.lax.all_gather(payload, AXIS),)

  def decode(everyone):
    codes, tables = everyone
    mean, start = {}, 0
    for number, (name, plan) in enumerate(plans.items()):
      mine = codes[:, start : start + plan.bytes]
      mean[name] = top_k.mean(mine, tables[:, number], plan)
      start += plan.bytes
    return (mean,)

  return (
    Part("encode", encode, ("grads", "memory"), ("payload", "memory")),
    Part("gather", gather, ("payload",), ("everyone",)),
    Part("decode and mean", decode, ("everyone",), ("mean",)),
  )


def newton_schulz(x: jax.Array) -> jax.Array:
  """Orthogonalizes a matrix approximately, by five Newton-Schulz steps."""
  if x.shape[0] > x.shape[1]:
    return newton_schulz(x.T).T
  x = x / jnp.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x


def as_matrix(name: str, x: jax.Array) -> jax.Array:
  """Reshapes a kernel to a matrix; only the last dimension of attention's `out` is the output."""
  return x.reshape(-1, x.shape[-1]) if "attention/out" in name else x.reshape(x.shape[0], -1)


def divided(tree: Leaves) -> tuple[Leaves, Leaves]:
  """Splits the leaves into matrices and all others."""
  rest = {name: x for name, x in tree.items() if not name.endswith("kernel")}
  return {name: x for name, x in tree.items() if name not in rest}, rest


def adam_step(adamw, params: Leaves, state, grads: Leaves) -> tuple[Any, Any]:
  """Updates the leaves that have a gradient and no matrix optimizer of their own."""
  own = {name: params[name] for name in state[0].mu}
  updates, state = adamw.update({name: grads[name] for name in own}, state, own)
  return optax.apply_updates(own, updates), state


class Running:
  """Runs hand-written steps, each part as a compiled program, on all devices of this machine."""

  def __init__(self, steps: Steps, examples: np.ndarray):
    self.mesh = jax.make_mesh((len(examples),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    self.steps = steps
    self.programs = {part.name: self.compiled(part) for part in steps.parts}
    self.values = {name: self.placed(name, x) for name, x in steps.values.items()}
    self.values["examples"] = jax.device_put(
      examples, NamedSharding(self.mesh, PartitionSpec(AXIS))
    )

  def placed(self, name: str, tree: Any) -> Any:
    """Copies a value to the devices; a value of each worker gets a leading dimension."""
    count = len(self.mesh.devices)
    rows = lambda x: np.broadcast_to(x, (count, *jnp.shape(x)))
    copied = jax.tree.map(rows if name in self.steps.own else np.asarray, tree)
    return jax.device_put(copied, NamedSharding(self.mesh, self.spec(name)))

  def spec(self, name: str) -> PartitionSpec:
    return PartitionSpec(AXIS) if name in self.steps.own else PartitionSpec()

  def compiled(self, part: Part) -> Callable[..., tuple[Any, ...]]:
    own = self.steps.own

    def of_worker(*values):
      of_one = lambda name, x: jax.tree.map(lambda x: x[0], x) if name in own else x
      rows = lambda name, x: jax.tree.map(lambda x: x[None], x) if name in own else x
      found = part.function(*map(of_one, part.takes, values))
      return tuple(map(rows, part.gives, found))

    specs = tuple(map(self.spec, part.takes)), tuple(map(self.spec, part.gives))
    mapped = jax.shard_map(
      of_worker, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
    )
    replaced = tuple(i for i, name in enumerate(part.takes) if name in part.gives)
    return jax.jit(mapped, donate_argnums=replaced)

  def step(self) -> dict[str, float]:
    """Runs a step; returns the seconds of each part."""
    seconds = dict.fromkeys(self.programs, 0.0)
    for part in self.steps.parts:
      start = time.perf_counter()
      found = self.programs[part.name](*(self.values[name] for name in part.takes))
      jax.block_until_ready(found)
      seconds[part.name] += time.perf_counter() - start
      self.values.update(zip(part.gives, found, strict=True))
    return seconds
