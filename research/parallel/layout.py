"""What is equal on all workers and what is private to each, inferred by tracing one round.

State that is equal on all workers is stored once; private state has a row per worker. Nobody
declares which is which: a round is traced under `vmap` with the worker axes named, and a leaf is
private if it comes out batched, that is if it depends on anything that differs between workers and
has not been through a collective that makes it equal.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from research.core.base import Chunk, Own, Tree


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
  return _outputs(fn, axes, in_axes, *args)[0]


def shapes_of_one(
  fn: Callable[..., Any], axes: Mapping[str, int], in_axes: Any, *args: Any
) -> Tree:
  """Shapes of what `fn` computes for one worker; arguments as of `private_outputs`."""
  return _outputs(fn, axes, in_axes, *args)[1]


def _outputs(fn, axes, in_axes, *args) -> tuple[Tree, Tree]:
  """Whether each output is private, and its shape: both of one trace."""
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
  """`fn` of one worker as a program, so that Python goes through it once; shapes of its result."""
  program, shapes = jax.make_jaxpr(fn, axis_env=[*axes.items()], return_shape=True)(*args)
  run, tree = jaxpr_as_fun(program), jax.tree.structure(shapes)
  return lambda *args: tree.unflatten(run(*jax.tree.leaves(args))), shapes


def _owned(private: Tree) -> Tree:
  """What owners keep for themselves is private, whoever writes it."""
  is_own = lambda node: isinstance(node, Own)
  mark = lambda node: jax.tree.map(lambda _: True, node) if is_own(node) else node
  return jax.tree.map(mark, private, is_leaf=is_own)


def kinds(private: Tree) -> Tree:
  """Of each leaf of a state: 'shared', 'rows' by owner, or 'chunks', which are rows of `Chunk`s."""

  def kind(node):
    rows = "chunks" if isinstance(node, Chunk) else "rows"
    return jax.tree.map(lambda is_private: rows if is_private else "shared", node)

  return jax.tree.map(kind, private, is_leaf=lambda node: isinstance(node, Chunk))
