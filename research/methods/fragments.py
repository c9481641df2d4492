"""Partitions a model into fragments of about equal size, along the boundaries of its layers."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Params, Tree

# If the largest fragment is at most this many times the mean, no layer is divided.
BALANCED = 1.15
_STACKS = ("layers", "layer", "blocks", "block", "h", "stack")  # names of stacked layers
_NUMBER = re.compile(r"(\d+)")


Rows = tuple[tuple[int, int, int], ...]  # slices (first, end, step) of a leaf's first dimension


class Piece(NamedTuple):
  """A set of rows of one leaf."""

  leaf: int  # index of the leaf in the flattened model
  rows: tuple[int, int] | None  # first row, and the row after the last; None: all rows
  size: int  # bytes


class Fragments(NamedTuple):
  """The rows of each leaf that belong to each fragment.

  A fragment's part of a model is a list of the fragment's leaves, in the order of the model. If
  several fragments share a leaf, each part has only some rows of the leaf. With one fragment, the
  part is the model itself.
  """

  parts: tuple[tuple[tuple[int, Rows | None], ...], ...]  # (leaf, rows), by fragment
  sizes: tuple[int, ...]  # bytes, by fragment

  def take(self, tree: Params, fragment: int) -> Tree:
    """Returns one fragment of a tree that has the model's structure."""
    if len(self.parts) == 1:
      return tree
    leaves = jax.tree.leaves(tree)
    of = lambda i, rows: leaves[i] if rows is None else _rows(leaves[i], rows)
    return [of(i, rows) for i, rows in self.parts[fragment]]

  def put(self, tree: Params, fragment: int, part: Tree) -> Params:
    """Returns a tree in which one fragment is replaced."""
    if len(self.parts) == 1:
      return part
    leaves, treedef = jax.tree.flatten(tree)
    for (i, rows), new in zip(self.parts[fragment], part, strict=True):
      leaves[i] = new if rows is None else _with_rows(leaves[i], rows, new)
    return treedef.unflatten(leaves)


def fragments_of(params: Params, count: int) -> Fragments:
  """Partitions a model into fragments that are balanced by bytes.

  Layers stay whole where possible. A layer consists of all parameters below one numbered
  name, such as `layers_3` or `blocks/3`, or of one row of stacked layers. Every other parameter,
  such as the embedding, is a separate unit. The units are assigned in order of decreasing size,
  each to the fragment that is smallest so far. If the largest fragment then exceeds the mean by
  more than 15%, parameters larger than a fragment are cut along their first dimension. If the
  imbalance still exceeds 15%, layers are also divided into their parameters.

  Args:
    params: arrays or shapes.
    count: P, the number of fragments.

  Raises:
    ValueError: if the model cannot be cut into that many fragments.
  """
  leaves = jax.tree.leaves(params)
  if count == 1:
    return Fragments((tuple((i, None) for i in range(len(leaves))),), (sum(map(_bytes, leaves)),))
  best: list[list[Piece]] = []
  units: list[list[Piece]] = []
  for whole, cut in ((True, False), (True, True), (False, True)):
    units = _units(params, count, whole_layers=whole, cut=cut)
    found = _dealt(units, count)
    if all(found) and (not best or _imbalance(found) < _imbalance(best)):
      best = found
    if best and _imbalance(best) <= BALANCED:
      break
  if not best:
    raise ValueError(f"fragments={count} of a model that can be cut into {len(units)} parts")
  return Fragments(tuple(map(_joined, best)), tuple(sum(p.size for p in one) for one in best))


def _bytes(leaf: Array | jax.ShapeDtypeStruct) -> int:
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _imbalance(fragments: Sequence[Sequence[Piece]]) -> float:
  """Returns the ratio of the largest fragment's size to the mean size."""
  sizes = [sum(piece.size for piece in one) for one in fragments]
  return max(sizes) * len(sizes) / sum(sizes)


def _units(params: Params, count: int, *, whole_layers: bool, cut: bool) -> list[list[Piece]]:
  """Returns groups of pieces that stay together, in the order of the model."""
  flat = jax.tree_util.tree_leaves_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  leaves = [leaf for _, leaf in flat]
  stacks, mean = _stacks(names, leaves), sum(map(_bytes, leaves)) / count
  units: dict[tuple, list[Piece]] = {}
  for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
    layer = _layer(name)
    if name in stacks:
      pieces = _cut(i, leaf, leaf.shape[0])
      keys = [(stacks[name], n) for n in range(leaf.shape[0])]
    elif layer:
      pieces, keys = [Piece(i, None, _bytes(leaf))], [(layer,)]
    else:
      times = math.ceil(_bytes(leaf) / (mean if whole_layers else mean / 4)) if cut else 1
      pieces = _cut(i, leaf, times)
      keys = [(name, "part", n) for n in range(len(pieces))]
    for key, piece in zip(keys, pieces, strict=True):
      units.setdefault(key if whole_layers else (*key, "leaf", name), []).append(piece)
  return [units[key] for key in sorted(units, key=_natural)]


