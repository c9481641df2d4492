"""Infers which state is shared by all workers and which is private, by tracing one round.

Shared state is stored once; private state has a row per worker. Methods declare neither; the layout
is inferred by tracing a round under `vmap` with named worker axes. A leaf that is batched in the
result is private: it depends on a value that differs between workers, and no collective has made it
equal on all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from research.core.base import Chunk, Own, Tree


class Layout(NamedTuple):
  """Which leaves of a method's state and of `Local` are private, and the leaves' shapes."""

  state: Tree  # tree of bool, whether a leaf of the state is private
  local: Tree  # tree of bool, whether a leaf of Local is private
  state_shapes: Tree  # tree of ShapeDtypeStruct, the shapes of one worker's state
  local_shapes: Tree


def over_workers(
  fn: Callable[..., Any], axes: Mapping[str, int], in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
  """Maps one worker's `fn` over all workers; private leaves have one leading dimension per axis.

  Args:
    fn: one worker's function.
    axes: sizes of the worker axes by name.
    in_axes: as in `vmap`: 0 for private arguments, None for shared arguments.
    out_axes: as `in_axes`, for the results.
  """
  for name, size in reversed(list(axes.items())):
    fn = jax.vmap(fn, in_axes, out_axes, axis_name=name, axis_size=size)
  return fn


def private_outputs(
  fn: Callable[..., Any], axes: Mapping[str, int], in_axes: Any, *args: Any
) -> Tree:
  """Finds which leaves of fn's result differ between workers.

  Args:
    fn: one worker's function, possibly with collectives.
    axes: sizes of the worker axes by name.
    in_axes: as in `vmap`: 0 for private arguments, None for shared arguments.
    *args: shapes or arrays; private arguments have one leading dimension per axis.

  Returns:
    A tree of bool, True for a private leaf.
  """
  return _outputs(fn, axes, in_axes, *args)[0]


def shapes_of_one(
  fn: Callable[..., Any], axes: Mapping[str, int], in_axes: Any, *args: Any
) -> Tree:
  """Returns the shapes of the result of `fn` for one worker.

  Args:
    fn: one worker's function, possibly with collectives.
    axes: sizes of the worker axes by name.
    in_axes: as in `vmap`: 0 for private arguments, None for shared arguments.
    *args: shapes or arrays; private arguments have one leading dimension per axis.
  """
  return _outputs(fn, axes, in_axes, *args)[1]


def _outputs(fn, axes, in_axes, *args) -> tuple[Tree, Tree]:
  """Returns whether each output is private, and the outputs' shapes, from one trace."""
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

  rows = jax.eval_shape(over_workers(probed, axes, in_axes, 0), *args)
  one = lambda x: jax.ShapeDtypeStruct(x.shape[len(axes) :], x.dtype)
  return trees[0].unflatten(found), trees[0].unflatten(map(one, rows))


def lead(private: Tree) -> Tree:
  """Returns `in_axes` or `out_axes` for `vmap`: 0 for private leaves, None for shared leaves.

  Args:
    private: tree of bool, whether a leaf is private.
  """
  return jax.tree.map(lambda is_private: 0 if is_private else None, private)


def infer(
  init: Callable[..., Any],
  local_phase: Callable[..., Any],
  sync: Callable[..., Any],
  axes: Mapping[str, int],
  params: Tree,
  private_args: tuple[Any, ...],
) -> Layout:
  """Traces rounds until the set of private leaves stops growing (one or two rounds).

  Args:
    init: params -> state.
    local_phase: (state, *private_args) -> (local, anything).
    sync: (local, state, weight) -> state, where weights differ between workers.
    axes: sizes of the worker axes by name.
    params: the shapes of the shared parameters.
    private_args: the shapes of one worker's private arguments to `local_phase`.
  """
  spread = lambda private, tree: jax.tree.map(
    lambda p, x: jax.ShapeDtypeStruct((*axes.values(), *x.shape), x.dtype) if p else x,
    private,
    tree,
  )
  everything = lambda tree: jax.tree.map(lambda _: True, tree)
  per_worker = tuple(spread(everything(arg), arg) for arg in private_args)
  private, shapes = _outputs(init, axes, None, params)
  private = _owned(private)
  weight = jax.ShapeDtypeStruct((), jnp.float32)
  local_fn = lambda state, *args: local_phase(state, *args)[0]
  local_fn, local_shapes = _traced(local_fn, axes, shapes, *private_args)
  sync, _ = _traced(sync, axes, local_shapes, shapes, weight)
  while True:
    in_axes = (lead(private), *(0 for _ in private_args))
    local = private_outputs(local_fn, axes, in_axes, spread(private, shapes), *per_worker)
    after = private_outputs(
      sync,
      axes,
      (lead(local), lead(private), 0),
      spread(local, local_shapes),
      spread(private, shapes),
      spread(True, weight),
    )
    grown = jax.tree.map(lambda a, b: a or b, private, after)
    if grown == private:
      return Layout(private, local, shapes, local_shapes)
    private = grown


def _traced(
  fn: Callable[..., Any], axes: Mapping[str, int], *args: Any
) -> tuple[Callable[..., Any], Tree]:
  """Traces one worker's `fn` once; returns the program and the shapes of the result."""
  program, shapes = jax.make_jaxpr(fn, axis_env=[*axes.items()], return_shape=True)(*args)
  run, tree = jaxpr_as_fun(program), jax.tree.structure(shapes)
  return lambda *args: tree.unflatten(run(*jax.tree.leaves(args))), shapes


def _owned(private: Tree) -> Tree:
  """Marks the leaves of `Own` as private, even if all workers write the same value."""
  is_own = lambda node: isinstance(node, Own)
  mark = lambda node: jax.tree.map(lambda _: True, node) if is_own(node) else node
  return jax.tree.map(mark, private, is_leaf=is_own)


def kinds(private: Tree) -> Tree:
  """Returns the kind of each leaf: 'shared', 'rows' per client, or 'chunks' (rows of `Chunk`s).

  Args:
    private: tree of bool, whether a leaf is private.
  """

  def kind(node):
    rows = "chunks" if isinstance(node, Chunk) else "rows"
    return jax.tree.map(lambda is_private: rows if is_private else "shared", node)

  return jax.tree.map(kind, private, is_leaf=lambda node: isinstance(node, Chunk))
