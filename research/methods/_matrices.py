"""Base of methods that orthonormalize the updates of a model's hidden matrices."""

import math
from collections.abc import Collection
from dataclasses import KW_ONLY
from typing import Any

import jax
import optax

from research.core import checks
from research.core.base import Aggregator, Array, Params, State, Tree
from research.core.dimensions import Declared, Kinds, kinds_of, path
from research.core.part import hidden
from research.methods._steps import OneGradient, check_rate

Leaves = dict[str, Array]  # some leaves of the model, or arrays that belong to them, by path


class OfMatrices(OneGradient):
  """Base class: updates hidden matrices along orthonormal directions, and the rest by `others`.

  Args:
    learning_rate: eta of the matrices, a constant or a schedule over rounds.
    others: the optimizer of all other leaves, with a learning rate of its own.
    aggregator: the aggregator of the exchange.
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
  declared: Declared = hidden(Declared())

  def check(self):
    check_rate(self.learning_rate)
    checks.at_least("weight_decay", self.weight_decay, 0)

  def matrices(self, params: Params) -> dict[str, Kinds]:
    """Returns the kinds of the dimensions of the model's hidden matrices, by path.

    Args:
      params: arrays with the shapes of the model.

    Raises:
      ValueError: if the model has no hidden matrix.
    """
    shapes = {path(at): x.shape for at, x in jax.tree_util.tree_leaves_with_path(params)}
    kinds = kinds_of(params, self.declared.dimensions)
    suits = lambda name, of: of.is_matrix and self.suits(*of.fans(shapes[name]))
    found = {name: of for name, of in kinds.items() if suits(name, of)}
    if not found:
      raise ValueError(f"{self.title} finds no hidden matrix in this model; use data_parallel")
    return found

  def suits(self, inputs: int, outputs: int) -> bool:
    """Returns whether a matrix of this size is updated by the method, not by `others`."""
    del inputs, outputs
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
      inner: the state of the optimizer of the other leaves.

    Returns:
      The model, with (1 - eta lambda) W - eta sqrt(outputs / inputs) direction for the matrices,
      and the state of the optimizer of the other leaves.
    """
    kinds = self.matrices(params)
    matrices, rest = divided(params, kinds)

    def moved(w: Array, direction: Array, of: Kinds) -> Array:
      inputs, outputs = of.fans(w.shape)
      step = self.weight_decay * w + math.sqrt(outputs / inputs) * direction
      return (w - rate * step).astype(w.dtype)

    found = {name: moved(w, directions[name], kinds[name]) for name, w in matrices.items()}
    updates, inner = self.others.update(grads, inner, rest)
    moved_rest: Any = optax.apply_updates(rest, updates)
    every = found | moved_rest
    return jax.tree_util.tree_map_with_path(lambda at, _: every[path(at)], params), inner


def divided(tree: Tree, matrices: Collection[str]) -> tuple[Leaves, Leaves]:
  """Splits the leaves into hidden matrices and all others.

  Args:
    tree: arrays with the structure of the model.
    matrices: the paths of the hidden matrices.
  """
  leaves = {path(at): x for at, x in jax.tree_util.tree_leaves_with_path(tree)}
  rest = {name: x for name, x in leaves.items() if name not in matrices}
  return {name: x for name, x in leaves.items() if name in matrices}, rest
