"""An aggregator on every shard of what a mesh cuts inside a worker, shard by shard."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.composition import refuse
from research.base import Aggregate, Aggregator, Array, Blocks, Key, State, Tree


class Cut(NamedTuple):
  """How a mesh axis inside a worker cuts a leaf."""

  axis: str
  size: int  # B, devices along the axis
  dimension: Callable[[tuple[int, ...]], int | None]  # of a leaf of that shape; None: whole


def blockwise(inner: Aggregator, cut: Cut) -> Aggregator:
  """What B devices inside a worker do, each with its shard, on one: block after block.

  A leaf that is cut is B leaves to the inner aggregator, each with a key of its own; a leaf that is
  not cut lies on every device and is aggregated apart from the others, in the same way on each. So
  no value crosses the axis, and a k, a scale, a rank or a distance is that of a shard. The state
  has a leading dimension [B], but for scalar whole numbers: they count rounds, for all blocks.
  `parallel/sharded.py` runs the same on the devices.

  Args:
    inner: the aggregator of a shard.
    cut: how leaves are cut.

  Raises:
    ValueError: if the inner aggregator must see all of a worker's leaves.
  """
  pair = of_shard(inner)

  def init(params):
    shards = split(params, cut)
    first = jax.eval_shape(lambda parts: pair.init(jax.tree.map(lambda x: x[0], parts)), shards)
    return Blocks(jax.vmap(pair.init, out_axes=by_block(first))(shards))

  def aggregate(tree, state, key):
    both_keys = lambda block: jnp.stack([shard_key(key, block), key])
    keys = jax.vmap(both_keys)(jnp.arange(cut.size))
    axes = by_block(state.part)
    run = jax.vmap(pair.aggregate, (0, axes, 0), Aggregate(0, 0, axes))
    value, sent, after = run(split(tree, cut), state.part, keys)
    return Aggregate(join(value, tree, cut), join(sent, tree, cut), Blocks(after))

  return Aggregator(init, aggregate, inner.traits)


def of_shard(inner: Aggregator) -> Aggregator:
  """On (shards of cut leaves, whole leaves), with keys [2] for them: what one device does."""
  refuse("fsdp", inner)

  def init(pieces):
    return tuple(inner.init(leaves) if leaves else () for leaves in pieces)

  def one(leaves: list[Array], state: State, key: Key) -> Aggregate:
    return inner.aggregate(leaves, state, key) if leaves else Aggregate(leaves, leaves, state)

  def aggregate(pieces, state, key):
    found = [one(*args) for args in zip(pieces, state, key, strict=True)]
    return Aggregate(*(tuple(part) for part in zip(*found, strict=True)))

  return Aggregator(init, aggregate, inner.traits)


def is_counter(leaf: Array | jax.ShapeDtypeStruct) -> bool:
  """Whether a leaf of a state counts rounds: a scalar whole number."""
  return leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer)


def by_block(state: State) -> Tree:
  """`in_axes` of `vmap` over blocks."""
  return jax.tree.map(lambda leaf: None if is_counter(leaf) else 0, state)


def shard_key(key: Key, block: Array) -> Key:
  """The key of a shard, from one that all shards have."""
  return jax.random.fold_in(jax.random.fold_in(key, 0x73686172), block)


def pieces(tree: Tree, cut: Cut) -> tuple[list[Array], list[Array]]:
  """The leaves that are cut, and those that are not."""
  leaves = jax.tree.leaves(tree)
  is_cut = [cut.dimension(x.shape) is not None for x in leaves]
  of = lambda wanted: [x for x, found in zip(leaves, is_cut, strict=True) if found == wanted]
  return of(True), of(False)


def rejoined(parts: Sequence[list[Array]], like: Tree, cut: Cut) -> Tree:
  """The tree that `pieces` took apart."""
  leaves, treedef = jax.tree.flatten(like)
  cut_ones, whole_ones = map(iter, parts)
  is_cut = (cut.dimension(x.shape) is not None for x in leaves)
  return treedef.unflatten([next(cut_ones if found else whole_ones) for found in is_cut])


def split(tree: Tree, cut: Cut) -> tuple[list[Array], list[Array]]:
  """`pieces` by block, leaves [B, ...]."""

  def blocks(x: Array) -> Array:
    place = cut.dimension(x.shape)
    assert place is not None
    shape = (*x.shape[:place], cut.size, x.shape[place] // cut.size, *x.shape[place + 1 :])
    return jnp.moveaxis(x.reshape(shape), place, 0)

  cut_ones, whole_ones = pieces(tree, cut)
  copies = lambda x: jnp.broadcast_to(x, (cut.size, *x.shape))
  return [blocks(x) for x in cut_ones], [copies(x) for x in whole_ones]


def join(parts: Sequence[list[Array]], like: Tree, cut: Cut) -> Tree:
  """The tree that `split` cut."""

  def one(blocks: Array, x: Array) -> Array:
    place = cut.dimension(x.shape)
    assert place is not None
    return jnp.moveaxis(blocks, 0, place).reshape(x.shape)

  joined = [one(*pair) for pair in zip(parts[0], pieces(like, cut)[0], strict=True)]
  wholes = [x[0] for x in parts[1]]
  return rejoined((joined, wholes), like, cut)
