"""Computes the share of a model's parameters to which a matrix optimizer such as Muon applies.

The state of such an optimizer or method has a class attribute `rule`, a name in STEPS. So this
module need not import the optimizers, most of which a run does not use.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

from research.core.dimensions import Dimensions, path

_LEAST = 0.5  # minimum share of the parameters


class Reach(NamedTuple):
  """The parameters that an optimizer updates by its own rule, not by Adam's rule."""

  reached: int  # number of elements
  total: int
  names: frozenset[str]  # names of the leaves that are reached
  hidden: tuple[int, int] = (0, 0)  # elements of declared hidden matrices: reached, and all

  @property
  def share(self) -> float:
    """Returns the fraction of the parameters that is reached, in [0, 1]."""
    return self.reached / max(1, self.total)

  @property
  def embeds(self) -> bool:
    """Returns whether an embedding is reached, according to the names of the leaves."""
    return any("embed" in name.lower() for name in self.names)

  @property
  def exact(self) -> bool:
    """Returns whether the model declares hidden matrices and all of them are reached."""
    return 0 < self.hidden[0] == self.hidden[1]


# adjectives that describe the rule of an optimizer or method
STEPS = {
  "muon": "orthogonalized",
  "galore": "low-rank",
  "dion": "low-rank orthonormal",
  "dion2": "orthonormal",
}


def reaches(state: Any, dimensions: Dimensions = ()) -> dict[str, Reach]:
  """Finds the reach of each matrix optimizer in a method's state, at any depth.

  If a model declares no hidden matrices, `muon` applies to leaves of two dimensions and updates the
  other leaves by Adam; `galore` projects leaves of two dimensions.

  Args:
    state: the state of a method, arrays or shapes.
    dimensions: the model's declaration.

  Returns:
    The reach of each optimizer or method, by its name in STEPS.
  """
  found: dict[str, list[Reach]] = {}
  is_hidden = lambda name: _is_hidden(name, dimensions)
  parted = (optax.transforms.PartitionState, contrib.GaLoreState)
  for node in _nodes(state, lambda node: isinstance(node, parted)):
    galores = list(_nodes(node, lambda node: isinstance(node, contrib.GaLoreState)))
    if galores:
      found.setdefault("galore", []).append(_of_galore(galores, is_hidden))
    elif list(_nodes(node.inner_states, _is_muon)):
      found.setdefault("muon", []).append(_of_muon(node.inner_states, is_hidden))
  for node in _nodes(state, lambda node: _rule(node) in _METHODS):
    found.setdefault(node.rule, []).append(_of_method(node, is_hidden))
  return {name: _together(parts) for name, parts in found.items()}


def check(state: Any, dimensions: Dimensions = ()) -> None:
  """Rejects an optimizer that reaches less than half of the parameters.

  An optimizer that reaches all hidden matrices that the model declares is accepted.

  Args:
    state: the state of a method, arrays or shapes.
    dimensions: the model's declaration.

  Raises:
    ValueError: if an optimizer reaches less than half of the parameters; the message gives the
      fraction.
  """
  for name, reach in reaches(state, dimensions).items():
    if reach.share < _LEAST and not reach.exact:
      raise ValueError(
        f"{describe(name, reach)}; that is less than half of this model. Declare the model's "
        "`dimensions` (an optimizer within one of optax's own needs them as an argument), use a "
        "model whose matrices are leaves of two dimensions (scan=False), or another optimizer such "
        "as adamw"
      )


def describe(name: str, reach: Reach) -> str:
  """Describes the reach of an optimizer in one line.

  Args:
    name: a name in STEPS.
    reach: the optimizer's reach.
  """
  among = ", embeddings among them," if reach.embeds else ""
  among = ", which are all hidden matrices," if reach.exact and not reach.embeds else among
  rest = "those of its other optimizer" if name in _METHODS else "Adam's"
  return (
    f"{name}: its {STEPS[name]} steps reach {reach.share:.1%} of the parameters{among} "
    f"and all others are {rest}"
  )


_METHODS = ("dion", "dion2")


def _rule(node: Any) -> str | None:
  return getattr(type(node), "rule", None)


def _is_muon(node: Any) -> bool:
  return _rule(node) == "muon" or isinstance(node, contrib.MuonState)


def _is_adam(node: Any) -> bool:
  return isinstance(node, optax.ScaleByAdamState)


def _nodes(tree: Any, is_one: Callable[[Any], bool]) -> Iterable[Any]:
  return filter(is_one, jax.tree.leaves(tree, is_leaf=is_one))


def _is_hidden(name: str, dimensions: Dimensions) -> bool:
  kinds = next((kinds for pattern, kinds in dimensions if re.search(pattern, name)), ())
  return "in" in kinds and "out" in kinds


def _of_muon(states: Mapping[str, Any], is_hidden: Callable[[str], bool]) -> Reach:
  """Computes Muon's reach from the sizes of Muon's momentum and of Adam's momentum."""
  of = lambda s: s.mu if isinstance(s, contrib.MuonState) else s.momentum
  moments = map(of, _nodes(states, _is_muon))
  own = [pair for tree in moments for pair in _sizes(tree)]
  rest = [pair for s in _nodes(states, _is_adam) for pair in _sizes(s.mu)]
  return _reach(own, rest, is_hidden)


def _of_method(state: Any, is_hidden: Callable[[str], bool]) -> Reach:
  """Computes a method's reach from the sizes of its momenta and of the model."""
  own = _sizes(state.momentum)
  rest = [pair for pair in _sizes(state.params) if pair not in own]
  return _reach(own, rest, is_hidden)


def _of_galore(states: list[contrib.GaLoreState], is_hidden: Callable[[str], bool]) -> Reach:
  """Infers the sizes of leaves from the sizes of their projectors and moments.

  The projector of an m x n leaf has the shape m x r or n x r; the dimensions of the leaf's moments
  are r and the other dimension of the leaf. Projectors and moments may also have leading dimensions
  for stacked layers.
  """
  own, rest = [], []
  for state in states:
    (moments, *_) = _nodes(state.base_optimizer_state, _is_adam)
    pairs = zip(_leaves(state.projector), _sizes(moments.mu), strict=True)
    for (name, projector), (_, kept) in pairs:
      if projector.size:
        *_, rows, rank = projector.shape
        own.append((name, rows * (kept // rank)))
      else:
        rest.append((name, kept))
  return _reach(own, rest, is_hidden)


def _reach(
  own: list[tuple[str, int]], rest: list[tuple[str, int]], is_hidden: Callable[[str], bool]
) -> Reach:
  """Sums the named sizes of the leaves that are reached, and of all other leaves."""
  total = lambda leaves: sum(size for _, size in leaves)
  hidden = lambda leaves: sum(size for name, size in leaves if is_hidden(name))
  names = frozenset(name for name, _ in own)
  both = hidden(own), hidden(own) + hidden(rest)
  return Reach(total(own), total(own) + total(rest), names, both)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  return [(path(at), leaf) for at, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _sizes(tree: Any) -> list[tuple[str, int]]:
  return [(name, leaf.size) for name, leaf in _leaves(tree)]


def _together(parts: list[Reach]) -> Reach:
  names = frozenset().union(*(part.names for part in parts))
  hidden = [sum(part.hidden[i] for part in parts) for i in (0, 1)]
  total = sum(part.total for part in parts)
  return Reach(sum(part.reached for part in parts), total, names, (hidden[0], hidden[1]))
