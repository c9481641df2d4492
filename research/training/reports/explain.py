"""Shows the sharding of each leaf of a run's state, without the run's devices or training."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax

from research.comm import mesh as meshes
from research.parallel import resize
from research.training import assemble
from research.training.config import Config, flag

WIDTH = 100
HEADS = ("leaf", "shape", "type", "lies along", "bytes")


class Row(NamedTuple):
  """A leaf of the state."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  spec: str  # the partition spec, such as P('data', None, 'fsdp')
  bytes: int  # bytes per device
  everywhere: int  # bytes over all devices


def imitate_devices(config: Config) -> None:
  """Creates a CPU device for each position of the mesh; call it before JAX initializes its devices.

  `simulate` distributes its workers over the existing devices, so no devices are created for it.

  Args:
    config: the run.

  Raises:
    UsageError: if the mesh is invalid.
  """
  with flag("mesh", config.mesh):
    places = meshes.count(meshes.parse_mesh(config.mesh))
  if config.executor != "simulate":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", places)


def rows(config: Config) -> list[Row]:
  """Returns the leaves of a run's state in the shardings of its executor.

  Args:
    config: the run.

  Raises:
    UsageError: if a flag is invalid.
  """
  problem = assemble.assemble(config, assemble.check(config))
  state = jax.eval_shape(problem.executor.init, jax.random.key(0))
  private = problem.executor.layout.state
  leaves = resize.placed(problem.job, private, state).leaves.values()
  return [row(*of) for of in zip(leaves, jax.tree.leaves(state), strict=True)]


def row(lies: resize.Leaf, leaf: Any) -> Row:
  """Describes one leaf.

  Args:
    lies: the placement of the leaf.
    leaf: the shape, dtype and sharding of the leaf.
  """
  spec = ", ".join(repr(tuple(d) if isinstance(d, list) else d) for d in leaf.sharding.spec)
  held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  devices = len(leaf.sharding.device_set)
  return Row(lies.name, leaf.shape, str(leaf.dtype), f"P({spec})", held, held * devices)


def explanation(config: Config) -> str:
  """Formats a table with one line per leaf, followed by totals by part of the state.

  Args:
    config: the run.
  """
  found = rows(config)
  lines = [
    (r.name, str(list(r.shape)), r.dtype, r.spec, f"{r.bytes:,}") for r in found if 0 not in r.shape
  ]
  parts: Counter[str] = Counter()
  for r in found:
    parts[".".join(r.name.split(".")[:2])] += r.bytes
  totals = [(part, f"{count:,}") for part, count in parts.items()]
  totals += [("in all", f"{parts.total():,}")]
  totals += [("in all, of all devices", f"{sum(r.everywhere for r in found):,}")]
  head = f"--executor={config.executor} --mesh={config.mesh}: bytes are those of one device"
  return "\n".join([head, "", *table([HEADS, *lines]), "", *table(totals)])


def table(lines: list[tuple[str, ...]]) -> list[str]:
  """Aligns columns, the last column to the right; an overlong first cell gets a separate line.

  Args:
    lines: rows of cells.
  """
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rest = sum(widths[1:]) + 2 * (len(widths) - 1)
  first = max([len(line[0]) for line in lines if len(line[0]) + rest <= WIDTH], default=0)
  found: list[str] = []
  for name, *cells in lines:
    if len(name) > first:
      found.append(name)
    shown = [cell.ljust(width) for cell, width in zip(cells[:-1], widths[1:-1], strict=True)]
    start = "".ljust(first) if len(name) > first else name.ljust(first)
    found.append("  ".join([start, *shown, cells[-1].rjust(widths[-1])]))
  return found
