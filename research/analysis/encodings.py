"""Counts the elements that a worker encodes and decodes in a round, from the traced program.

The compressors of a method are replaced by compressors that call the original ones in functions
with a known name. The calls stay visible in the traced program, with the shapes of their arrays and
inside the loops that repeat them. The program is traced, not run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

from research.analysis.network import Kernel
from research.analysis.rounds import programs
from research.core.base import Compressor
from research.core.part import Part

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
  changes = {
    field.name: marked(getattr(part, field.name))
    for field in dataclasses.fields(part)  # pyright: ignore[reportArgumentType]
    if isinstance(getattr(part, field.name), Part)
  }
  return part.replace(**changes)


def counts(program: core.ClosedJaxpr) -> dict[str, Count]:
  """Counts the elements by compressor, including all iterations of loops.

  Of the branches of a conditional, the one that encodes most is counted.

  Args:
    program: the traced round of one worker, whose method is `marked`.

  Returns:
    The counts by the compressors' specs.
  """
  found: dict[str, Count] = {}
  for eqn in program.jaxpr.eqns:
    name = str(eqn.params.get("name", ""))
    if name.startswith(_MARK):
      side, spec = name.removeprefix(_MARK).split(" ", 1)
      is_encoding = side == "encode"
      arrays = eqn.invars if is_encoding else eqn.outvars
      size = max(math.prod(x.aval.shape) for x in arrays)  # keys may come before the array
      _add(found, {spec: Count(size, 0) if is_encoding else Count(0, size)}, 1)
      continue
    inner = [counts(one) for one in programs(eqn)]
    if eqn.primitive.name == "cond":
      inner = [max(inner, key=lambda one: sum(map(sum, one.values())), default={})]
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for one in inner:
      _add(found, one, times)
  return found


def _add(totals: dict[str, Count], more: Mapping[str, Count], times: int) -> None:
  for spec, one in more.items():
    before = totals.get(spec, Count(0, 0))
    totals[spec] = Count(before.encoded + times * one.encoded, before.decoded + times * one.decoded)
