"""Compiles a served method's functions for workers, servers and replays."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.comm import collectives
from research.core.base import Array, Key, Params, State, Tree, Uplink
from research.core.method import Method
from research.core.task import Batch
from research.parallel.job import Job
from research.parallel.local_phase import local_phase
from research.server.halves import Halves, halves

_MESSAGE = 0x70757368


class Keys(NamedTuple):
  """The random keys of a run, equal to the keys of a simulated run with the same seed."""

  params: Key
  run: Key
  data: Key


def keys_of(seed: int) -> Keys:
  init, data = jax.random.split(jax.random.key(seed))
  params, run = jax.random.split(init)
  return Keys(params, run, data)


def message_key(key: Key, worker: Array, number: Array) -> Key:
  """Returns the key of one push, equal on the worker and on the server."""
  return jax.random.fold_in(collectives.key_of(jax.random.fold_in(key, _MESSAGE), worker), number)


class WorkerState(NamedTuple):
  """The state that a worker keeps between pieces of work; a new incarnation initializes it."""

  own: State  # state of the method, such as the state of an inner optimizer
  memory: State  # state of the uplink: values that are not yet sent


class Worker(NamedTuple):
  """A worker's compiled functions. `worker`, `number` and `first` are int32."""

  held: Callable[[Params], WorkerState]
  # (params, held, examples, size, worker, first) -> Local after the period, mean loss
  steps: Callable[..., tuple[Any, Array]]
  # runs one step at a time, while time is left, and sums the losses
  begin: Callable[[Params, WorkerState], tuple[Any, Array]]
  # (local, total, params, held, examples, size, worker, first)
  step: Callable[..., tuple[Any, Array]]
  # (local, params, held, worker, number) -> payloads by leaf, WorkerState
  end: Callable[..., tuple[list[Tree], WorkerState]]


class _From(Method):
  """Wraps a method: rounds have `steps` steps and continue from a given Local."""

  inner: Method
  local: Any
  steps: int

  def begin(self, state):
    del state
    return self.local

  def step(self, grads, local, state, *, key, grad_fn=None):
    return self.inner.step(grads, local, state, key=key, grad_fn=grad_fn)

  @property
  def local_steps(self):
    return self.steps


def worker(job: Job, apart: Halves, keys: Keys) -> Worker:
  """Compiles a worker's functions, for a job whose clients are the workers.

  The worker runs the steps of `local_phase`. In local steps first, first + 1, ..., the batches are
  those of the simulated worker with the same number.

  Args:
    job: the resolved job, with the batch size of one worker.
    apart: the method's halves.
    keys: the random keys of the run.
  """
  method = apart.method

  def drawn(size, worker, first, period):
    if job.batch_size is None:
      return None
    own = jax.random.fold_in(keys.data, worker)
    sample = lambda step: job.task.sample(size, step, own, batch_size=job.batch_size)
    return jax.vmap(sample)(first + jnp.arange(period, dtype=jnp.int32))

  def steps(local, state, period, examples, size, worker, first):
    key = jax.random.fold_in(collectives.key_of(keys.run, worker), first)
    index = drawn(size, worker, first, period)
    one = job._replace(method=_From(method, local, period))
    local, measured = local_phase(one, state, examples, size, index, key)
    return local, measured["loss"]

  def end(local, params, held, worker, number):
    key = message_key(keys.run, worker, number)
    message, own = apart.message(local, params, held.own, key)
    payloads, memory = apart.link.encode(message, held.memory, key)
    return payloads, WorkerState(own, memory)

  def together(params, held, examples, size, worker, first):
    state = apart.state(params, held.own)
    period = method.local_steps
    local, losses = steps(method.begin(state), state, period, examples, size, worker, first)
    return local, jnp.mean(losses)

  def begin(params, held):
    return method.begin(apart.state(params, held.own)), jnp.zeros(())

  def step(local, total, params, held, examples, size, worker, first):
    state = apart.state(params, held.own)
    local, losses = steps(local, state, 1, examples, size, worker, first)
    return local, total + losses[0]

  held = lambda params: WorkerState(apart.own(params), apart.link.init(params))
  return Worker(*map(jax.jit, (held, together, begin, step, end)))


Shapes = dict[str, jax.ShapeDtypeStruct]  # shapes of a model's leaves, by name and in order


def shapes_of(params: Params) -> Shapes:
  """Returns the named shapes of parameters that are given as arrays or shapes."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  return {jax.tree_util.keystr(path): struct(leaf) for path, leaf in leaves}


def payload_shapes(link: Uplink, shapes: Shapes) -> list[Tree]:
  """Returns the shapes of a push's payloads, per leaf."""
  encode = lambda tree: link.encode(tree, link.init(tree), jax.random.key(0))[0]
  return jax.eval_shape(encode, list(shapes.values()))


