"""Counts the elements that a worker encodes, decodes and combines in a traced round.

The compressors of a method, and its aggregators that contain no others, are replaced by objects
that call the original ones in functions with a known name. The calls stay visible in the traced
program, with the shapes of their arrays and inside the loops that repeat them. What remains is
arithmetic on whole arrays, such as that of error feedback. `fusion` says how much it reads and
writes; that is counted under the name ARITHMETIC. XLA fuses decoding with the operation that needs
the decoded array, so decoding is counted with its result, which is not read again. The program is
traced, not run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

from research.analysis import fusion
from research.analysis.network import Kernel
from research.analysis.rounds import programs
from research.core.base import EVERYONE, Aggregator, Compressor
from research.core.part import Part

ARITHMETIC = "arithmetic"  # four bytes that operations outside of all kernels read or write
_MARK = "kernel "


class Count(NamedTuple):
  """Numbers of elements per round."""

  encoded: float
  decoded: float

  def seconds(self, kernel: Kernel) -> float:
    """Returns the seconds that these elements take."""
    return self.encoded * kernel.encode + self.decoded * kernel.decode


class Marked(Compressor):
  """A compressor whose calls can be found in a traced program."""

  inner: Compressor

  @property
  def linear(self):
    return self.inner.linear

  @property
  def contractive(self):
    return self.inner.contractive

  @property
  def sparse(self):
    return self.inner.sparse

  def encode(self, x, shared, own):
    return self._call("encode", lambda x: self.inner.encode(x, shared, own))(x)

  def decode(self, payload, like, shared):
    return self._call("decode", lambda payload: self.inner.decode(payload, like, shared))(payload)

  def _call(self, side: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    function.__name__ = f"{_MARK}{side} {self.inner!r}"
    return jax.jit(function)


def marked(part: Any) -> Any:
  """Returns a copy of a method or an aggregator with marked compressors.

  A compressor inside another one is a part of it, and is not marked.

  Args:
    part: the object; anything that has no compressors is returned as it is.
  """
  if isinstance(part, Compressor):
    return Marked(part)
  if not isinstance(part, Part):
    return part
  if isinstance(part, Aggregator) and not any(isinstance(one, Part) for one in part.values()):
    return _marked_aggregator(part)
  changes = {
    field.name: marked(getattr(part, field.name))
    for field in dataclasses.fields(part)  # pyright: ignore[reportArgumentType]
    if isinstance(getattr(part, field.name), Part)
  }
  return part.replace(**changes)


def _marked_aggregator(part: Aggregator) -> Aggregator:
  """Returns a copy of an aggregator whose `aggregate` is one call in a traced program."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    def function(tree, state, key):
      return part.aggregate(tree, state, key, presence)

    size = sum(leaf.size for leaf in jax.tree.leaves(tree))
    function.__name__ = f"{_MARK}{size} {part!r}"
    return jax.jit(function)(tree, state, key)

  kind = type(part)
  marked_kind = type(kind.__name__, (kind,), {"title": kind.title, "aggregate": aggregate})
  found = object.__new__(marked_kind)
  for name, value in part.fields().items():
    object.__setattr__(found, name, value)
  return found


def counts(program: core.ClosedJaxpr) -> dict[str, Count]:
  """Counts the elements by compressor, including all iterations of loops.

  Of the branches of a conditional, the one that encodes most is counted.

  Args:
    program: the traced round of one worker, whose method is `marked`.

  Returns:
    The counts by the compressors' specs.
  """
  flat = fusion.flat(program, _MARK)
  found: dict[str, Count] = {}
  decoded = f"{_MARK}decode "
  calls = [one for one in flat.operations if str(one.eqn.params.get("name")).startswith(decoded)]
  if moved := fusion.traffic(flat, {value for one in calls for value in one.outputs}):
    found[ARITHMETIC] = Count(moved / 4, 0)
  for operation in flat.operations:
    eqn = operation.eqn
    name = str(eqn.params.get("name", ""))
    if name.startswith(_MARK):
      _add(found, _of_kernel(eqn, *name.removeprefix(_MARK).split(" ", 1)), 1)
      continue
    inner = [counts(one) for one in programs(eqn)]
    if eqn.primitive.name == "cond":
      inner = [max(inner, key=lambda one: sum(map(sum, one.values())), default={})]
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for one in inner:
      _add(found, one, times)
  return found


def _of_kernel(eqn: Any, side: str, spec: str) -> dict[str, Count]:
  """Returns the elements of a marked call; an aggregator's are those of the tree."""
  if side not in ("encode", "decode"):
    return {spec: Count(int(side), 0)}
  arrays = eqn.invars if side == "encode" else eqn.outvars
  size = max(math.prod(x.aval.shape) for x in arrays)  # keys may come before the array
  return {spec: Count(size, 0) if side == "encode" else Count(0, size)}


def _add(totals: dict[str, Count], more: Mapping[str, Count], times: int) -> None:
  for spec, one in more.items():
    before = totals.get(spec, Count(0, 0))
    totals[spec] = Count(before.encoded + times * one.encoded, before.decoded + times * one.decoded)
