"""Determines what a compiled program computes while its collectives are under way.

A collective is asynchronous if its program starts it with one instruction and waits for its result
with a later one. Between the two, the device runs the instructions that the schedule places there.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.sharding import Mesh

from research.analysis import hlo
from research.analysis.compiled import Located, located
from research.analysis.trips import trip_count
from research.analysis.wire import Transfer

_PRODUCTS = ("dot", "convolution")


class Span(NamedTuple):
  """The work that a device does between the start and the end of a transfer."""

  transfer: Transfer
  asynchronous: bool
  products: int  # matrix products in between
  loops: tuple[int, ...]  # trip counts of the loops in between that compute matrix products


class _Place(NamedTuple):
  computation: int
  instruction: int


class Schedule:
  """The order of execution of a compiled program.

  Args:
    module: a message of `hlo.module_class()`.
  """

  def __init__(self, module: Any):
    self._module = module
    self.computations = hlo.computations_of(module)
    self.entry = module.entry_computation_id
    self._order = hlo.schedule_of(module)
    self._callers = {
      called: _Place(c.id, i.id)
      for c in self.computations.values()
      for i in c.instructions.values()
      for called in i.called_computation_ids
    }

  def spans(self, mesh: Mesh) -> list[Span]:
    """Returns the work between the start and the end of every collective.

    Args:
      mesh: the mesh that the program was compiled for.

    Raises:
      ValueError: see `compiled.traffic`.
    """
    return [self._span(found) for found in located(self._module, mesh)]

  def products(self) -> int:
    """Returns the number of matrix products that the program computes."""
    return self._products(self.computations[self.entry])

  def _span(self, found: Located) -> Span:
    start = _Place(found.computation.id, found.instruction.id)
    while start.computation not in self._order and start.computation in self._callers:
      start = self._callers[start.computation]  # the fusion that contains the collective
    order = self._order.get(start.computation, [start.instruction])
    ends = [order.index(i) for i in self._ends(found, start) if i in order]
    begin = order.index(start.instruction)
    end = max(ends, default=begin)
    computation = self.computations[start.computation]
    between = [computation.instructions[i] for i in order[begin + 1 : end]]
    loops = [i for i in between if i.opcode == "while" and self._of(computation, i)]
    return Span(
      found.transfer,
      end > begin,
      sum(self._of(computation, i) for i in between),
      tuple(trip_count(i, computation, self.computations) for i in loops),
    )

  def _ends(self, found: Located, start: _Place) -> Iterator[int]:
    """Returns the ids of the instructions that wait for the result of a collective."""
    instructions = self.computations[start.computation].instructions
    instruction = instructions[start.instruction]
    if instruction.opcode == "send":  # the `recv` with the same token returns the result
      token = instruction.operand_ids[-1]
      received = [
        i.id for i in instructions.values() if i.opcode == "recv" and token in i.operand_ids
      ]
      yield from (
        i.id
        for i in instructions.values()
        if i.opcode == "recv-done" and set(received) & set(i.operand_ids)
      )
    elif instruction.opcode.endswith("-start"):
      yield from (
        i.id
        for i in instructions.values()
        if i.opcode.endswith("-done") and instruction.id in i.operand_ids
      )
    chain = hlo.attributes_of(found.instruction).get("chain_id")
    if chain:
      yield from (i.id for i in instructions.values() if chain in self._chains(i))

  def _chains(self, instruction: Any) -> set[str]:
    """Returns the ids of the collectives that a fusion executes in part."""
    found = [self.computations[i].instructions.values() for i in instruction.called_computation_ids]
    ids = (hlo.attributes_of(i).get("chain_id") for inner in found for i in inner)
    return {chain for chain in ids if chain} if instruction.opcode == "fusion" else set()

  def _products(self, computation: hlo.Computation) -> int:
    return sum(self._of(computation, i) for i in computation.instructions.values())

  def _of(self, computation: hlo.Computation, instruction: Any) -> int:
    """Returns the number of matrix products that one execution of an instruction computes."""
    if instruction.opcode in _PRODUCTS:
      return 1
    called = [self._products(self.computations[i]) for i in instruction.called_computation_ids]
    if instruction.opcode == "conditional":
      return max(called)
    times = 1
    if instruction.opcode == "while" and any(called):
      times = trip_count(instruction, computation, self.computations)
    return times * sum(called)
