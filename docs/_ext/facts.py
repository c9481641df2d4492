"""Facts computed by the library for an entry: payload, traffic, and whether a server can run it."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.analysis import wire
from research.core.base import Aggregator, Compressor
from research.core.method import Method
from research.server.halves import halves

SIDE = 1000
SHOWN = 1000  # rounds
LEAF = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
PARAMS = {"w": LEAF}
MODEL = {f"layer_{i}": jax.ShapeDtypeStruct((500, 500), jnp.float32) for i in range(4)}
SMALL = {name: jax.ShapeDtypeStruct((4, 4), jnp.float32) for name in MODEL}
DENSE = SIDE * SIDE * 4
FLAT = {"data": 8}
SLICED = {"slice": 2, "data": 4}


class Array(NamedTuple):
  name: str
  dtype: str
  shape: tuple[int, ...]
  bytes: int


class Sent(NamedTuple):
  """The traffic of one of eight workers in one exchange or round."""

  rows: list[dict[str, Any]]  # see `wire.table`
  total: float
  axes: Mapping[str, int]


def payload(compressor: Compressor) -> list[Array]:
  """Returns the arrays of a payload for a leaf of a million float32 elements."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  found = jax.eval_shape(compressor.encode, LEAF, key, key)
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return [
    Array(
      jax.tree_util.keystr(path, simple=True, separator=".") or "values",
      x.dtype.name,
      x.shape,
      math.prod(x.shape) * x.dtype.itemsize,
    )
    for path, x in leaves
  ]


def exchange(aggregator: Aggregator) -> Sent:
  """Returns the traffic of one exchange of a leaf of a million float32 elements."""

  def one(tree: Any) -> Any:
    return aggregator.aggregate(tree, aggregator.init(tree), jax.random.key(0)).value

  return _sent(one, PARAMS)


def rounds_of(method: Method) -> tuple[list[tuple[int, float]], Mapping[str, int]]:
  """Counts the bytes of each round for a model of a million parameters in four leaves.

  Returns:
    Pairs (number of rounds, bytes), one per run of rounds with equal bytes, and the worker axes.

  Raises:
    ValueError: if the traffic is random, and therefore not statically known.
  """

  def one(state: Any, grads: Any) -> Any:
    key = jax.random.key(0)
    local = method.begin(state)
    for _ in range(min(method.local_steps, 2)):  # local steps send nothing
      local = method.step(grads, local, state, key=key, grad_fn=lambda params: grads)
    return method.sync(local, state, key=key)

  def read(axes: Mapping[str, int]) -> np.ndarray:
    size = math.prod(axes.values())
    init = lambda params: method.init(params)
    program = jax.make_jaxpr(init, axis_env=list(axes.items()), return_shape=True)
    state = program(MODEL)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), SMALL)
    first = lambda: jax.vmap(lambda _: method.init(zeros), axis_name="data")(jnp.arange(size))
    counters = lambda: jax.tree.map(lambda x: x[0], first())
    return wire.RoundTraffic(one, state, MODEL, axes=axes, first=counters).between(0, SHOWN).sent

  sent, axes = _over(read)
  changes = [0, *(np.flatnonzero(np.diff(sent)) + 1), len(sent)]
  return [(b - a, float(sent[a])) for a, b in itertools.pairwise(changes)], axes


def _sent(program: Any, tree: Any) -> Sent:
  found, axes = _over(lambda axes: wire.traffic(program, tree, axes=axes))
  return Sent(wire.table(found), sum(wire.by_axis(found).values()), axes)


def _over(read: Callable[[Mapping[str, int]], Any]) -> tuple[Any, Mapping[str, int]]:
  """Reads traffic over eight workers, which form slices if the axis `slice` is needed."""
  try:
    return read(FLAT), FLAT
  except (NameError, ValueError) as error:
    if "slice" not in str(error):
      raise
    return read(SLICED), SLICED


@functools.cache
def _example() -> dict[str, jax.ShapeDtypeStruct]:
  return {"x": jax.ShapeDtypeStruct((3, 2), jnp.float32)}


def not_served(method: Method) -> str:
  """Returns why a server cannot run a method; '' if it can."""
  try:
    halves(method, _example())
  except ValueError as error:
    return str(error)
  return ""
