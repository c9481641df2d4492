"""Wraps collectives to send arrays as bits, in pieces or packed, and to simulate workers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core.base import Array, Tree, platform

PIECE = 2**18  # bytes: maximum size of a gloo message, see `in_pieces`


def is_narrow(x: Array | jax.ShapeDtypeStruct) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def as_bits(send: Callable[[Array], Array]) -> Callable[[Array], Array]:
  """Wraps `send` to send narrow floats as bits if XLA would widen them (bfloat16 on CPUs).

  Args:
    send: a function that maps an array to an array of the same dtype, without arithmetic.
  """

  def one(x):
    if not is_narrow(x) or platform() != "cpu":
      return send(x)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return lax.bitcast_convert_type(send(bits), x.dtype)

  return one


def in_pieces(
  send: Callable[[Array], Array], share: float = 1, lead: int = 0
) -> Callable[[Array], Array]:
  """Wraps `send` to send long arrays in pieces if gloo transfers them between processes.

  Gloo serializes the two directions of exchanges above 0.5 MB: at 100 Mbit/s, sending 1 MB in each
  direction took 127 ms, and sending 0.25 MB took 21 ms. Sums do not need this function, because
  gloo splits sums itself.

  Args:
    send: a function that maps an array [*first, n] to [*any, n], independently for each index of
      the last axis.
    share: the size of a message to another worker, as a fraction of the array's size.
    lead: the number of dimensions of `first`.
  """

  def one(x):
    count = math.ceil(x.size * x.dtype.itemsize * share / PIECE)
    if count <= 1 or platform() != "cpu" or jax.process_count() == 1:
      return send(x)
    flat = x.reshape(*x.shape[:lead], -1)
    length = -(-flat.shape[-1] // count)
    filled = jnp.pad(flat, [*[(0, 0)] * lead, (0, count * length - flat.shape[-1])])
    pieces = filled.reshape(*flat.shape[:-1], count, length)
    one_after_other = lambda _, piece: (None, send(piece))
    found = lax.scan(one_after_other, None, jnp.moveaxis(pieces, lead, 0), unroll=16)[1]
    whole = jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], -1)
    return whole[..., : flat.shape[-1]].reshape(*found.shape[1:-1], *x.shape[lead:])

  return one


def packed(
  tree: Tree, send: Callable[[Array], Array], lead: int = 0, longest: float = math.inf
) -> Tree:
  """Applies `send` to each leaf, after concatenating short leaves of the same dtype.

  Args:
    tree: the arrays; their first `lead` dimensions must be equal.
    send: a function that maps an array [*first, n] to [*any, n], independently for each index of
      the last axis.
    lead: the number of dimensions of `first`.
    longest: the maximum size of a leaf to concatenate, in bytes.
  """
  leaves, treedef = jax.tree.flatten(tree)
  messages: dict[Any, list[int]] = {}
  for i, x in enumerate(leaves):
    is_short = x.size * x.dtype.itemsize <= longest
    messages.setdefault(x.dtype if is_short else i, []).append(i)
  found = list(leaves)
  for places in messages.values():
    if len(places) == 1:
      found[places[0]] = send(leaves[places[0]])
      continue
    lengths = [math.prod(leaves[i].shape[lead:]) for i in places]
    flat = [
      leaves[i].reshape(*leaves[i].shape[:lead], length)
      for i, length in zip(places, lengths, strict=True)
    ]
    message = send(jnp.concatenate(flat, -1))
    parts = jnp.split(message, np.cumsum(lengths)[:-1], -1)
    for i, part in zip(places, parts, strict=True):
      found[i] = part.reshape(*message.shape[:-1], *leaves[i].shape[lead:])
  return treedef.unflatten(found)


def by_axis(
  send: Callable[[Array], Array],
  simulated: Callable[[int, Array, int], Array],
  x: Array,
  names: tuple[str, ...],
  is_shared: bool,
) -> Array:
  """Computes `send(x)`, with its own batching rule if `vmap` simulates one of the worker axes.

  Args:
    send: the collective that one worker runs.
    simulated: a function of (size, x [size, ...], index of the simulated axis in `names`) that
      computes the results of all simulated workers, [size, ...].
    x: this worker's array.
    names: the worker axes in scope.
    is_shared: whether the result is equal on all workers and has no leading dimension.
  """

  @jax.custom_batching.custom_vmap
  def of_worker(x, places):
    del places  # shows the batching rule which worker axis is simulated, if any
    return send(x)

  @of_worker.def_vmap
  def _of_many(size, batched, x, places):
    if not any(batched[1]):
      return of_worker(x, places), True
    (here,) = (i for i, is_here in enumerate(batched[1]) if is_here)
    whole = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
    return simulated(size, whole, here), not is_shared

  return of_worker(x, tuple(lax.axis_index(name) for name in names))
