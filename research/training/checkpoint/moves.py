"""Converts the leaves of a checkpoint to the leaves of a state, possibly on another mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm.mesh import count, worker_axes
from research.core.base import Array
from research.core.task import TrainState
from research.parallel import resize, sharded


class Move(NamedTuple):
  """The saved leaf from which a leaf of the state is restored."""

  name: str  # name of the saved leaf
  saved: resize.Leaf
  leaf: resize.Leaf

  @property
  def is_none(self) -> bool:
    """Whether the saved leaf is read directly into its final sharding."""
    return resize.lie_alike(self.saved, self.leaf)


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def leaves_of(state: TrainState) -> dict[str, Array]:
  """Returns the leaves to save by name: typed keys as integers, empty leaves omitted.

  Args:
    state: the state, or its shapes.
  """
  named = zip(resize.names(state), jax.tree.leaves(state), strict=True)
  data = lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf
  return {name: data(leaf) for name, leaf in named if leaf.size}


def rebuilt(leaves: dict[str, Array], like: TrainState) -> TrainState:
  """Rebuilds a state from its leaves; this function is the inverse of `leaves_of`.

  Args:
    leaves: leaves by name.
    like: a state of the same structure; provides empty leaves and key types.
  """

  def one(name, was):
    if not was.size:
      return was
    found = leaves[name]
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(was)) if _is_key(was) else found

  flat, tree = jax.tree.flatten(like)
  return tree.unflatten([one(*pair) for pair in zip(resize.names(like), flat, strict=True)])


def mismatch(
  stored: Mapping[str, Any],
  target: Mapping[str, Any],
  saved: resize.Placed,
  here: resize.Placed,
  origins: Mapping[str, str],
) -> str:
  """Explains why a checkpoint does not fit this method and model; returns '' if it fits.

  Args:
    stored: shapes of the saved leaves, by name.
    target: the leaves of the state, by name.
    saved: the placement of the saved leaves.
    here: the placement of the state.
    origins: maps leaves of the state to the saved leaves that can fill them.
  """
  if other := resize.stranger(saved, here):
    return f"only one has {other}"
  same = {leaf.name: name for name, leaf in saved.leaves.items()}
  for name, leaf in target.items():
    lies = here.leaves[name]
    was = stored.get(same.get(lies.name, ""))
    in_blocks = lies.inside or (lies.name in same and saved.leaves[same[lies.name]].inside)
    if was is not None and (was.dtype != leaf.dtype or not (name in origins or in_blocks)):
      there, now = (f"{x.dtype} {list(x.shape)}" for x in (was, leaf))
      return f"{name} is {there} there and {now} here"
  return ""


def struct(leaf: Array) -> jax.ShapeDtypeStruct:
  """Returns the shape, dtype and sharding of a leaf.

  Args:
    leaf: an array.
  """
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def spread(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Returns how to read a leaf: sharded over every mesh axis that divides a dimension.

  Args:
    shape: the leaf's shape.
    dtype: the leaf's dtype.
    mesh: the mesh.
  """
  left, axes = list(shape), [[] for _ in shape]
  for name, size in mesh.shape.items():
    dimension = next((d for d, n in enumerate(left) if n % size == 0), None)
    if dimension is not None:
      axes[dimension].append(name)
      left[dimension] //= size
  sharding = NamedSharding(mesh, P(*map(tuple, axes)))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def moved(
  found: Mapping[str, Array], moves: Mapping[str, Move], like: TrainState
) -> dict[str, Array]:
  """Converts saved leaves to a state's leaves; leaves without a move are copied from `like`.

  Args:
    found: the saved leaves, by name.
    moves: the moves, by leaf of the state.
    like: a state with the wanted shardings.
  """
  leaves = leaves_of(like)
  for name, (was, *lies) in moves.items():
    leaf = found[was]
    if not moves[name].is_none:
      nameless = (lie._replace(name="", inside="") for lie in lies)
      leaf = _mover(*nameless, leaves[name].sharding)(leaf)
    leaves[name] = leaf
  return leaves


@functools.cache
def _mover(
  saved: resize.Leaf, leaf: resize.Leaf, sharding: NamedSharding
) -> Callable[[Array], Array]:
  """Returns a function that moves a leaf, compiled once for all leaves of one placement."""
  axes = worker_axes(sharding.mesh.shape)
  by_rows = leaf.kind != "shared" and saved.owners % count(axes) == 0
  rows = P(tuple(axes)) if by_rows else P()

  def move(x):
    whole = jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, rows))
    return resize.moved(whole, saved, leaf)

  return sharded.jit(move, out_shardings=sharding)
