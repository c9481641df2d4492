"""Computes functions of whole matrices whose shards are on the devices of a worker.

Matrices of one shape are distributed among the devices: in an all-to-all, each device receives all
shards of the matrices that it owns; it applies the function to these matrices, and a second
all-to-all returns the shards. Over an axis of W devices, the two all-to-alls move 2 (W - 1) / W
elements for each element of a matrix. Exactly one device computes the function of each matrix.
GSPMD would instead gather parts of every matrix in every Newton-Schulz step.

The module communicates although it is not an aggregator, because its exchanges are between the
devices of one worker.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from research.aggregate.blockwise import Cut, join_leaf, split_leaf
from research.core.base import Array, Tree
from research.core.dimensions import Kinds, path

# (matrices [..., rows, columns]) -> the same shape, equivariant to transposing each matrix and to
# permutations of its rows and columns
OfMatrices = Callable[[Array], Array]


_FILLED = 0.05  # share of zeros up to which all matrices take part in the all-to-all


class Place(NamedTuple):
  """How one leaf's matrices are sharded."""

  kinds: Kinds
  turned: bool  # whether the matrices are transposed in their group
  cut: tuple[tuple[str, int], ...]  # axes that shard a side of each matrix, with the side: 0 or 1
  sides: tuple[int, int]  # rows and columns of a whole matrix in its group


def on_owners(function: OfMatrices, tree: Tree, kinds: dict[str, Kinds], cut: Cut) -> Tree:
  """Applies a function to each hidden matrix, in a shard_map over the axes inside a worker.

  A group of matrices of equal shape is padded with zero matrices to a multiple of the number of
  devices if the padding adds at most 5%. Otherwise, the remaining matrices are sent to the first
  devices one shard at a time.

  Args:
    function: maps a stack of whole matrices to a stack of the same shape.
    tree: the leaves, each a stack of matrices, sharded according to `cut`.
    kinds: the kinds of each leaf's dimensions, by path.
    cut: the sharding of the leaves.
  """
  leaves, treedef = jax.tree.flatten(tree)
  names = [path(at) for at, _ in jax.tree_util.tree_leaves_with_path(tree)]
  places = [place(kinds[name], x.shape, cut) for name, x in zip(names, leaves, strict=True)]
  specs = [P(*_axes(x.shape, cut)) for x in leaves]
  groups: dict[tuple, list[int]] = {}
  for number, found in enumerate(places):
    groups.setdefault((found.cut, found.sides), []).append(number)

  def shard(parts: list[Array]) -> list[Array]:
    found = list(parts)
    for members in groups.values():
      matrices = [_matrices(places[i], parts[i]) for i in members]
      moved = _moved(function, jnp.concatenate(matrices), places[members[0]].cut)
      ends = [sum(map(len, matrices[: i + 1])) for i in range(len(matrices) - 1)]
      for i, part in zip(members, jnp.split(moved, ends), strict=True):
        part = jnp.swapaxes(part, 1, 2) if places[i].turned else part
        found[i] = part.reshape(parts[i].shape)
    return found

  nested = jax.shard_map(
    shard,
    in_specs=(specs,),
    out_specs=specs,
    axis_names={*cut.names, *cut.around},
    check_vma=False,
  )
  return treedef.unflatten(nested(leaves))


def place(kinds: Kinds, shape: tuple[int, ...], cut: Cut) -> Place:
  """Determines which group a leaf's matrices belong to.

  Matrices are transposed so that those of equal size and sharding are in one group, whichever side
  is the input.

  Args:
    kinds: the kinds of the leaf's dimensions.
    shape: the leaf's shape.
    cut: the sharding of the leaves.
  """
  side = lambda dimension: int(dimension >= kinds.stack + kinds.first)
  named = zip(cut.names, cut.places(shape), strict=True)
  shared = {name: side(d) for name, d in named if d is not None and d >= kinds.stack}
  rest = shape[kinds.stack :]
  sides = math.prod(rest[: kinds.first]), math.prod(rest[kinds.first :])
  found = Place(kinds, False, tuple(shared.items()), sides)
  over = tuple((name, 1 - side) for name, side in found.cut)
  turned = Place(kinds, True, over, (sides[1], sides[0]))
  return min(found, turned, key=lambda one: (one.cut, one.sides))


def _axes(shape: tuple[int, ...], cut: Cut) -> tuple[str | None, ...]:
  """Returns the axis that shards each dimension of a leaf."""
  names = {d: name for name, d in zip(cut.names, cut.places(shape), strict=True)}
  return tuple(names.get(d) for d in range(len(shape)))


