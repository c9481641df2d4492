"""How much of a model an optimizer reaches that is made for matrices, such as Muon."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

_LEAST = 0.5  # share of the parameters


class Reach(NamedTuple):
  """What of the parameters takes the steps that an optimizer is named for."""

  reached: int  # elements
  total: int
  names: frozenset[str]  # of the leaves that are reached

  @property
  def share(self) -> float:
    return self.reached / max(1, self.total)

  @property
  def embeds(self) -> bool:
    """Whether an embedding is among them, by its name."""
    return any("embed" in name.lower() for name in self.names)


STEPS = {"muon": "orthogonalized", "galore": "low-rank"}  # of the leaves that it reaches


def reaches(state: Any) -> dict[str, Reach]:
  """By optimizer, in whatever methods and optimizers it is nested.

  `optax.contrib.muon` without dimension numbers takes leaves of two dimensions and gives the others
  to Adam at its own learning rate; `galore` projects those of two dimensions.

  Args:
    state: of a method, arrays or shapes.
  """
  found: dict[str, list[Reach]] = {}
  for node in _of_types(state, (optax.transforms.PartitionState, contrib.GaLoreState)):
    if isinstance(node, contrib.GaLoreState):
      found.setdefault("galore", []).append(_of_galore(node))
    elif list(_of_types(node.inner_states, (contrib.MuonState,))):
      found.setdefault("muon", []).append(_of_muon(node.inner_states))
  return {name: _together(parts) for name, parts in found.items()}


def check(state: Any) -> None:
  """Refuses an optimizer that reaches less than half of the parameters.

  Raises:
    ValueError: with the share.
  """
  for name, reach in reaches(state).items():
    if reach.share < _LEAST:
      raise ValueError(
        f"{describe(name, reach)}; that is less than half of this model. Take a model whose "
        "matrices are leaves of two dimensions (scan=False), or another optimizer such as adamw"
      )


def describe(name: str, reach: Reach) -> str:
  """One line."""
  among = ", embeddings among them," if reach.embeds else ""
  return (
    f"{name}: its {STEPS[name]} steps reach {reach.share:.1%} of the parameters{among} "
    "and all others are Adam's at the same learning rate"
  )


def _of_types(tree: Any, types: tuple[type, ...]) -> Iterable[Any]:
  is_one = lambda node: isinstance(node, types)
  return filter(is_one, jax.tree.leaves(tree, is_leaf=is_one))


def _of_muon(states: Mapping[str, Any]) -> Reach:
  """Of Muon's momentum, and of those in the states of the other leaves."""
  own = [momentum for s in _of_types(states, (contrib.MuonState,)) for momentum in _sizes(s.mu)]
  rest = [size for s in _of_types(states, (optax.ScaleByAdamState,)) for size in _sizes(s.mu)]
  reached = sum(size for _, size in own)
  total = reached + sum(size for _, size in rest)
  return Reach(reached, total, frozenset(name for name, _ in own))


def _of_galore(state: contrib.GaLoreState) -> Reach:
  """Of an m x n leaf the projector is m x r or n x r, and the moments have the other side."""
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
