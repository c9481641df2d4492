"""What is equal on all workers and what is private to each, inferred by tracing one round.

State that is equal on all workers is stored once; private state has a row per worker. Nobody
declares which is which: a round is traced under `vmap` with the worker axes named, and a leaf is
private if it comes out batched, that is if it depends on anything that differs between workers and
has not been through a collective that makes it equal.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.base import Blocks, Chunk, Own, Tree


class Layout(NamedTuple):
  """Per leaf of a method's state and of a round's `Local`: whether it is private, and its shape."""

  state: Tree  # of bool
  local: Tree  # of bool
  state_shapes: Tree  # of ShapeDtypeStruct, of one worker
  local_shapes: Tree


def over_workers(
  fn: Callable[..., Any], axes: Mapping[str, int], in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
  """`fn` of one worker over arrays whose private leaves have one leading dimension per axis."""
  for name, size in reversed(list(axes.items())):
    fn = jax.vmap(fn, in_axes, out_axes, axis_name=name, axis_size=size)
  return fn


def private_outputs(
  fn: Callable[..., Any], axes: Mapping[str, int], in_axes: Any, *args: Any
) -> Tree:
  """Which leaves of fn's result differ between workers, as a tree of bool.

  Args:
    fn: what one worker computes, possibly with collectives.
    axes: the worker axes, name to size.
    in_axes: as of `vmap`: 0 for private arguments, None for shared ones.
    *args: shapes or arrays; private ones with one leading dimension per axis.
  """
  found: list[bool] = []
  trees: list[Any] = []

  def probed(*args):
    leaves, tree = jax.tree.flatten(fn(*args))
    trees[:], found[:] = [tree], [False] * len(leaves)

    @jax.custom_batching.custom_vmap
    def probe(*leaves):
      return leaves

    @probe.def_vmap
    def rule(size, batched, *leaves):
      del size
      found[:] = [before or now for before, now in zip(found, batched, strict=True)]
      return probe(*leaves), tuple(batched)

    return probe(*leaves) if leaves else ()

  jax.eval_shape(over_workers(probed, axes, in_axes, 0), *args)
  return trees[0].unflatten(found)


def lead(private: Tree) -> Tree:
  """`in_axes` and `out_axes` of `vmap`: 0 where private, None where shared."""
  return jax.tree.map(lambda is_private: 0 if is_private else None, private)


def infer(
  init: Callable[..., Any],
  local_phase: Callable[..., Any],
  sync: Callable[..., Any],
  axes: Mapping[str, int],
  params: Tree,
  private_args: tuple[Any, ...],
) -> Layout:
  """Traces rounds until the set of private leaves no longer grows (one or two).

  Args:
    init: params -> state.
    local_phase: (state, *private_args) -> (local, anything).
    sync: (local, state, weight) -> state; each worker has a weight of its own.
    axes: the worker axes, name to size.
    params: shapes of the shared parameters.
    private_args: shapes of one worker's private arguments to `local_phase`.
  """
  spread = lambda private, tree: jax.tree.map(
    lambda p, x: jax.ShapeDtypeStruct((*axes.values(), *x.shape), x.dtype) if p else x,
    private,
    tree,
  )
  everything = lambda tree: jax.tree.map(lambda _: True, tree)
  per_worker = tuple(spread(everything(arg), arg) for arg in private_args)
  shapes = _shapes_of_one(init, axes, None, params)
  private = _owned(private_outputs(init, axes, None, params))
  while True:
    in_axes = (lead(private), *(0 for _ in private_args))
    local_fn = lambda state, *args: local_phase(state, *args)[0]
    local = private_outputs(local_fn, axes, in_axes, spread(private, shapes), *per_worker)
    local_shapes = _shapes_of_one(local_fn, axes, in_axes, spread(private, shapes), *per_worker)
    after = private_outputs(
      sync,
      axes,
      (lead(local), lead(private), 0),
      spread(local, local_shapes),
      spread(private, shapes),
      jax.ShapeDtypeStruct(tuple(axes.values()), jnp.float32),
    )
    grown = jax.tree.map(lambda a, b: a or b, private, after)
    if grown == private:
      return Layout(private, local, shapes, local_shapes)
    private = grown


def _owned(private: Tree) -> Tree:
  """What owners keep for themselves is private, whoever writes it."""
  is_own = lambda node: isinstance(node, Own)
  mark = lambda node: jax.tree.map(lambda _: True, node) if is_own(node) else node
  return jax.tree.map(mark, private, is_leaf=is_own)


def _shapes_of_one(fn, axes, in_axes, *args) -> Tree:
  outputs = jax.eval_shape(over_workers(fn, axes, in_axes, 0), *args)
  skip = len(axes)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[skip:], x.dtype), outputs)


def kinds(private: Tree) -> Tree:
  """How each leaf of a state is resized: 'shared', 'rows', 'chunks' (rows of `Chunk`s) or 'chunks
  of blocks' (rows of `Chunk`s in `Blocks`).
  """

  def kind(node, chunks):
    if isinstance(node, Chunk):
      return jax.tree.map(lambda is_private: chunks if is_private else "shared", node)
    if isinstance(node, Blocks):
      return walk(node.part, "chunks of blocks", Blocks)
    return "rows" if node else "shared"

  def walk(tree, chunks, wrap=lambda tree: tree):
    special = lambda node: isinstance(node, (Chunk, Blocks))
    return wrap(jax.tree.map(lambda node: kind(node, chunks), tree, is_leaf=special))

  return walk(private, "chunks")


def resize_rows(rows: jax.Array, owners: int) -> jax.Array:
  """A private leaf [P, ...] for another number of owners: each gets the mean of all rows.

  The mean over owners is kept exactly, so residuals and drifting parameters lose nothing that their
  average carried. Integers and the like are taken from the first row.
  """
  is_float = jnp.issubdtype(rows.dtype, jnp.floating)
  wide = jnp.promote_types(rows.dtype, jnp.float32) if is_float else rows.dtype
  mean = jnp.mean(rows, 0, dtype=wide).astype(rows.dtype) if is_float else rows[0]
  return jnp.broadcast_to(mean, (owners, *rows.shape[1:]))


def recut_chunks(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Chunks [P, ...] of one whole as chunks of another shape [P', ...]; what pads them is zero."""
  whole, size = rows.reshape(-1), math.prod(shape)
  return jnp.pad(whole, (0, max(0, size - whole.size)))[:size].reshape(shape)
