"""Determines the shardings of state and data, over workers and inside a worker."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.aggregate.blockwise import (
  Blockwise,
  Cut,
  is_counter,
  of_shard,
  pieces,
  rejoined,
  shard_keys,
)
from research.comm.mesh import INNER_AXES
from research.core.base import EVERYONE, Aggregate, Array, Blocks, Key, Tree
from research.core.task import Batch, Data, Task, TrainState
from research.parallel import rules

_OF_ACTIVATIONS = ("seq",)  # axes that shard activations only, never parameters


def of_state(
  private: Tree,
  mesh: Mesh | None,
  workers: tuple[str, ...],
  shapes: Tree = None,
  cut: Cut | None = None,
  whole: Tree = None,
):
  """Returns the shardings of a TrainState or, with `mesh=None`, the specs for `shard_map`.

  Args:
    private: tree of bool, whether a leaf of the method's state has rows [P, ...].
    mesh: the devices.
    workers: the mesh axes over which rows are spread.
    shapes: the shapes of one worker's state; required if `cut` shards the state's leaves.
    cut: the sharding of leaves inside a worker.
    whole: leaves that are not sharded along `fsdp`.
  """
  whole = jax.tree.map(lambda _: False, private) if whole is None else whole
  shapes = (
    jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), private)
    if shapes is None
    else shapes
  )
  place = (lambda spec: spec) if mesh is None else (lambda spec: NamedSharding(mesh, spec))

  def leaf(is_private, shape, inner):
    return place(P(workers, *inner) if is_private else P(*inner))

  def node(is_private, shape, is_whole):
    if not isinstance(is_private, Blocks):
      return leaf(is_private, shape, spec_of(cut, shape.shape, "fsdp" if is_whole else None))
    blocks = lambda shape: () if cut is None or is_counter(shape) else (cut.names,)
    return jax.tree.map(lambda p, x: leaf(p, x, blocks(x)), is_private, shape)

  is_blocks = lambda node: isinstance(node, Blocks)
  method = jax.tree.map(node, private, shapes, whole, is_leaf=is_blocks)
  return TrainState(place(P()), place(P()), method)


def cut_of(axes: Mapping[str, int], task: Task) -> Cut | None:
  """Determines how a mesh shards a worker's leaves: by the task's rules, then along `fsdp`.

  Args:
    axes: sizes of the mesh axes by name.
    task: the task, with its sharding rules.

  Raises:
    ValueError: if an axis does not divide a dimension that it shards, or shards no dimension.

  Reference: Shoeybi et al. 2019, arXiv 1909.08053 (tensor parallelism); Rajbhandari et al. 2019,
    arXiv 1910.02054 (ZeRO, stage 3: `fsdp`).
  """
  sizes = {name: size for name, size in axes.items() if name in INNER_AXES and size > 1}
  if not sizes:
    return None
  inner = tuple((name, size) for name, size in sizes.items() if name not in _OF_ACTIVATIONS)
  named = rules.by_shape(dict(inner), task)

  def places(shape: tuple[int, ...]) -> tuple[int | None, ...]:
    of_rule, first = named.get(shape) or rules.of_rows(shape, named, dict(inner))
    whole = [d for d in range(first, len(shape)) if d not in of_rule.values()]
    cut = {**of_rule, "fsdp": _largest(shape, whole, dict(inner).get("fsdp", 1))}
    return tuple(cut.get(name) for name, _ in inner)

  around = tuple(name for name in sizes if name in _OF_ACTIVATIONS)
  return Cut(inner, places, around)


def replicas(axes: Mapping[str, int]) -> int:
  """Returns the number of devices of a worker that hold and send each shard of the parameters.

  Args:
    axes: sizes of the mesh axes by name.
  """
  return math.prod(size for name, size in axes.items() if name in _OF_ACTIVATIONS)


def _largest(shape: tuple[int, ...], dimensions: Sequence[int], size: int) -> int | None:
  """Returns the largest of `dimensions` that `size` divides; None if `size` divides none."""
  fitting = [d for d in dimensions if shape[d] % size == 0 and shape[d] >= size]
  return max(fitting, key=lambda d: shape[d], default=None)


def spec_of(
  cut: Cut | None, shape: tuple[int, ...], whole: str | None = None
) -> tuple[str | None, ...]:
  """Returns the axis that shards each dimension of a leaf, ignoring the axis `whole`.

  Args:
    cut: the sharding of the worker's leaves; None if no leaf is sharded.
    shape: the shape of the leaf.
    whole: an axis that must not shard the leaf.
  """
  places = cut.places(shape) if cut else ()
  named = zip(cut.names if cut else (), places, strict=True)
  names = {place: name for name, place in named if place is not None and name != whole}
  return tuple(names.get(d) for d in range(max(names, default=-1) + 1))


class PerShard(Blockwise):
  """Runs `blockwise` with one device per block, in a shard_map over the axes inside a worker.

  Each device aggregates its shard with the same shard of the other workers; there is no
  communication along the axes inside a worker.
  """

  def aggregate(self, tree, state, key, presence=EVERYONE):
    cut, pair = self.cut, of_shard(self.inner)
    told = {k: v for k, v in presence._asdict().items() if isinstance(v, jax.Array)}
    parts = pieces(tree, cut)
    specs = jax.tree.map(lambda x: P(*spec_of(cut, x.shape)), parts)
    rows = jax.tree.map(lambda x: P() if is_counter(x) else P(cut.names), state.part)

    def shard(parts, state, key, told):
      there = presence._replace(**told) if told else presence
      keys = shard_keys(key, cut, [lax.axis_index(name) for name in cut.names])
      held = jax.tree.map(lambda x: x if is_counter(x) else x[0], state)
      value, sent, after = pair.aggregate(parts, held, keys, there)
      return value, sent, jax.tree.map(lambda x: x if is_counter(x) else x[None], after)

    nested = jax.shard_map(
      shard,
      in_specs=(specs, rows, P(), P()),
      out_specs=(specs, specs, rows),
      axis_names={*cut.names, *cut.around},
      check_vma=False,
    )
    value, sent, after = nested(parts, state.part, key, told)
    return Aggregate(rejoined(value, tree), rejoined(sent, tree), Blocks(after))


class Inside(NamedTuple):
  """Sharding constraints on a worker's batch and gradients."""

  batch: Callable[[Batch], Batch]
  grads: Callable[[Tree], Tree]


