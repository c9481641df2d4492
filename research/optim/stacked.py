"""Applies optax's optimizers whose updates depend on a leaf's shape to each stacked layer.

A model that compiles one layer keeps the parameters of all layers in stacks [layers, ...]. `lamb`
would scale the update of a whole stack by one ratio, and `galore` would not project it at all.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from research.core.base import Params, Tree
from research.core.dimensions import Dimensions, kinds_of, path
from research.core.optimizers import Made


def per_layer(made: Made, dimensions: Dimensions) -> optax.GradientTransformation:
  """Builds an optimizer that treats each layer of a stack as a leaf.

  Args:
    made: an optax factory and its arguments.
    dimensions: the model's declaration.
  """
  inner = made.factory(*made.args, **made.kwargs)

  def of(tree: Params) -> optax.GradientTransformation:
    kinds = kinds_of(tree, dimensions)
    found = jax.tree_util.tree_map_with_path(lambda at, _: str(kinds[path(at)].stack), tree)
    transforms = {depth: over_stack(inner, int(depth)) for depth in set(jax.tree.leaves(found))}
    return optax.partition(transforms, found)

  return _by_shapes(of)


def per_matrix(made: Made, dimensions: Dimensions) -> optax.GradientTransformation:
  """Builds `galore` for each hidden matrix of a stack, and its inner optimizer for other leaves.

  Args:
    made: optax's factory and its arguments.
    dimensions: the model's declaration.
  """
  inner = made.factory(*made.args, **made.kwargs)
  none = lambda params: jax.tree.map(lambda _: None, params)
  rest = made.factory(*made.args, **{**made.kwargs, "weight_dimension_numbers": none})

  def of(tree: Params) -> optax.GradientTransformation:
    kinds = kinds_of(tree, dimensions)
    label = lambda at, _: str(kinds[path(at)].stack) if kinds[path(at)].is_matrix else "rest"
    found = jax.tree_util.tree_map_with_path(label, tree)
    depths = set(jax.tree.leaves(found)) - {"rest"}
    views = {depth: _viewed(over_stack(inner, int(depth)), dimensions) for depth in depths}
    return optax.partition({"rest": rest, **views}, found)

  return _by_shapes(of)


# optax's optimizers whose update of a stack differs from the updates of its layers
DEPENDENT = {
  **dict.fromkeys((contrib.galore, contrib.scale_by_galore), per_matrix),
  **dict.fromkeys(
    (
      *(optax.adafactor, optax.fromage, optax.lamb, optax.lars, optax.novograd, optax.sm3),
      *(optax.adaptive_grad_clip, optax.centralize, optax.clip_by_block_rms),
      *(optax.scale_by_novograd, optax.scale_by_param_block_norm, optax.scale_by_param_block_rms),
      *(optax.scale_by_factored_rms, optax.scale_by_sm3, optax.scale_by_trust_ratio),
    ),
    per_layer,
  ),
}


def over_stack(inner: optax.GradientTransformation, depth: int) -> optax.GradientTransformation:
  """Runs an optimizer on each element of stacks [..., *shape] with `depth` leading dimensions.

  Floating-point state has a row per element. Integers, which count steps, are shared.

  Args:
    inner: the optimizer.
    depth: number of leading dimensions, which all leaves have in common.
  """
  if depth == 0:
    return inner

  def init(params):
    make = inner.init
    for _ in range(depth):
      make = jax.vmap(make)
    first = jax.tree.map(lambda x: x[(0,) * depth], params)
    is_counter = lambda x: x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    rows = lambda one, all: all[(0,) * depth] if is_counter(one) else all
    return jax.tree.map(rows, jax.eval_shape(inner.init, first), make(params))

  def update(updates, state, params=None):
    axes = jax.tree.map(lambda x: None if x.ndim == 0 else 0, state)
    step = inner.update
    for _ in range(depth):
      step = jax.vmap(step, (0, axes, None if params is None else 0), (0, axes))
    return step(updates, state, params)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _viewed(
  inner: optax.GradientTransformation, dimensions: Dimensions
) -> optax.GradientTransformation:
  """Shows an optimizer every leaf as a stack of matrices."""

  def view(tree: Tree) -> Tree:
    kinds = kinds_of(tree, dimensions)
    return jax.tree_util.tree_map_with_path(lambda at, x: kinds[path(at)].view(x), tree)

  def update(updates, state, params=None):
    of_params = None if params is None else view(params)
    found, state = inner.update(view(updates), state, of_params)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), found, updates), state

  return optax.GradientTransformation(lambda params: inner.init(view(params)), update)


def _by_shapes(of: Any) -> optax.GradientTransformation:
  """Builds an optimizer, when it is called, from the shapes of the tree that it is given."""
  return optax.GradientTransformation(
    lambda params: of(params).init(params),
    lambda updates, state, params=None: of(updates).update(updates, state, params),
  )
