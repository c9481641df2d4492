"""Counts what fused elementwise operations of a traced program read and write.

XLA computes a chain of elementwise operations in one loop over memory. Such a loop takes about as
long as it takes to read its inputs and to write its result, however many operations it contains.
A chain ends where its value is a result of the program, an operand of another kind of operation, or
a sum over a dimension. These values are written to memory; all others are computed again in each
loop that needs them.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from jax.extend import core

from research.analysis.rounds import programs

REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min"}
ARITHMETIC = REDUCTIONS | {
  *("add", "add_any", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "square", "sqrt"),
  *("rsqrt", "exp", "log", "pow", "integer_pow", "select_n", "clamp", "round", "floor"),
  *("ge", "gt", "le", "lt", "eq", "ne", "and", "or", "xor", "not", "convert_element_type"),
}
FREE = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}  # change no value
CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}


class Operation(NamedTuple):
  """An operation of a program without calls; values are numbered."""

  eqn: Any
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def name(self) -> str:
    """The name of the primitive."""
    return self.eqn.primitive.name


class Flat(NamedTuple):
  """A program whose calls are replaced by the operations of the called functions."""

  operations: list[Operation]
  outputs: set[int]  # values
  bytes: list[int]  # of each value


def flat(program: core.ClosedJaxpr, kept: str) -> Flat:
  """Replaces calls by the operations of the called functions.

  Args:
    program: the program.
    kept: calls of functions whose names start with this text stay.
  """
  found = Flat([], set(), [])
  jaxpr = program.jaxpr
  numbers = {v: _value(found, v) for v in (*jaxpr.invars, *jaxpr.constvars)}
  _flatten(jaxpr, numbers, kept, found)
  found.outputs.update(_number(found, numbers, v) for v in jaxpr.outvars)
  return found


def _value(found: Flat, variable: Any) -> int:
  """Returns the number of a new value; a literal is part of the code, and has no bytes."""
  shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
  is_literal = isinstance(variable, core.Literal)
  found.bytes.append(0 if is_literal else math.prod(shape) * getattr(dtype, "itemsize", 0))
  return len(found.bytes) - 1


def _number(found: Flat, numbers: dict[Any, int], variable: Any) -> int:
  return _value(found, variable) if isinstance(variable, core.Literal) else numbers[variable]


def _flatten(jaxpr: Any, numbers: dict[Any, int], kept: str, found: Flat) -> None:
  for eqn in jaxpr.eqns:
    inputs = tuple(_number(found, numbers, v) for v in eqn.invars)
    called = list(programs(eqn)) if eqn.primitive.name in CALLS else []
    if len(called) == 1 and not str(eqn.params.get("name", "")).startswith(kept):
      inner = called[0].jaxpr
      inside = dict(zip(inner.invars, inputs, strict=True))
      inside |= {v: _value(found, v) for v in inner.constvars}
      _flatten(inner, inside, kept, found)
      outputs = [_number(found, inside, v) for v in inner.outvars]
    else:
      outputs = [_value(found, v) for v in eqn.outvars]
      found.operations.append(Operation(eqn, inputs, tuple(outputs)))
    numbers.update(zip(eqn.outvars, outputs, strict=True))


def traffic(program: Flat, computed: Collection[int] = ()) -> int:
  """Returns the bytes that the elementwise operations and sums read and write.

  Args:
    program: the program.
    computed: values of other operations that a loop computes by itself and need not read.
  """
  makers = {
    value: one
    for one in program.operations
    if one.name in ARITHMETIC or one.name in FREE
    for value in one.outputs
  }
  others = [one for one in program.operations if not makers.keys() & set(one.outputs)]
  needed = {value for one in others for value in one.inputs}
  sums = {value for value, one in makers.items() if one.name in REDUCTIONS}
  ends = (program.outputs | needed | sums) & makers.keys()
  return sum(_loop(program, value, ends, makers, computed) for value in ends)


def _loop(
  program: Flat,
  end: int,
  ends: set[int],
  makers: dict[int, Operation],
  computed: Collection[int],
) -> int:
  """Returns the bytes of the loop that computes `end`; 0 if it does no arithmetic."""
  waiting, seen, computes, moved = [end], {end}, False, program.bytes[end]
  while waiting:
    one = makers[waiting.pop()]
    computes |= one.name in ARITHMETIC
    for value in set(one.inputs) - seen:
      seen.add(value)
      if value in makers and value not in ends:
        waiting.append(value)
      elif value not in computed:
        moved += program.bytes[value]
  return moved if computes else 0
