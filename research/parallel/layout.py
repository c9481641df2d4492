"""Infers which state is shared by all workers and which is private, by tracing one round.

Shared state is stored once; private state has a row per worker. Methods declare neither; the layout
is inferred from the traced program of one round: a leaf of its result is private if it depends on
a value that differs between workers and no collective has made it equal on all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.core.base import Chunk, Own, Tree
from research.parallel import dataflow


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
  leaves, tree = jax.tree.flatten(jax.eval_shape(lambda *args: args, *args))
  rows = jax.tree.map(lambda axis: axis is not None, in_axes, is_leaf=lambda axis: axis is None)
  private = jax.tree.leaves(jax.tree.broadcast(rows, args))
  struct = lambda p, x: jax.ShapeDtypeStruct(x.shape[len(axes) * p :], x.dtype)
  one = _Program(fn, axes, *tree.unflatten(map(struct, private, leaves)))
  return one.private(private), one.shapes


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
  first = _Program(init, axes, params)
  private, shapes = _owned(first.private(_all(params, False))), first.shapes
  weight = jax.ShapeDtypeStruct((), jnp.float32)
  phase = _Program(lambda *args: local_phase(*args)[0], axes, shapes, *private_args)
  exchange = _Program(sync, axes, phase.shapes, shapes, weight)
  while True:
    local = phase.private(private, _all(private_args, True))
    after = exchange.private(local, private, True)
    grown = jax.tree.map(lambda a, b: a or b, private, after)
    if grown == private:
      return Layout(private, local, shapes, phase.shapes)
    private = grown


def _all(tree: Tree, value: bool) -> Tree:
  return jax.tree.map(lambda _: value, tree)


class _Program:
  """One worker's function, traced once; `shapes` are those of its result."""

  def __init__(self, fn: Callable[..., Any], axes: Mapping[str, int], *args: Any):
    traced = jax.make_jaxpr(fn, axis_env=[*axes.items()], return_shape=True)
    self.jaxpr, self.shapes = traced(*args)
    self.axes = frozenset(axes)

  def private(self, *args: Tree) -> Tree:
    """Returns which leaves of the result are private, of arguments whose leaves are bools."""
    given = [self.axes if private else frozenset() for private in jax.tree.leaves(args)]
    found = map(bool, dataflow.differing(self.jaxpr, given))
    return jax.tree.unflatten(jax.tree.structure(self.shapes), found)


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
