"""How often a compiled loop runs: its condition is evaluated on its own counter.

Only what the condition reads is computed: whole numbers that start from constants and change by
arithmetic on constants. Arrays, and whatever depends on data, stay unknown.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from research.analysis.hlo import Computation, config_of

# What a computation is given: (number of the parameter, path into its tuple) -> value if known
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
  """How often the body of a `while` runs.

  The compiler's own finding is taken where it left one.

  Args:
    loop: the instruction.
    computation: the one that it stands in.
    computations: those of the program, by id.

  Raises:
    ValueError: if the number depends on data.
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
      break  # it does not move, or may wrap around
  where = loop.metadata.op_name or loop.name
  raise ValueError(f"how often the loop '{where}' runs, in which workers talk, is not known")


def _carried(
  computations: Mapping[int, Computation], condition: Computation, body: Computation
) -> set[tuple[int, ...]]:
  """The parts of the loop's state that its condition depends on, from trip to trip."""
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
  """The whole number that an instruction gives at a path into its tuple, if it can be known."""
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
    case "copy-start":  # gives (copy, original, context)
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
  """A scalar of a whole type."""
  held = [x for name in ("preds", "s32s", "s64s", "u32s", "u64s") for x in getattr(literal, name)]
  return int(held[0]) if len(held) == 1 else None
