"""Base of methods that orthonormalize the updates of a model's hidden matrices."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from research.core import checks
from research.core.base import Aggregator, Array, Params, State, Tree
from research.core.part import hidden
from research.methods._steps import OneGradient, check_rate

# The dimensions of a leaf that are a matrix's inputs and outputs; the others stack matrices.
Dimensions = optax.contrib.MuonDimensionNumbers
Leaves = dict[int, Any]  # values by the index of a leaf of the model


class OfMatrices(OneGradient):
  """Base class: an orthonormal update of hidden matrices, and an optimizer for the other leaves.

  Args:
    learning_rate: eta of the matrices, a constant or a schedule over rounds.
    others: the optimizer of all other leaves, with a learning rate of its own.
    aggregator: the exchange.
    weight_decay: lambda of the matrices, at least 0.

  Raises:
    ValueError: if an argument is out of range or the aggregator is incompatible; in `init`, if the
      model has no hidden matrix.
  """

  learning_rate: float | optax.Schedule
  others: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  weight_decay: float = 0.0
  dimensions: Callable[[Params], Tree] | None = hidden(None)

  def check(self):
    check_rate(self.learning_rate)
    checks.at_least("weight_decay", self.weight_decay, 0)

  def matrices(self, params: Params) -> dict[int, Dimensions]:
    """Returns the hidden matrices' dimensions by leaf.

    Args:
      params: arrays with the shapes of the model.

    Raises:
      ValueError: if there is none.
    """
    leaves, treedef = jax.tree.flatten(params)
    of_leaves = treedef.flatten_up_to((self.dimensions or two_dimensional)(params))
    marked = {i: of for i, of in enumerate(of_leaves) if isinstance(of, Dimensions)}
    found = {i: of for i, of in marked.items() if self.suits(*sizes(leaves[i].shape, of))}
    if not found:
      raise ValueError(f"{self.title} finds no hidden matrix in this model; use data_parallel")
    return found

  def suits(self, outputs: int, inputs: int) -> bool:
    """Returns whether a matrix of this size is updated by the method, not by `others`."""
    del outputs, inputs
    return True

  def stepped(
    self, params: Params, directions: Leaves, rate: Array, grads: Leaves, inner: State
  ) -> tuple[Params, State]:
    """Updates the model.

    Args:
      params: W and the other leaves.
      directions: the orthonormal directions of the matrices, in the leaves' shapes.
      rate: eta, a scalar.
      grads: the aggregated gradients of the other leaves.
      inner: the state of their optimizer.

    Returns:
      The model, with (1 - eta lambda) W - eta sqrt(outputs / inputs) direction for the matrices,
      and the state of the optimizer of the other leaves.
    """
    dimensions = self.matrices(params)
    matrices, rest = divided(params, dimensions)

    def moved(w: Array, direction: Array, of: Dimensions) -> Array:
      outputs, inputs = sizes(w.shape, of)
      step = self.weight_decay * w + math.sqrt(outputs / inputs) * direction
      return (w - rate * step).astype(w.dtype)

    found = {i: moved(w, directions[i], dimensions[i]) for i, w in matrices.items()}
    updates, inner = self.others.update(grads, inner, rest)
    return united(params, found | optax.apply_updates(rest, updates)), inner


def two_dimensional(params: Params) -> Tree:
  """Marks leaves [inputs, outputs], except those whose path names an embedding or a head.

  Args:
    params: arrays with the shapes of the model.

  Returns:
    The tree with Dimensions or None for each leaf.
  """
  named = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").lower()
  apart = lambda path: any(word in named(path) for word in ("embed", "head"))
  mark = lambda path, x: Dimensions(0, 1) if x.ndim == 2 and not apart(path) else None
  return jax.tree_util.tree_map_with_path(mark, params)


def divided(tree: Tree, dimensions: Mapping[int, Dimensions]) -> tuple[Leaves, Leaves]:
  """Returns the leaves that are hidden matrices, and the others.

  Args:
    tree: arrays with the structure of the model.
    dimensions: the hidden matrices.
  """
  leaves = dict(enumerate(jax.tree.leaves(tree)))
  rest = {i: x for i, x in leaves.items() if i not in dimensions}
  return {i: leaves[i] for i in dimensions}, rest


def united(like: Tree, leaves: Leaves) -> Tree:
  """Inverse of `divided`.

  Args:
    like: a tree with the structure of the result.
    leaves: all leaves.
  """
  return jax.tree.structure(like).unflatten([leaves[i] for i in sorted(leaves)])


def sides(ndim: int, of: Dimensions) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the leaf's dimensions that are the matrix's outputs, and those that are its inputs.

  Args:
    ndim: the number of dimensions of the leaf.
    of: the matrix's dimensions, possibly negative.
  """
  every = lambda side: (side,) if isinstance(side, int) else side
  plain = lambda side: tuple(d % ndim for d in every(side))
  return plain(of.output_axis), plain(of.reduction_axis)


def sizes(shape: Sequence[int], of: Dimensions) -> tuple[int, int]:
  """Returns the numbers of outputs and inputs of a leaf's matrices.

  Args:
    shape: the shape of the leaf.
    of: the matrix's dimensions.
  """
  outputs, inputs = (math.prod(shape[d] for d in side) for side in sides(len(shape), of))
  return outputs, inputs


def as_matrices(x: Array, of: Dimensions) -> Array:
  """Reshapes a leaf to float32 matrices [stack..., outputs, inputs].

  Args:
    x: the leaf.
    of: the matrix's dimensions.
  """
  stack, outputs, inputs = _order(x.ndim, of)
  shape = (*(x.shape[d] for d in stack), *sizes(x.shape, of))
  return x.transpose(*stack, *outputs, *inputs).reshape(shape).astype(jnp.float32)


def as_leaf(matrices: Array, shape: Sequence[int], of: Dimensions) -> Array:
  """Inverse of `as_matrices`.

  Args:
    matrices: [stack..., outputs, inputs].
    shape: the shape of the leaf.
    of: the matrix's dimensions.
  """
  order = [d for side in _order(len(shape), of) for d in side]
  back = sorted(range(len(order)), key=lambda place: order[place])
  return matrices.reshape([shape[d] for d in order]).transpose(back)


def _order(ndim: int, of: Dimensions) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
  """Returns the dimensions of the stack, of the outputs and of the inputs."""
  outputs, inputs = sides(ndim, of)
  return [d for d in range(ndim) if d not in (*outputs, *inputs)], outputs, inputs