ALONE = Inside(lambda batch: batch, lambda grads: grads)


def inside(axes: Mapping[str, int], cut: Cut | None, zero: int) -> Inside:
  """Shards a batch [b, ...] along `fsdp` if the axis divides b, and gradients according to `zero`.

  Args:
    axes: the axes of the mesh.
    cut: the sharding of the leaves.
    zero: the ZeRO stage. Along `fsdp`, stage 1 shards the state except the parameters; stage 2 also
      shards the gradients, and stage 3 the parameters as well.
  """
  size = axes.get("fsdp", 1)
  if size == 1:
    return ALONE
  constrain = lax.with_sharding_constraint
  along = lambda x: constrain(x, P("fsdp")) if x.shape[0] % size == 0 else x
  whole = "fsdp" if zero == 1 else None
  lie = lambda x: constrain(x, P(*spec_of(cut, x.shape, whole)))
  grads = (lambda grads: jax.tree.map(lie, grads)) if zero < 3 else ALONE.grads
  return Inside(lambda batch: jax.tree.map(along, batch), grads)


def of_data(rows: Any) -> Data:
  """Returns the partition specs of `Data`: examples by client; the other fields are replicated.

  Args:
    rows: the spec of the rows of examples.
  """
  return Data(rows, P(), P())


def jit(fn: Callable[..., Any], out_shardings: Any, **options: Any) -> Any:
  """Calls `jax.jit`, and applies `out_shardings` under JAX_DISABLE_JIT too.

  Args:
    fn: the function.
    out_shardings: as for `jax.jit`.
    **options: further options of `jax.jit`.
  """

  @functools.wraps(fn)
  def placed(*args, **kwargs):
    return jax.device_put(fn(*args, **kwargs), out_shardings)

  without = jax.config.values["jax_disable_jit"]
  return jax.jit(placed if without else fn, out_shardings=out_shardings, **options)


def place(
  mesh: Mesh, workers: tuple[str, ...], examples: Batch, sizes: np.ndarray, key: Key
) -> Data:
  """Places examples [P, n, ...] on the clients' devices; each process supplies only its own rows.

  Args:
    mesh: the devices.
    workers: the mesh axes over which clients are spread.
    examples: numpy arrays [P, n, ...].
    sizes: [P], number of examples per client.
    key: the typed key of the sampling order.
  """
  rows, everywhere = NamedSharding(mesh, P(workers)), NamedSharding(mesh, P())
  put = lambda x: on_devices(x, rows)
  return Data(
    jax.tree.map(put, examples),
    on_devices(sizes.astype(np.int32), everywhere),
    jit(lambda k: k, out_shardings=everywhere)(key),
  )


def on_devices(x: np.ndarray, sharding: NamedSharding) -> Array:
  """Creates a global array from a numpy array that every process has.

  Args:
    x: the full array.
    sharding: the sharding of the result.
  """
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
