"""Where arrays lie: private rows with their workers, shared leaves everywhere or cut by `fsdp`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.aggregate.blockwise import (
  Cut,
  blockwise,
  is_counter,
  of_shard,
  pieces,
  rejoined,
  shard_key,
)
from research.base import Aggregate, Aggregator, Array, Batch, Blocks, Data, Key, TrainState, Tree


def of_state(private: Tree, mesh: Mesh | None, workers: tuple[str, ...], shapes: Tree = None):
  """Shardings of a TrainState, or with `mesh=None` the specs that `shard_map` takes.

  Args:
    private: which leaves of the method's state have rows [P, ...].
    mesh: the devices.
    workers: the mesh axes over which rows are spread.
    shapes: of one worker's state, where its leaves are cut along `fsdp` too.
  """
  shapes = (
    jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), private)
    if shapes is None
    else shapes
  )
  size = mesh.shape.get("fsdp", 1) if mesh is not None else 1
  place = (lambda spec: spec) if mesh is None else (lambda spec: NamedSharding(mesh, spec))

  def leaf(is_private, shape, inner=None):
    inner = fsdp_spec(shape.shape, size) if inner is None else inner
    return place(P(workers, *inner) if is_private else P(*inner))

  def node(is_private, shape):
    if not isinstance(is_private, Blocks):
      return leaf(is_private, shape)
    blocks = lambda shape: () if size == 1 or is_counter(shape) else ("fsdp",)
    return jax.tree.map(lambda p, x: leaf(p, x, blocks(x)), is_private, shape)

  is_blocks = lambda node: isinstance(node, Blocks)
  return TrainState(place(P()), place(P()), jax.tree.map(node, private, shapes, is_leaf=is_blocks))


def fsdp_cut(axes: Mapping[str, int]) -> Cut | None:
  """How `fsdp` cuts leaves; None where it does not.

  Reference: Rajbhandari et al. 2019, arXiv 1910.02054 (ZeRO, stage 3).
  """
  size = axes.get("fsdp", 1)
  return Cut("fsdp", size, partial(fsdp_dimension, size=size)) if size > 1 else None


def fsdp_dimension(shape: tuple[int, ...], size: int) -> int | None:
  """The largest dimension that `size` divides; leaves without one lie everywhere."""
  fitting = [d for d, length in enumerate(shape) if length % size == 0 and length >= size]
  return max(fitting, key=lambda d: shape[d], default=None)


def fsdp_spec(shape: tuple[int, ...], size: int) -> tuple[str | None, ...]:
  """Which dimension of a leaf lies along `fsdp`."""
  cut = fsdp_dimension(shape, size) if size > 1 else None
  return () if cut is None else tuple("fsdp" if d == cut else None for d in range(cut + 1))


def per_shard(inner: Aggregator, cut: Cut) -> Aggregator:
  """`blockwise` where each block has its device: a shard_map over the axis, inside the worker's.

  Each device aggregates the shard that it holds with the same shard of the other workers; nothing
  crosses the axis.
  """
  pair = of_shard(inner)
  spec = lambda x: P(*fsdp_spec(x.shape, cut.size))

  def aggregate(tree, state, key):
    parts = pieces(tree, cut)
    specs = jax.tree.map(spec, parts)
    rows = jax.tree.map(lambda x: P() if is_counter(x) else P(cut.axis), state.part)

    def shard(parts, state, key):
      own = shard_key(key, lax.axis_index(cut.axis))
      held = jax.tree.map(lambda x: x if is_counter(x) else x[0], state)
      value, sent, after = pair.aggregate(parts, held, jnp.stack([own, key]))
      return value, sent, jax.tree.map(lambda x: x if is_counter(x) else x[None], after)

    nested = jax.shard_map(
      shard,
      in_specs=(specs, rows, P()),
      out_specs=(specs, specs, rows),
      axis_names={cut.axis},
      check_vma=False,
    )
    value, sent, after = nested(parts, state.part, key)
    return Aggregate(rejoined(value, tree, cut), rejoined(sent, tree, cut), Blocks(after))

  return Aggregator(blockwise(inner, cut).init, aggregate, inner.traits)


def split_batch(axes: Mapping[str, int], batch: Batch) -> Batch:
  """Tells the compiler to cut a worker's batch [b, ...] along `fsdp`, where b allows it."""
  size = axes.get("fsdp", 1)
  cut = lambda x: lax.with_sharding_constraint(x, P("fsdp")) if x.shape[0] % size == 0 else x
  return jax.tree.map(cut, batch) if size > 1 else batch


def of_data(rows: Any) -> Data:
  """Specs of `Data`: examples by owner, the rest everywhere."""
  return Data(rows, P(), P())


def place(
  mesh: Mesh, workers: tuple[str, ...], examples: Batch, sizes: np.ndarray, key: Key
) -> Data:
  """Puts examples [P, n, ...] on the devices of their owners; each process brings only its rows."""
  rows, everywhere = NamedSharding(mesh, P(workers)), NamedSharding(mesh, P())
  put = lambda x: on_devices(x, rows)
  return Data(
    jax.tree.map(put, examples),
    on_devices(sizes.astype(np.int32), everywhere),
    jax.jit(lambda k: k, out_shardings=everywhere)(key),
  )


def on_devices(x: np.ndarray, sharding: NamedSharding) -> Array:
  """A numpy array that every process has, as one global array."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
