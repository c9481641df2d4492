"""Shards activations along the mesh axes inside a worker."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from research.core.base import Array


def inner_axes() -> dict[str, int]:
  """Returns the sizes of the axes of the mesh in scope that the compiler manages, by name."""
  mesh = jax.sharding.get_abstract_mesh()
  named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
  return {name: size for name, size, kind in named if kind == AxisType.Auto}


def spec(shape: tuple[int, ...], *axes: str | tuple[str, ...] | None) -> P:
  """Returns the sharding of an activation, without the axes that the current mesh cannot use.

  Args:
    shape: the shape of the activation.
    *axes: one entry per dimension: a mesh axis, several axes, or None. Axes that are not in the
      mesh are dropped. If the axes of a dimension do not divide its length, all of them are
      dropped.
  """
  sizes = inner_axes()

  def one(length: int, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    named = axes if isinstance(axes, tuple) else (axes,)
    found = tuple(axis for axis in named if axis is not None and axis in sizes)
    fits = found and length % math.prod(sizes[axis] for axis in found) == 0
    return (found[0] if len(found) == 1 else found) if fits else None

  return P(*(one(*pair) for pair in zip(shape, axes, strict=True)))


def along(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
  """Constrains the sharding of an activation; does nothing without a mesh.

  Args:
    x: the activation.
    *axes: one entry per dimension: a mesh axis, several axes, or None.
  """
  return lax.with_sharding_constraint(x, spec(x.shape, *axes)) if inner_axes() else x


def rows(table: Array, index: Array) -> Array:
  """Looks up rows [batch, length, width] of a table [rows, width] that is sharded along `model`.

  Each device looks up the rows of its own examples. The backward pass therefore needs only one sum
  as large as the table, for any number of tokens. Without this function, the compiler would send
  the rows of each token to all devices.

  Args:
    table: the table [rows, width].
    index: the row numbers, integers [batch, length].
  """
  axes = inner_axes()
  if not axes:
    return table[index]
  of_table, of_index = spec(table.shape, "model", None), spec(index.shape, "fsdp", "seq")

  def here(table: Array, index: Array) -> Array:
    if of_table[0] is None:
      return table[index]
    own = index - lax.axis_index("model") * len(table)
    found = jnp.where(((own >= 0) & (own < len(table)))[..., None], table[own], 0.0)
    return lax.psum(found, "model")

  cut = jax.shard_map(
    here,
    in_specs=(of_table, of_index),
    out_specs=P(*of_index, None),
    axis_names=set(axes),
    check_vma=False,
  )
  return cut(table, index)
