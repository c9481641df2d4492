"""Finds the trip counts of compiled loops by evaluating the condition on the loop's counter.

Only values that the condition reads are computed: integers that start from constants and change by
arithmetic on constants. Arrays and data-dependent values remain unknown.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from research.analysis.hlo import Computation, config_of

# Arguments of a computation: (index of the parameter, path into its tuple) -> value if known
Arguments = Callable[[int, tuple[int, ...]], int | None]

_MOST = 1_000_000
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
  "add": operator.add,
  "subtract": operator.sub,
  "multiply": operator.mul,
  "minimum": min,
  "maximum": max,
  "and": operator.and_,
  "or": operator.or_,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
  "LT": operator.lt,
  "LE": operator.le,
  "GT": operator.gt,
  "GE": operator.ge,
  "EQ": operator.eq,
  "NE": operator.ne,
}
_PASS_ON = ("copy", "bitcast", "reshape", "convert", "opt-barrier", "copy-done")


def trip_count(loop: Any, computation: Computation, computations: Mapping[int, Computation]) -> int:
  """Returns the trip count of a `while`, using the compiler's own count if it recorded one.

  Args:
    loop: the `while` instruction.
    computation: the computation that contains it.
    computations: all computations of the program, by id.

  Raises:
    ValueError: if the trip count depends on data.
  """
  found = config_of(loop).get("known_trip_count")
  if found:
    return int(found["n"])
  body, condition = (computations[i] for i in loop.called_computation_ids)
  unknown = lambda number, path: None
  state = {
    path: _evaluate(computations, computation, loop.operand_ids[0], path, unknown)
    for path in _carried(computations, condition, body)
  }
  for trips in range(_MOST):
    known = lambda number, path, state=state: state[path]
    goes_on = _evaluate(computations, condition, condition.root, (), known)
    if goes_on is None:
      break
    if not goes_on:
      return trips
    state, last = {p: _evaluate(computations, body, body.root, p, known) for p in state}, state
    if state == last or any(x is not None and not -(2**31) <= x < 2**31 for x in state.values()):
      break  # the state does not change, or may overflow
  where = loop.metadata.op_name or loop.name
  raise ValueError(f"the loop '{where}' communicates, and its number of iterations is not known")


def _carried(
  computations: Mapping[int, Computation], condition: Computation, body: Computation
) -> set[tuple[int, ...]]:
  """Returns the parts of a loop's state that its condition depends on, over all iterations."""
  found: set[tuple[int, ...]] = set()
  fresh: set[tuple[int, ...]] = set()

  def note(number, path):
    del number
    if path not in found:
      fresh.add(path)

  _evaluate(computations, condition, condition.root, (), note)
  while fresh:
    path = fresh.pop()
    found.add(path)
    _evaluate(computations, body, body.root, path, note)
  return found


def _evaluate(
  computations: Mapping[int, Computation],
  computation: Computation,
  number: int,
  path: tuple[int, ...],
  arguments: Arguments,
) -> int | None:
  """Returns the integer value of an instruction, at a path into its tuple; None if unknown."""
  instruction = computation.instructions[number]
  operands = instruction.operand_ids
  value = lambda place, path=(): _evaluate(
    computations, computation, operands[place], path, arguments
  )
  match instruction.opcode:
    case "constant":
      return _constant(instruction.literal)
    case "parameter":
      return arguments(instruction.parameter_number, path)
    case "get-tuple-element":
      return value(0, (instruction.tuple_index, *path))
    case "tuple":
      return value(path[0], path[1:])
    case "fusion" | "call":
      called = computations[instruction.called_computation_ids[0]]
      return _evaluate(computations, called, called.root, path, value)
    case "copy-start":  # returns (copy, original, context)
      return value(0, path[1:])
    case "compare":
      return _apply(_COMPARISONS[instruction.comparison_direction], value(0), value(1))
    case name if name in _ARITHMETIC:
      return _apply(_ARITHMETIC[name], value(0), value(1))
    case name if name in _PASS_ON:
      return value(0, () if name == "copy-done" else path)
  return None


def _apply(function: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
  return None if a is None or b is None else function(a, b)


def _constant(literal: Any) -> int | None:
  """Returns the value of a scalar integer or bool literal; None for other literals."""
  held = [x for name in ("preds", "s32s", "s64s", "u32s", "u64s") for x in getattr(literal, name)]
  return int(held[0]) if len(held) == 1 else None
