"""Computes the share of a model's parameters to which a matrix optimizer such as Muon applies."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

_LEAST = 0.5  # minimum share of the parameters


class Reach(NamedTuple):
  """The parameters that an optimizer updates by its own rule, not by Adam's rule."""

  reached: int  # number of elements
  total: int
  names: frozenset[str]  # names of the leaves that are reached

  @property
  def share(self) -> float:
    """The fraction of the parameters that is reached, in [0, 1]."""
    return self.reached / max(1, self.total)

  @property
  def embeds(self) -> bool:
    """Whether an embedding is reached, according to the names of the leaves."""
    return any("embed" in name.lower() for name in self.names)


STEPS = {"muon": "orthogonalized", "galore": "low-rank"}  # adjective for the optimizer's own rule


def reaches(state: Any) -> dict[str, Reach]:
  """Finds the reach of each matrix optimizer in a method's state, at any depth.

  `optax.contrib.muon` without dimension numbers applies to leaves of two dimensions, and updates
  the other leaves by Adam with a separate learning rate; `galore` projects leaves of two
  dimensions.

  Args:
    state: the state of a method, arrays or shapes.

  Returns:
    The reach by optimizer, "muon" or "galore".
  """
  found: dict[str, list[Reach]] = {}
  for node in _of_types(state, (optax.transforms.PartitionState, contrib.GaLoreState)):
    if isinstance(node, contrib.GaLoreState):
      found.setdefault("galore", []).append(_of_galore(node))
    elif list(_of_types(node.inner_states, (contrib.MuonState,))):
      found.setdefault("muon", []).append(_of_muon(node.inner_states))
  return {name: _together(parts) for name, parts in found.items()}


def check(state: Any) -> None:
  """Rejects an optimizer that reaches less than half of the parameters.

  Args:
    state: the state of a method, arrays or shapes.

  Raises:
    ValueError: if an optimizer reaches less than half of the parameters; the message gives the
      fraction.
  """
  for name, reach in reaches(state).items():
    if reach.share < _LEAST:
      raise ValueError(
        f"{describe(name, reach)}; that is less than half of this model. Use a model whose "
        "matrices are leaves of two dimensions (scan=False), or another optimizer such as adamw"
      )


def describe(name: str, reach: Reach) -> str:
  """Describes the reach of an optimizer in one line.

  Args:
    name: "muon" or "galore".
    reach: the optimizer's reach.
  """
  among = ", embeddings among them," if reach.embeds else ""
  return (
    f"{name}: its {STEPS[name]} steps reach {reach.share:.1%} of the parameters{among} "
    "and all others are Adam's at the same learning rate"
  )


def _of_types(tree: Any, types: tuple[type, ...]) -> Iterable[Any]:
  is_one = lambda node: isinstance(node, types)
  return filter(is_one, jax.tree.leaves(tree, is_leaf=is_one))


def _of_muon(states: Mapping[str, Any]) -> Reach:
  """Computes Muon's reach from the sizes of Muon's momentum and of Adam's momentum."""
  own = [momentum for s in _of_types(states, (contrib.MuonState,)) for momentum in _sizes(s.mu)]
  rest = [size for s in _of_types(states, (optax.ScaleByAdamState,)) for size in _sizes(s.mu)]
  reached = sum(size for _, size in own)
  total = reached + sum(size for _, size in rest)
  return Reach(reached, total, frozenset(name for name, _ in own))


def _of_galore(state: contrib.GaLoreState) -> Reach:
  """Infers the sizes of leaves from the sizes of their projectors and moments.

  The projector of an m x n leaf has the shape m x r or n x r; the leaf's moments have the other
  dimension and r.
  """
  (moments, *_) = _of_types(state.base_optimizer_state, (optax.ScaleByAdamState,))
  reached, total, names = 0, 0, set()
  pairs = zip(_sizes(state.projector), _leaves(state.projector), _sizes(moments.mu), strict=True)
  for (name, projected), (_, projector), (_, kept) in pairs:
    rank = projector.shape[-1] if projected else 1
    size = (projected // rank) * (kept // rank) if projected else kept
    total += size
    reached += size if projected else 0
    names |= {name} if projected else set()
  return Reach(reached, total, frozenset(names))


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  named = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path), leaf) for path, leaf in named]


def _sizes(tree: Any) -> list[tuple[str, int]]:
  return [(name, leaf.size) for name, leaf in _leaves(tree)]


def _together(parts: list[Reach]) -> Reach:
  names = frozenset().union(*(part.names for part in parts))
  return Reach(sum(p.reached for p in parts), sum(p.total for p in parts), names)
