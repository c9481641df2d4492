"""Defines the kinds of the dimensions of a model's parameters: stacked layers, inputs, outputs.

A model declares `dimensions`, a sequence of (pattern, kinds). The first pattern that matches the
path of a parameter determines the kinds of the parameter's last dimensions: any number of "stack",
then the inputs and the outputs, each with any number of "in" or "out". All earlier dimensions are
stacked layers. A parameter with both inputs and outputs is a hidden matrix, or a stack of hidden
matrices:

    (r"/attention/query/kernel$", ("in", "out", "out"))  # [in, heads, head_dim]
    (r"/experts/up/kernel$", ("stack", "in", "out"))  # [experts, in, out]
    (r"norm/scale$", ("out",))  # not a matrix

Embeddings and heads are not declared, because their rows belong to tokens.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from research.core.base import Array, Tree

Dimensions = tuple[tuple[str, tuple[str, ...]], ...]
KINDS = ("stack", "in", "out")


class Kinds(NamedTuple):
  """The dimensions of one parameter: stack, then one side of the matrix, then the other side."""

  stack: int  # number of leading dimensions, which are stacked layers or experts
  first: int  # number of dimensions of the first side
  second: int  # number of dimensions of the second side; 0 if the parameter is not a matrix
  into: bool = True  # whether the first side is the input

  @property
  def is_matrix(self) -> bool:
    """Returns whether the parameter is a matrix or a stack of matrices."""
    return self.second > 0

  def view(self, x: Array) -> Array:
    """Reshapes a parameter to a stack of matrices [*stack, rows, columns]."""
    stack, rest = x.shape[: self.stack], x.shape[self.stack :]
    rows, columns = math.prod(rest[: self.first]), math.prod(rest[self.first :])
    return x.reshape(*stack, rows, columns)

  def fans(self, shape: Sequence[int]) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of each matrix in a parameter of a given shape."""
    rest = shape[self.stack :]
    sides = math.prod(rest[: self.first]), math.prod(rest[self.first :])
    return sides if self.into else (sides[1], sides[0])


class Declared(NamedTuple):
  """Stores a model's declaration in a method; `fitting.method_for` sets the declaration."""

  dimensions: Dimensions = ()


MATRIX, OTHER = Kinds(0, 1, 1), Kinds(0, 0, 0)


def checked(dimensions: Sequence[Sequence[object]]) -> Dimensions:
  """Checks a declaration and converts it to tuples.

  Args:
    dimensions: the (pattern, kinds) pairs of a model.

  Raises:
    ValueError: if a pattern is not a regular expression, or the kinds are unknown or out of order.
  """
  found = []
  for pattern, kinds in dimensions:
    assert isinstance(kinds, Sequence)
    try:
      re.compile(str(pattern))
    except re.error as error:
      raise ValueError(f"dimensions: {pattern!r} is not a regular expression: {error}") from error
    text = " ".join(map(str, kinds))
    if not re.fullmatch(r"(stack ?)*((in ?)*(out ?)*|(out ?)*(in ?)*)", text):
      raise ValueError(
        f"dimensions of {pattern!r}: '{text}' is not any number of 'stack', then of 'in' and 'out'"
      )
    found.append((str(pattern), tuple(map(str, kinds))))
  return tuple(found)


def kinds_of(tree: Tree, dimensions: Dimensions) -> dict[str, Kinds]:
  """Returns the kinds of the dimensions of each leaf, by path.

  If no pattern matches any leaf, leaves with two dimensions are matrices, as in optax.

  Args:
    tree: a tree of the parameters or of their shapes.
    dimensions: the declaration of the model, which may be empty.

  Raises:
    ValueError: if a parameter has fewer dimensions than its declaration.
  """
  leaves = {path(at): leaf for at, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  declared = {name: _declared(name, leaf.ndim, dimensions) for name, leaf in leaves.items()}
  if not any(declared.values()):
    return {name: MATRIX if leaf.ndim == 2 else OTHER for name, leaf in leaves.items()}
  return {name: found or OTHER for name, found in declared.items()}


def path(at: tuple) -> str:
  """Converts the path of a leaf to text, such as 'layers/attention/query/kernel'.

  Args:
    at: the path of the leaf in its tree.
  """
  return jax.tree_util.keystr(at, simple=True, separator="/")


def _declared(name: str, ndim: int, dimensions: Dimensions) -> Kinds | None:
  kinds = next((kinds for pattern, kinds in dimensions if re.search(pattern, name)), None)
  if kinds is None:
    return None
  if ndim < len(kinds):
    raise ValueError(f"dimensions: {name} has {ndim} dimensions, not {', '.join(kinds)}")
  sides = [kind for kind in kinds if kind != "stack"]
  first = sides.count(sides[0]) if sides else 0
  return Kinds(ndim - len(sides), first, len(sides) - first, sides[:1] != ["out"])