def _layer(name: str) -> str:
  """Returns a name up to its first numbered part, such as 'layers_3'; '' without such a part."""
  parts = name.split("/")
  numbered = next((i for i, part in enumerate(parts) if part[-1:].isdigit()), None)
  return "" if numbered is None else "/".join(parts[: numbered + 1])


def _stacks(names: Sequence[str], leaves: Sequence[Array]) -> dict[str, str]:
  """Maps the name of each leaf of stacked layers to the name of its stack.

  A stack consists of the leaves below a name such as 'layers' if all these leaves have the same
  leading dimension.
  """
  found: dict[str, dict[str, int]] = {}
  for name, leaf in zip(names, leaves, strict=True):
    parts = name.split("/")
    place = next((i for i, part in enumerate(parts[:-1]) if part in _STACKS), None)
    if place is not None and not _layer(name):
      rows = leaf.shape[0] if leaf.shape else 0
      found.setdefault("/".join(parts[: place + 1]), {})[name] = rows
  even = [(s, of) for s, of in found.items() if len({*of.values()}) == 1 and min(of.values()) > 1]
  return {name: stack for stack, of in even for name in of}


def _natural(key: tuple) -> list[tuple[int, int, str]]:
  """Returns a sort key that compares numbers within names by value: layers_2 before layers_10."""
  parts = [part for item in key for part in _NUMBER.split(str(item))]
  return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _cut(i: int, leaf: Array, times: int) -> list[Piece]:
  """Cuts a leaf along its first dimension into runs with about the same number of rows."""
  count = leaf.shape[0] if leaf.shape else 1
  if min(times, count) < 2:
    return [Piece(i, None, _bytes(leaf))]
  edges = np.linspace(0, count, min(times, count) + 1).round().astype(int).tolist()
  row = _bytes(leaf) // count
  return [Piece(i, (a, b), (b - a) * row) for a, b in itertools.pairwise(edges)]


def _dealt(units: list[list[Piece]], count: int) -> list[list[Piece]]:
  """Assigns units to fragments, the largest first; the fragments are in the order of the model."""
  size = lambda unit: sum(piece.size for piece in unit)
  sums, found = [0] * count, [[] for _ in range(count)]
  firsts = [len(units)] * count
  for place in sorted(range(len(units)), key=lambda i: -size(units[i])):
    least = sums.index(min(sums))
    sums[least] += size(units[place])
    found[least] += units[place]
    firsts[least] = min(firsts[least], place)
  return [found[i] for i in sorted(range(count), key=lambda i: firsts[i])]


def _joined(pieces: list[Piece]) -> tuple[tuple[int, Rows | None], ...]:
  """Merges pieces into the rows of each leaf, in order; None stands for all rows."""
  found: dict[int, list[tuple[int, int]] | None] = {}
  for leaf, rows, _ in sorted(pieces, key=lambda p: (p.leaf, p.rows or (0, 0))):
    runs = found.setdefault(leaf, None if rows is None else [])
    if runs and rows and runs[-1][1] == rows[0]:
      runs[-1] = runs[-1][0], rows[1]
    elif runs is not None and rows:
      runs.append(rows)
  return tuple((leaf, None if runs is None else _slices(runs)) for leaf, runs in found.items())


def _slices(runs: list[tuple[int, int]]) -> Rows:
  """Converts runs of rows to slices; single rows at equal distances become one slice."""
  steps = {b[0] - a[0] for a, b in itertools.pairwise(runs)}
  if len(runs) > 1 and len(steps) == 1 and all(b - a == 1 for a, b in runs):
    return ((runs[0][0], runs[-1][1], steps.pop()),)
  return tuple((a, b, 1) for a, b in runs)


def _rows(leaf: Array, rows: Rows) -> Array:
  """Selects rows of a leaf."""
  found = [leaf[slice(*run)] for run in rows]
  return found[0] if len(found) == 1 else jnp.concatenate(found)


def _with_rows(leaf: Array, rows: Rows, new: Array) -> Array:
  """Replaces rows of a leaf by the rows of `new`."""
  first = 0
  for run in rows:
    count = len(range(*run))
    leaf = leaf.at[slice(*run)].set(new[first : first + count])
    first += count
  return leaf
