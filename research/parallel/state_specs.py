"""Infers the PartitionSpecs of an optimizer's state, whose leaves are replicated or private."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm.collectives import Axes
from research.core.base import WORKER_AXES, Params, Tree
from research.parallel import layout


class StateSpecs(NamedTuple):
  """PartitionSpecs for a user's `shard_map` over the worker axes, and shardings for `jit`."""

  state: Tree  # specs of the optimizer's state, over the worker axes only
  params: Tree  # specs of the parameters, which are private for methods with local steps
  state_shardings: Tree  # `state`, plus the parameters' sharding along other axes
  params_shardings: Tree  # `params`, plus the parameters' sharding along other axes


def state_specs(
  optimizer: optax.GradientTransformation, params: Params, mesh: Mesh, *, axis: Axes = WORKER_AXES
) -> StateSpecs:
  """Infers the sharding of the state of an optimizer that contains `aggregated` or `as_optax`.

  Some of this state, such as an error feedback memory, is private to each worker. If private state
  were declared as replicated (`out_specs=P()`), a single array would silently represent W different
  values. Private leaves are inferred by tracing one update. A private leaf [n, ...] becomes an
  array [W n, ...] outside of `shard_map`.

      specs = state_specs(optimizer, params, mesh, axis="batch")
      state = init_state(optimizer, params, mesh, axis="batch")
      step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(specs.params, specs.state, P("batch")),
        out_specs=(specs.params, specs.state), axis_names={"batch"}, check_vma=False,
      )

  Args:
    optimizer: any chain of transformations.
    params: the model's parameters, arrays or shapes of one worker. If the parameters are sharded
      along other axes of the mesh (FSDP), the corresponding leaves of the state are sharded in the
      same way.
    mesh: a mesh with the worker axes.
    axis: the name or names of the worker axes, slow links first; by default, whichever of
      'slice' and 'data' the mesh has.

  Returns:
    The specs and shardings, in the structures of the state and of the parameters.

  Raises:
    ValueError: if the mesh lacks an axis, or a private leaf is a scalar, which `shard_map` cannot
      return as an array.
  """
  axes = _axes_of(mesh, axis)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  private, own_params, of_state = _private(optimizer, shapes, axes)

  def spec(is_private, x):
    if is_private and not x.shape:
      raise ValueError("the method has a private scalar, which shard_map cannot shard")
    return P(tuple(axes)) if is_private else P()

  inner = _inner_specs(of_state, params)
  whole = lambda is_private, x, cut: NamedSharding(mesh, _joined(tuple(axes), is_private, x, cut))
  return StateSpecs(
    jax.tree.map(spec, private, of_state),
    jax.tree.map(spec, own_params, shapes),
    jax.tree.map(whole, private, of_state, inner),
    jax.tree.map(whole, own_params, shapes, _inner_specs(shapes, params)),
  )


def init_state(
  optimizer: optax.GradientTransformation, params: Params, mesh: Mesh, *, axis: Axes = WORKER_AXES
) -> Tree:
  """Initializes an optimizer's state outside of `shard_map`, with the shardings of `state_specs`.

  Args:
    optimizer: any chain of transformations.
    params: the model's parameters, arrays [n, ...].
    mesh: a mesh with the worker axes.
    axis: see `state_specs`.

  Returns:
    The state: replicated leaves as created by `optimizer.init`, private leaves [W n, ...].
  """
  specs = state_specs(optimizer, params, mesh, axis=axis)
  names = set(_axes_of(mesh, axis))
  replicated = jax.tree.map(lambda _: P(), params)
  init = jax.shard_map(
    optimizer.init,
    mesh=mesh,
    in_specs=(replicated,),
    out_specs=specs.state,
    axis_names=names,
    check_vma=False,
  )
  return jax.jit(init, out_shardings=specs.state_shardings)(params)


def _axes_of(mesh: Mesh, axis: Axes) -> dict[str, int]:
  """Returns the worker axes of a mesh and their sizes.

  Raises:
    ValueError: if the mesh has no worker axis, or lacks an explicitly named axis.
  """
  names = (axis,) if isinstance(axis, str) else tuple(axis)
  sizes = {str(name): size for name, size in mesh.shape.items()}
  found = {name: sizes[name] for name in names if name in sizes}
  if not found or (names != WORKER_AXES and len(found) < len(names)):
    raise ValueError(f"axis={axis!r} is not an axis of the mesh, which has {', '.join(sizes)}")
  return found


def _private(
  optimizer: optax.GradientTransformation, shapes: Params, axes: dict[str, int]
) -> tuple[Tree, Tree, Tree]:
  """Returns whether each leaf of state and parameters is private, and the state's shapes."""
  lead = lambda private, tree: jax.tree.map(
    lambda p, x: jax.ShapeDtypeStruct((*axes.values(), *x.shape), x.dtype) if p else x,
    private,
    tree,
  )
  outputs: Callable[..., Any] = layout.private_outputs
  of_state = layout.shapes_of_one(optimizer.init, axes, None, shapes)
  private = outputs(optimizer.init, axes, None, shapes)
  own_params = jax.tree.map(lambda _: False, shapes)
  everywhere = jax.tree.map(lambda _: True, shapes)

  def after(grads, state, params):
    grad_fn = lambda params: jax.tree.map(lambda g, p: g + 0 * p, grads, params)
    given = optax.with_extra_args_support(optimizer)
    updates, state = given.update(grads, state, params, grad_fn=grad_fn)
    return state, optax.apply_updates(params, updates)

  while True:
    in_axes = (0, layout.lead(private), layout.lead(own_params))
    args = lead(everywhere, shapes), lead(private, of_state), lead(own_params, shapes)
    grown = outputs(after, axes, in_axes, *args)
    grown = jax.tree.map(lambda a, b: a or b, (private, own_params), grown)
    if grown == (private, own_params):
      return private, own_params, of_state
    private, own_params = grown


def _inner_specs(tree: Tree, params: Params) -> Tree:
  """Gives leaves the spec of the parameter whose path is a suffix of theirs, if shapes agree."""
  cut = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    sharding = getattr(leaf, "sharding", None)
    spec = sharding.spec if isinstance(sharding, NamedSharding) else P()
    cut[jax.tree_util.keystr(path)] = (leaf.shape, spec)

  def one(path, x):
    for start in range(len(path) + 1):
      shape, spec = cut.get(jax.tree_util.keystr(path[start:]), (None, P()))
      if shape == x.shape:
        return spec
    return P()

  return jax.tree_util.tree_map_with_path(one, tree)


def _joined(workers: tuple[str, ...], is_private: bool, x: Any, cut: P) -> P:
  """Returns a full leaf's spec; a private leaf's first dimension is also sharded over workers."""
  if not is_private:
    return cut
  first, *rest = [*cut, *[None] * (len(x.shape) - len(cut))]
  first = () if first is None else (first,) if isinstance(first, str) else tuple(first)
  return P((*workers, *first), *rest)
