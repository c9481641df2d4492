"""Applies an aggregator to each shard of leaves that are sharded within a worker."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.composition import SHARDED
from research.core.base import (
  EVERYONE,
  Aggregate,
  Aggregator,
  Array,
  Blocks,
  Key,
  Presence,
  State,
  Tree,
)

# Leaves, grouped by the axes that shard them, in the order of `subsets`. Keys are indices of leaves
# in the tree: `parallel/resize.py` uses them to match leaves of a state to leaves of the model.
Groups = tuple[dict[int, Array], ...]


class Cut(NamedTuple):
  """The sharding of leaves over a worker's mesh axes; leaves of equal shape are sharded equally."""

  axes: tuple[tuple[str, int], ...]  # names and sizes of the axes
  places: Callable[[tuple[int, ...]], tuple[int | None, ...]]  # shape -> sharded dimension by axis
  around: tuple[str, ...] = ()  # other axes within a worker, which shard no leaf

  @property
  def size(self) -> int:
    """Returns B, the number of devices of a worker."""
    return math.prod(size for _, size in self.axes)

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(name for name, _ in self.axes)

  @property
  def subsets(self) -> list[tuple[bool, ...]]:
    """Returns all subsets of the axes, each as one bool per axis."""
    return list(itertools.product((True, False), repeat=len(self.axes)))


class Sharded(Aggregator):
  """Aggregates the shards of one device, which are `Groups` of leaves with one key per group.

  Args:
    inner: the aggregator that is applied to the shards.

  Raises:
    ValueError: if the inner aggregator needs all of a worker's leaves at once.
  """

  inner: Aggregator
  refuses = SHARDED
  title = "fsdp"

  def init(self, params):
    return tuple(self.inner.init(leaves) if leaves else () for leaves in params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    found = [self._of_group(*args, presence) for args in zip(tree, state, key, strict=True)]
    return Aggregate(*(tuple(part) for part in zip(*found, strict=True)))

  def _of_group(
    self, leaves: dict[int, Array], state: State, key: Key, presence: Presence
  ) -> Aggregate:
    if not leaves:
      return Aggregate(leaves, leaves, state)
    return self.inner.aggregate(leaves, state, key, presence)


of_shard = Sharded


class Blockwise(Aggregator):
  """Simulates, on one device, the aggregation that the B devices of a worker run on their shards.

  For the inner aggregator, each shard of a leaf is a leaf with its own key. Leaves that are
  replicated over several devices are aggregated separately from sharded leaves, identically on each
  device. Nothing is exchanged over axes within a worker, so k, scales, ranks and distances are
  computed per shard. State leaves have a leading dimension [B], except scalar integers, which count
  rounds and are shared by all blocks. `parallel/sharded.py` runs the same computation on the
  devices.

  Args:
    inner: the aggregator that is applied to the shards.
    cut: the sharding of the leaves.

  Raises:
    ValueError: if the inner aggregator needs all of a worker's leaves at once.
  """

  inner: Aggregator
  cut: Cut
  refuses = SHARDED
  title = "fsdp"

  @property
  def _of_shard(self) -> Sharded:
    return Sharded(self.inner)

  def init(self, params):
    shards = split(params, self.cut)
    of_one = lambda parts: self._of_shard.init(jax.tree.map(lambda x: x[0], parts))
    first = jax.eval_shape(of_one, shards)
    return Blocks(jax.vmap(self._of_shard.init, out_axes=by_block(first))(shards))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    sizes = tuple(size for _, size in self.cut.axes)
    of_block = lambda block: shard_keys(key, self.cut, jnp.unravel_index(block, sizes))
    keys = jax.vmap(of_block)(jnp.arange(self.cut.size))
    axes = by_block(state.part)
    of_one = lambda parts, state, key: self._of_shard.aggregate(parts, state, key, presence)
    run = jax.vmap(of_one, (0, axes, 0), Aggregate(0, 0, axes))
    value, sent, after = run(split(tree, self.cut), state.part, keys)
    return Aggregate(join(value, tree, self.cut), join(sent, tree, self.cut), Blocks(after))


blockwise = Blockwise


def is_counter(leaf: Array | jax.ShapeDtypeStruct) -> bool:
  """Returns whether a leaf of a state is a scalar integer, which counts rounds.

  Args:
    leaf: the leaf.
  """
  return leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer)