def _matrices(place: Place, part: Array) -> Array:
  """Returns a device's shards of a leaf's matrices, [count, rows, columns]."""
  found = place.kinds.view(part)
  found = found.reshape(-1, *found.shape[-2:])
  return jnp.swapaxes(found, 1, 2) if place.turned else found


def _moved(function: OfMatrices, x: Array, cut: tuple[tuple[str, int], ...]) -> Array:
  """Applies a function to whole matrices, given each device's shards [count, rows, columns]."""
  counts = []
  for name, side in cut:
    counts.append(len(x))
    x = _dealt(x, name, 1 + side)
  x = function(x)
  for (name, side), count in zip(reversed(cut), reversed(counts), strict=True):
    x = _returned(x, name, 1 + side, count)
  return x


def _full(count: int, owners: int) -> tuple[int, int]:
  """Returns how many matrices, with padding, take part in the all-to-all, and how many do not."""
  filled = count + -count % owners
  return (filled, 0) if filled <= (1 + _FILLED) * count else (filled - owners, count % owners)


def _dealt(x: Array, name: str, dimension: int) -> Array:
  """Sends the shards of [count, ...] matrices to their owners along one axis.

  Returns:
    The matrices that the device owns; a missing last matrix is zero.
  """
  full, rest = _full(len(x), lax.axis_size(name))
  found = []
  if full:
    part = jnp.pad(x[:full], ((0, max(0, full - len(x))), (0, 0), (0, 0)))
    # without the barrier, XLA:CPU would send parts with different layouts, and fail
    found.append(lax.all_to_all(lax.optimization_barrier(part), name, 0, dimension, tiled=True))
  if rest:
    found.append(_gathered(x[full:], name, dimension))
  return jnp.concatenate(found)


def _returned(x: Array, name: str, dimension: int, count: int) -> Array:
  """Inverts `_dealt` for `count` matrices."""
  owners = lax.axis_size(name)
  full, rest = _full(count, owners)
  found = []
  if full:
    part = lax.optimization_barrier(x[: full // owners])
    found.append(lax.all_to_all(part, name, dimension, 0, tiled=True)[:count])
  if rest:
    found.append(_scattered(x[-1], name, dimension - 1, rest))
  return jnp.concatenate(found)


def _gathered(x: Array, name: str, dimension: int) -> Array:
  """Sends the shards of a few matrices to the first devices, one [1, rows, columns] for each."""
  count, size, here = len(x), lax.axis_size(name), lax.axis_index(name)
  parts = []
  for shift in range(size):
    pairs = [(i, (i + shift) % size) for i in range(size) if (i + shift) % size < count]
    part = x[jnp.minimum((here + shift) % size, count - 1)]
    parts.append(lax.ppermute(part, name, pairs))
  by_source = jnp.stack(parts)[(here - jnp.arange(size)) % size]
  whole = jnp.moveaxis(by_source, 0, dimension - 1)
  shape = list(x.shape[1:])
  shape[dimension - 1] *= size
  return whole.reshape(1, *shape)


def _scattered(x: Array, name: str, dimension: int, count: int) -> Array:
  """Returns the shards of the matrices of the first `count` devices, [count, rows, columns]."""
  size, here = lax.axis_size(name), lax.axis_index(name)
  shape = list(x.shape)
  shape[dimension : dimension + 1] = [size, shape[dimension] // size]
  by_target = jnp.moveaxis(x.reshape(shape), dimension, 0)
  parts = []
  for shift in range(size):
    pairs = [(i, (i + shift) % size) for i in range(count)]
    parts.append(lax.ppermute(by_target[(here + shift) % size], name, pairs))
  return jnp.stack(parts)[(here - jnp.arange(count)) % size]


def on_blocks(
  function: Callable[[tuple, Array], Array], tree: Tree, cut: Cut, simulated: bool
) -> Tree:
  """Applies a function to each device's block of each leaf.

  Args:
    function: maps the path of a leaf and a block to an array of the block's shape.
    tree: the leaves.
    cut: the sharding of the leaves.
    simulated: whether one device computes the blocks of all devices, without a shard_map.
  """
  if simulated:

    def blocks(at: tuple, x: Array) -> Array:
      found = jax.vmap(lambda block: function(at, block))(split_leaf(x, cut))
      return join_leaf(found, x.shape, cut)

    return jax.tree_util.tree_map_with_path(blocks, tree)
  specs = jax.tree.map(lambda x: P(*_axes(x.shape, cut)), tree)
  nested = jax.shard_map(
    lambda parts: jax.tree_util.tree_map_with_path(function, parts),
    in_specs=(specs,),
    out_specs=specs,
    axis_names={*cut.names, *cut.around},
    check_vma=False,
  )
  return nested(tree)
