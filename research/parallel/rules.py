"""Sharding rules: which dimensions of a task's parameters are sharded along which mesh axes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

from research.core.task import Task


class RuleCut(NamedTuple):
  """The sharding of parameters of one shape."""

  cut: dict[str, int]  # axis name to dimension
  first: int  # number of leading dimensions: stacked layers, sharded along `stage` or not


def by_shape(sizes: Mapping[str, int], task: Task) -> dict[tuple[int, ...], RuleCut]:
  """Maps each parameter shape to the sharding that a task's rules specify for it.

  A rule (pattern, axes) applies to the parameters whose path, such as 'layers/attention/query',
  matches the regular expression; its axes name the last dimensions. The first rule that matches is
  used. State with the shape of a parameter (moments, memories) is sharded like the parameter, so
  all parameters of one shape must be sharded in the same way. An axis written 'model?' shards a
  dimension only if the axis size divides it. Leading dimensions that a rule does not name are those
  of stacked layers; the last of these dimensions is sharded along `stage`.

  Args:
    sizes: the sizes of the axes inside a worker.
    task: the task, with its sharding rules.

  Raises:
    ValueError: if an axis does not divide a dimension, an axis shards no parameter, or the rules
      for parameters of one shape differ.
  """
  found: dict[tuple[int, ...], tuple[str, RuleCut]] = {}
  params = jax.eval_shape(task.init, jax.random.key(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    place = _place(name, leaf.shape, sizes, task)
    other, before = found.setdefault(leaf.shape, (name, place))
    if before != place:
      raise ValueError(
        f"{name} and {other} are both {list(leaf.shape)} but must be sharded differently; give the "
        "model other widths"
      )
  used = {axis for _, place in found.values() for axis in place.cut}
  idle = [axis for axis in sizes if axis != "fsdp" and axis not in used]
  if idle:
    stacked = ", whose layers are not stacked (transformer: scan=True)" * (idle[0] == "stage")
    raise ValueError(f"'{idle[0]}' shards nothing in this model{stacked}; leave it out")
  return {shape: place for shape, (_, place) in found.items()}


def of_rows(
  shape: tuple[int, ...], named: Mapping[tuple[int, ...], RuleCut], sizes: Mapping[str, int]
) -> RuleCut:
  """Returns the sharding of some rows of a parameter, such as the layers of one fragment.

  The rows are sharded like the parameter, so that no two devices of a worker send the same part. If
  an axis shards the first dimension of the parameter but does not divide the number of rows, the
  axis shards the largest other dimension that it divides.

  Args:
    shape: the shape of the rows; dimensions after the first are those of a parameter.
    named: the sharding of the parameters, by shape.
    sizes: sizes of the axes inside a worker, by name.
  """
  count, rest = shape[:1], shape[1:]
  like = [cut for known, cut in named.items() if rest and known[1:] == rest]
  if not like:
    return RuleCut({}, 0)
  of_rule, first = max(like, key=lambda cut: cut.first)  # stacked layers, if there are any
  cut = {axis: d for axis, d in of_rule.items() if d or count[0] % sizes[axis] == 0}
  for axis in set(of_rule) - set(cut):
    free = [d for d in range(1, len(shape)) if d not in cut.values() and not shape[d] % sizes[axis]]
    if free:
      cut[axis] = max(free, key=lambda d: shape[d])
  return RuleCut(cut, first)


def _place(name: str, shape: tuple[int, ...], sizes: Mapping[str, int], task: Task) -> RuleCut:
  axes = next((axes for pattern, axes in task.rules if re.search(pattern, name)), ())
  first = len(shape) - len(axes) if axes else 0
  assert first >= 0, f"a rule of {name} has more axes than it has dimensions"
  cut: dict[str, int] = {}
  of_layers = (*(None,) * (first - 1), "stage") if first else ()
  for dimension, axis in enumerate((*of_layers, *axes)):
    if not axis or axis.rstrip("?") not in sizes:
      continue
    size = sizes[axis.rstrip("?")]
    if shape[dimension] % size == 0:
      cut[axis.rstrip("?")] = dimension
    elif not axis.endswith("?"):
      raise ValueError(
        f"'{axis}:{size}' does not divide the {shape[dimension]} of {name} {list(shape)}"
      )
  return RuleCut(cut, first)