def by_block(state: State) -> Tree:
  """Returns the `in_axes` of a state for a `vmap` over blocks: None for round counters, else 0.

  Args:
    state: the state.
  """
  return jax.tree.map(lambda leaf: None if is_counter(leaf) else 0, state)


def shard_keys(key: Key, cut: Cut, place: Sequence[Array]) -> Key:
  """Derives one key per group of leaves; devices that have equal shards of a group get equal keys.

  Args:
    key: a typed key, equal on all workers.
    cut: the sharding of the leaves.
    place: the index of the device along each axis of `cut`, int32 scalars.

  Returns:
    The keys [number of subsets], in the order of `cut.subsets`.
  """

  def one(subset):
    block, found = jnp.int32(0), False
    for is_cut, index, (_, size) in zip(subset, place, cut.axes, strict=True):
      block, found = (block * size + index, True) if is_cut else (block, found)
    return jax.random.fold_in(jax.random.fold_in(key, 0x73686172), block) if found else key

  return jnp.stack([one(subset) for subset in cut.subsets])


def _subset(x: Array, cut: Cut) -> tuple[bool, ...]:
  return tuple(place is not None for place in cut.places(x.shape))


def pieces(tree: Tree, cut: Cut) -> Groups:
  """Groups the leaves by the axes that shard them.

  Args:
    tree: the tree.
    cut: the sharding of the tree's leaves.
  """
  leaves = dict(enumerate(jax.tree.leaves(tree)))
  return tuple(
    {i: x for i, x in leaves.items() if _subset(x, cut) == subset} for subset in cut.subsets
  )


def rejoined(parts: Groups, like: Tree) -> Tree:
  """Joins groups of leaves into a tree; the inverse of `pieces`.

  Args:
    parts: the groups.
    like: a tree with the structure of the result.
  """
  leaves = {i: x for part in parts for i, x in part.items()}
  return jax.tree.structure(like).unflatten([leaves[i] for i in sorted(leaves)])


def split(tree: Tree, cut: Cut) -> Groups:
  """Groups the leaves as `pieces` does, and splits each leaf into its blocks [B, ...].

  Args:
    tree: the tree.
    cut: the sharding of the tree's leaves.
  """
  return jax.tree.map(lambda x: split_leaf(x, cut), pieces(tree, cut))


def join(parts: Groups, like: Tree, cut: Cut) -> Tree:
  """Joins groups of blocks into a tree; the inverse of `split`.

  Args:
    parts: the groups of blocks.
    like: a tree with the structure and shapes of the result.
    cut: the sharding of the tree's leaves.
  """
  whole = lambda blocks, x: join_leaf(blocks, x.shape, cut)
  return jax.tree.map(whole, rejoined(parts, like), like)


def split_leaf(x: Array, cut: Cut) -> Array:
  """Splits a leaf into its blocks, and replicates these over the axes that do not shard the leaf.

  Args:
    x: the leaf, of any shape.
    cut: the sharding of the leaves.

  Returns:
    The blocks [B, ...].
  """
  places, shape, front = cut.places(x.shape), [], {}
  for dimension, length in enumerate(x.shape):
    if dimension in places:
      axis = places.index(dimension)
      front[axis] = len(shape)
      shape += [cut.axes[axis][1], length // cut.axes[axis][1]]
    else:
      shape.append(length)
  found = x.reshape(shape)
  found = jnp.moveaxis(found, [front[axis] for axis in sorted(front)], range(len(front)))
  rest = found.shape[len(front) :]
  found = found.reshape(*(size if i in front else 1 for i, (_, size) in enumerate(cut.axes)), *rest)
  return jnp.broadcast_to(found, (*(size for _, size in cut.axes), *rest)).reshape(-1, *rest)


def join_leaf(blocks: Array, shape: tuple[int, ...], cut: Cut) -> Array:
  """Joins the blocks of a leaf; the inverse of `split_leaf`.

  Args:
    blocks: the blocks [B, ...].
    shape: the shape of the leaf.
    cut: the sharding of the leaves.
  """
  places = cut.places(shape)
  found = blocks.reshape(*(size for _, size in cut.axes), *blocks.shape[1:])
  found = found[tuple(0 if place is None else slice(None) for place in places)]
  front = [place for place in places if place is not None]
  for count, place in enumerate(reversed(front)):
    ahead = len(front) - count - 1  # number of block axes that remain before this one
    where = ahead + place
    found = jnp.moveaxis(found, ahead, where)
    shape = found.shape
    found = found.reshape(*shape[:where], shape[where] * shape[where + 1], *shape[where + 2 :])
  return found
