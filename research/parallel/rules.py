"""Sharding by rules: which dimensions of a task's parameters lie along which mesh axes."""

import re
from collections.abc import Mapping

import jax

from research.base import Task


def by_shape(sizes: Mapping[str, int], task: Task) -> dict[tuple[int, ...], dict[str, int]]:
  """The dimension that each axis cuts, by the shape of a parameter.

  A rule (pattern, axes) is that of the parameters whose path, such as 'layers/attention/query',
  it is found in; its axes are those of the last dimensions. State that has the shape of a parameter
  (moments, memories) is cut as it is, so parameters of one shape have to be cut alike.

  Args:
    sizes: of the axes inside a worker.
    task: with its rules, of which the first that fits counts.

  Raises:
    ValueError: if an axis does not divide a dimension or cuts no parameter at all, or rules differ
      for parameters of one shape.
  """
  found: dict[tuple[int, ...], tuple[str, dict[str, int]]] = {}
  params = jax.eval_shape(task.init, jax.random.key(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    cut = _cut(name, leaf.shape, sizes, task)
    other, before = found.setdefault(leaf.shape, (name, cut))
    if before != cut:
      raise ValueError(
        f"{name} and {other} are both {list(leaf.shape)} and are to be cut differently; give the "
        "model other widths"
      )
  used = {axis for _, cut in found.values() for axis in cut}
  idle = [axis for axis in sizes if axis != "fsdp" and axis not in used]
  if idle:
    raise ValueError(f"'{idle[0]}' has nothing to cut in this model; leave it out")
  return {shape: cut for shape, (_, cut) in found.items()}


def _cut(name: str, shape: tuple[int, ...], sizes: Mapping[str, int], task: Task) -> dict[str, int]:
  axes = next((axes for pattern, axes in task.rules if re.search(pattern, name)), ())
  first = len(shape) - len(axes)  # what stands before, such as the layers, is not cut
  assert first >= 0, f"a rule of {name} has more axes than it has dimensions"
  cut = {axis: first + place for place, axis in enumerate(axes) if axis and axis in sizes}
  for axis, dimension in cut.items():
    if shape[dimension] % sizes[axis]:
      raise ValueError(
        f"'{axis}:{sizes[axis]}' does not divide the {shape[dimension]} of {name} {list(shape)}"
      )
  return cut
