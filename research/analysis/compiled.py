"""Reads the traffic of a compiled program: every collective in the program for the target.

`wire.py` reads the requested traffic from the traced program; this module reads the actual traffic.
The two modules share only the formulas for rings. Their results differ if a compiler changes the
traffic: XLA:CPU sums bfloat16 as float32, and XLA:TPU pads arrays that do not fit its tiles. If the
shards of an array do not fit the tiles, XLA:TPU may replace an all-gather or a reduce-scatter by an
all-reduce of the full array, which sends twice the bytes.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from research.analysis import hlo, slices
from research.analysis.trips import trip_count
from research.analysis.wire import Transfer, ring_share

_OPERATIONS = {
  "all-reduce": "all-reduce",
  "reduce-scatter": "reduce-scatter",
  "all-gather": "all-gather",
  "all-to-all": "all-to-all",
  "collective-permute": "permute",
}
# Instructions that move data between devices and are not counted.
_UNKNOWN = ("send", "recv", "collective-broadcast", "ragged-all-to-all")


class _Program(NamedTuple):
  computations: dict[int, hlo.Computation]
  devices: list[int]  # ids, in the program's order
  places: dict[int, tuple[int, ...]]  # position in the mesh by device id
  mesh: dict[str, int]


class Located(NamedTuple):
  """A transfer and the collective in the program that it belongs to."""

  transfer: Transfer
  computation: hlo.Computation
  instruction: Any


class _Exchange(NamedTuple):
  operation: str
  groups: list[list[int]]  # device ids; (from, to) for a permutation
  among: Iterable[int]  # ids of all devices that participate


def traffic(compiled: Any, mesh: Mesh) -> list[Transfer]:
  """Returns every transfer of a compiled program, per device.

  Each operand of a combined collective is a separate transfer. A device that is alone in its group
  sends nothing.

  Args:
    compiled: a `jax.stages.Compiled`, `jit(f).lower(...).compile()`, for any target.
    mesh: the mesh that the program was compiled for.

  Raises:
    ValueError: if the program's devices are not the mesh's, its device groups do not extend along
      axes of the mesh, a collective is in a loop of unknown length or in branches that communicate
      differently, or devices communicate by means other than collectives.
  """
  return transfers(hlo.module_of(compiled), mesh)


def transfers(module: Any, mesh: Mesh) -> list[Transfer]:
  """Returns every transfer of a program given as a protobuf message; see `traffic`.

  Args:
    module: a message of `hlo.module_class()`.
    mesh: the mesh that the program was compiled for.

  Raises:
    ValueError: see `traffic`.
  """
  return [found.transfer for found in located(module, mesh)]


def located(module: Any, mesh: Mesh) -> list[Located]:
  """Returns every transfer of a program with its place in the program; see `traffic`.

  Args:
    module: a message of `hlo.module_class()`.
    mesh: the mesh that the program was compiled for.

  Raises:
    ValueError: see `traffic`.
  """
  places = {device.id: place for place, device in np.ndenumerate(mesh.devices)}
  computations, devices = hlo.computations_of(module), _devices(module, places)
  program = _Program(computations, devices, places, dict(mesh.shape))
  return list(_walk(program, computations[module.entry_computation_id], 1, False))


def _devices(module: Any, expected: Iterable[int]) -> list[int]:
  """Returns the device ids in a program's order; with several slices, those of the first slice."""
  assignment = module.device_assignment
  if min(assignment.replica_count, assignment.computation_count) > 1:
    raise ValueError("a program that is replicated and partitioned at once is not supported")
  ids = [i for part in assignment.computation_devices for i in part.replica_device_ids]
  found = ids if sorted(ids) == sorted(expected) else slices.devices_of_one(ids, expected)
  if not found:
    raise ValueError(f"the program is for devices {sorted(ids)}, the mesh has {sorted(expected)}")
  return found


def _walk(
  program: _Program, computation: hlo.Computation, times: int, fused: bool
) -> Iterator[Located]:
  for instruction in computation.instructions.values():
    opcode = instruction.opcode.removesuffix("-start")
    called = [program.computations[i] for i in instruction.called_computation_ids]
    if opcode.endswith(("-done", "-update")):
      continue  # the collective is counted at its start
    if opcode in _OPERATIONS:
      if not (fused and _goes_on(computation, instruction)):
        exchange = _collective(program, computation, instruction, fused)
        yield from _counted(program, computation, instruction, exchange, times)
    elif opcode == "send" and instruction.is_host_transfer:
      crossing = slices.crossing(instruction)
      if crossing:
        exchange = _Exchange(*crossing, program.places)
        yield from _counted(program, computation, instruction, exchange, times)
    elif (opcode in _UNKNOWN and not instruction.is_host_transfer) or _sends_itself(instruction):
      raise ValueError(f"what '{instruction.name}' sends is not known")
    elif opcode == "while":
      yield from _loop(program, computation, instruction, times)
    elif opcode == "conditional":
      yield from _branches([list(_walk(program, branch, times, False)) for branch in called])
    else:
      for inner in called:
        yield from _walk(program, inner, times, opcode == "fusion")


