"""PartitionSpecs of an optimizer's state: what workers share, and what each keeps for itself."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research.comm import mesh as meshes
from research.core.base import Params, Tree
from research.parallel import layout


def state_specs(
  optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> tuple[Tree, Tree]:
  """PartitionSpecs of an optimizer's state and of the parameters, for one's own `shard_map`.

  An optimizer with `aggregated` or `as_optax` in it keeps some of its state for each worker alone,
  as a memory of what was not sent. Declared as replicated, by `out_specs=P()`, such an array would
  hold as many values as there are workers and claim to hold one. Nobody has to know which leaves
  these are: one update is traced. Of a worker's own leaf [n, ...] the array outside is [W n, ...].

      specs, of_params = state_specs(optimizer, params, mesh)
      init = jax.shard_map(
        optimizer.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False
      )

  Args:
    optimizer: any chain of transformations.
    params: of the model, arrays or shapes of one worker.
    mesh: with an axis `data`, `slice` or both.

  Returns:
    Specs of the state, and of the parameters, which only differ between workers for methods with
    local steps.

  Raises:
    ValueError: if the mesh has no worker axis, or a worker's own leaf is a scalar, of which
      `shard_map` can make no array.
  """
  axes = meshes.worker_axes({str(name): size for name, size in mesh.shape.items()})
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
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
    either = lambda a, b: a or b
    grown = jax.tree.map(either, (private, own_params), grown)
    if grown == (private, own_params):
      break
    private, own_params = grown

  def spec(is_private, x):
    if is_private and not x.shape:
      raise ValueError("a worker keeps a scalar of its own, of which shard_map can make no array")
    return P(tuple(axes)) if is_private else P()

  return jax.tree.map(spec, private, of_state), jax.tree.map(spec, own_params, shapes)
