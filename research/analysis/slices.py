"""Traffic between TPU slices, which XLA sends over the hosts' network, not by collectives.

A program for several slices is compiled for one of them and runs on all. Slices communicate through
`send` instructions to the megascale runtime; the attributes of an instruction specify the
operation.
"""

import re
from collections.abc import Iterable
from typing import Any

from research.analysis import hlo

_RUNTIME = "xla_megascale_runtime"
_STRIDE = 100_000  # a device's id is its slice's number times this, plus its number in the slice
_OPERATIONS = {
  "ALL_REDUCE": "all-reduce",
  "REDUCE_SCATTER": "reduce-scatter",
  "ALL_GATHER": "all-gather",
  "ALL_TO_ALL": "all-to-all",
  "ONE_TO_ONE": "permute",
}


def devices_of_one(numbers: list[int], devices: Iterable[int]) -> list[int]:
  """Returns the ids of the first slice's devices, in a program's order; empty without slices.

  Args:
    numbers: the numbers of the program's devices within their slice.
    devices: ids of all devices of all slices.
  """
  starts = sorted({i - i % _STRIDE for i in devices})
  every = {start + number for start in starts for number in numbers}
  return [starts[0] + number for number in numbers] if every == set(devices) else []


def crossing(send: Any) -> tuple[str, list[list[int]]] | None:
  """Parses the operation and the groups of device ids of a `send` between slices.

  Args:
    send: the instruction.

  Returns:
    The operation and its groups, which are pairs (from, to) for a permutation; None if the data
    stays on the host.

  Raises:
    ValueError: if the runtime's operation or target is unknown.
  """
  noted = hlo.attributes_of(send)
  if noted.get("_xla_host_transfer_handler_name") != _RUNTIME:
    return None
  kind, target = noted.get("_xla_megascale_transfer_type"), noted.get("_xla_megascale_target", "")
  if kind not in _OPERATIONS:
    raise ValueError(f"what '{send.name}' sends to other slices as {kind} is not known")
  product = re.fullmatch(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", target)
  if product:
    numbers = range(int(product[2]), int(product[3]) + 1)
    starts = [int(s) * _STRIDE for s in product[1].split(",")]
    return _OPERATIONS[kind], [[start + n for start in starts] for n in numbers]
  groups = re.findall(r"\{(\d+(?:(?:,|->)\d+)*)\}", target)
  if not groups:
    raise ValueError(f"the target {target!r} of '{send.name}' is not supported")
  return _OPERATIONS[kind], [[int(i) for i in re.split(",|->", group)] for group in groups]