def cut(shapes: Shapes, shards: int) -> list[list[int]]:
  """Distributes leaves over shards, in order of decreasing size, each to the least loaded shard.

  Args:
    shapes: the shapes of the model's leaves.
    shards: the number of shards.

  Returns:
    The indices of each shard's leaves, in ascending order.

  Raises:
    ValueError: if there are more shards than leaves.
  """
  leaves = list(shapes.values())
  if shards > len(leaves):
    raise ValueError(f"the model has {len(leaves)} leaves, which are not cut further")
  found: list[list[int]] = [[] for _ in range(shards)]
  load = [0] * shards
  for leaf in sorted(range(len(leaves)), key=lambda i: -leaves[i].size):
    least = load.index(min(load))
    found[least].append(leaf)
    load[least] += max(leaves[leaf].size, 1)
  return [sorted(leaves) for leaves in found]


class Side(NamedTuple):
  """The server's compiled half for one shard, with leaves by name."""

  init: Callable[[dict[str, Array]], State]  # returns the state other than the leaves
  # (params, state, payloads, then, worker, number, staleness) -> params, state: applies one push
  one: Callable[..., tuple[dict[str, Array], State]]
  # (total, payloads, share, worker, number) -> total, then an update from it: applies a round
  add: Callable[..., dict[str, Array]]
  mean: Callable[..., tuple[dict[str, Array], State]]  # (params, state, total)


def side(method: Method, keys: Keys, shapes: Shapes, leaves: Sequence[int]) -> Side:
  """Compiles the server's half for the shard that has the given leaves.

  Args:
    method: the served method.
    keys: the random keys of the run.
    shapes: the shapes of the model's leaves.
    leaves: the indices of the shard's leaves.
  """
  name, like = list(shapes), list(shapes.values())
  apart = halves(method, {name[leaf]: like[leaf] for leaf in leaves})

  def decoded(payloads, worker, number):
    key = message_key(keys.run, worker, number)
    pairs = zip(leaves, payloads, strict=True)
    return {
      name[leaf]: apart.link.decode(payload, like[leaf], key, leaf) for leaf, payload in pairs
    }

  def one(params, state, payloads, then, worker, number, staleness):
    moved = jax.tree.map(jnp.subtract, params, then)
    return apart.receive(decoded(payloads, worker, number), params, state, staleness, moved)

  def add(total, payloads, share, worker, number):
    message = decoded(payloads, worker, number)
    return jax.tree.map(lambda t, x: t + share * x, total, message)

  def mean(params, state, total):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return apart.receive(total, params, state, jnp.int32(0), zeros)

  return Side(*map(jax.jit, (apart.init, one, add, mean)))


def shares(weights: Sequence[float]) -> np.ndarray:
  """Normalizes the weights of a round's workers, so that the sum is one; returns float32 [W]."""
  given = np.asarray(weights, np.float64)
  return (given / given.sum()).astype(np.float32)


def looks_across(method: Method, shapes: Shapes, parts: Sequence[Sequence[int]]) -> bool:
  """Returns whether the server's result on all leaves differs from its result shard by shard.

  Clipping by the global norm is an example. The test applies two updates with random messages.
  """
  random = np.random.default_rng(0)
  draw = lambda: {
    name: np.asarray(random.normal(size=x.shape) * 10.0 ** random.integers(-2, 3), x.dtype)
    for name, x in shapes.items()
  }
  params, messages = draw(), [draw(), draw()]

  @jax.jit
  def run(params: dict[str, Array], messages: Sequence[dict[str, Array]]) -> dict[str, Array]:
    apart = halves(method, params)
    held = apart.init(params)
    for message in messages:
      still = jax.tree.map(jnp.zeros_like, params)
      params, held = apart.receive(message, params, held, jnp.int32(1), still)
    return params

  whole, order = run(params, messages), list(shapes)
  for leaves in parts:
    of_part = partial(_chosen, [order[leaf] for leaf in leaves])
    alone = run(of_part(params), [of_part(message) for message in messages])
    if any(not np.allclose(alone[name], whole[name], rtol=1e-5, atol=1e-7) for name in alone):
      return True
  return False


def _chosen(chosen: Sequence[str], tree: Mapping[str, Any]) -> dict[str, Any]:
  return {name: tree[name] for name in chosen}


def examples_of(examples: Batch, sizes: np.ndarray, worker: int) -> tuple[Batch, Any]:
  """Returns one worker's rows of [W, n, ...], and their number."""
  return jax.tree.map(lambda x: x[worker], examples), np.int32(sizes[worker])