def _loop(
  program: _Program, computation: hlo.Computation, loop: Any, times: int
) -> Iterator[Located]:
  body, condition = (
    list(_walk(program, program.computations[i], times, False)) for i in loop.called_computation_ids
  )
  if body or condition:
    trips = trip_count(loop, computation, program.computations)
    yield from (_repeated(found, trips + 1) for found in condition)
    yield from (_repeated(found, trips) for found in body if trips)


def _repeated(found: Located, times: int) -> Located:
  return found._replace(transfer=found.transfer._replace(times=found.transfer.times * times))


def _branches(branches: list[list[Located]]) -> list[Located]:
  sent = lambda branch: sorted(found.transfer for found in branch)
  if any(sent(branch) != sent(branches[0]) for branch in branches):
    raise ValueError("the branches of a condition communicate differently")
  return branches[0]


def _sends_itself(instruction: Any) -> bool:
  """Returns whether a kernel, such as a Pallas kernel, itself sends an unknown amount of data."""
  return instruction.opcode == "custom-call" and bool(
    hlo.config_of(instruction).get("custom_call_config", {}).get("has_communication")
  )


def _users(computation: hlo.Computation, instruction: Any) -> list[Any]:
  return [i for i in computation.instructions.values() if instruction.id in i.operand_ids]


def _goes_on(computation: hlo.Computation, instruction: Any) -> bool:
  """Returns whether a fused collective continues one that another fusion has started.

  XLA:TPU overlaps a collective with several fusions, each of which repeats the instruction. The
  first fusion passes the instruction to a custom call AsyncCollectiveStart; all of these fusions
  have the same chain_id.
  """
  targets = {i.custom_call_target for i in _users(computation, instruction)}
  chained = "chain_id" in hlo.attributes_of(instruction) or "AsyncCollectiveDone" in targets
  return chained and "AsyncCollectiveStart" not in targets


def _collective(
  program: _Program, computation: hlo.Computation, instruction: Any, fused: bool
) -> _Exchange:
  operation = _OPERATIONS[instruction.opcode.removesuffix("-start")]
  if operation == "permute":
    groups = [[pair.source, pair.target] for pair in instruction.source_target_pairs]
  else:
    groups = hlo.groups_of(instruction) or [list(range(len(program.devices)))]
  if fused and operation == "all-reduce" and _sliced(computation, instruction, len(groups[0])):
    operation = "reduce-scatter"
  devices = program.devices
  return _Exchange(operation, [[devices[n] for n in group] for group in groups], devices)


def _sliced(computation: hlo.Computation, instruction: Any, workers: int) -> bool:
  """Returns whether an all-reduce is a fused reduce-scatter: each worker uses only its part."""
  users = _users(computation, instruction)
  return bool(users) and all(
    user.opcode == "dynamic-slice"
    and hlo.bytes_of(user.shape) * workers == hlo.bytes_of(instruction.shape)
    for user in users
  )


def _counted(
  program: _Program, computation: hlo.Computation, instruction: Any, exchange: _Exchange, times: int
) -> Iterator[Located]:
  operation, groups, among = exchange
  if operation == "permute":
    moves = [pair for pair in groups if pair[0] != pair[1]]
    axes, share = _differing(program, moves), ring_share(operation, len([*among]), len(moves))
  else:
    axes, share = _axes(program, exchange), ring_share(operation, len(groups[0]))
  if not axes:
    return
  operands = [computation.instructions[i].shape for i in instruction.operand_ids]
  sizes = [(hlo.dtype_of(x), hlo.bytes_of(x)) for x in operands if not hlo.is_token(x)]
  if operation == "all-to-all":  # operand i goes to worker i: all operands are one transfer
    sizes = [(sizes[0][0], sum(size for _, size in sizes))]
  for dtype, payload in sizes:
    transfer = Transfer(operation, axes, dtype, payload, share * payload, times)
    yield Located(transfer, computation, instruction)


def _differing(program: _Program, groups: list[list[int]]) -> tuple[str, ...]:
  """Returns the axes along which the members of some group differ."""
  apart = np.zeros(len(program.mesh), bool)
  for group in groups:
    apart |= np.ptp([program.places[i] for i in group], axis=0) > 0
  return tuple(name for name, differs in zip(program.mesh, apart, strict=True) if differs)


def _axes(program: _Program, exchange: _Exchange) -> tuple[str, ...]:
  """Returns the axes along which the groups of devices extend.

  Raises:
    ValueError: if the groups do not extend along one or more full axes of the mesh.
  """
  axes = _differing(program, exchange.groups)
  width = int(np.prod([program.mesh[axis] for axis in axes]))
  whole = sorted(i for group in exchange.groups for i in group) == sorted(exchange.among)
  if not whole or any(len(group) != width for group in exchange.groups):
    raise ValueError(f"device groups {exchange.groups} are not axes of the mesh")
  return axes
