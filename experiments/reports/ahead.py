"""Compiles a run's round for TPU chips without TPUs; reports its memory, work and traffic.

The compiled program is the one that `spmd` runs; shapes replace its arguments. Import this module
only after `compile.py` has set the environment variables.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.analysis import chips, flops, hlo, schedule, wire
from research.comm import mesh as meshes
from research.core import blame
from research.core.base import WORKER_AXES, Tree
from research.core.task import Data, TrainState, loss_and_metrics
from research.parallel import pipelined, workers
from research.parallel.job import Job
from research.training import assemble
from research.training.config import Config, UsageError, flag


class Target(NamedTuple):
  """The compilation target."""

  topology: str
  chip: chips.Chip
  shape: tuple[int, ...]  # dimensions of a slice
  slices: int
  devices: Sequence[Any]


def target(topology: str, slices: int) -> Target:
  """Returns the devices of a topology, as described by XLA:TPU.

  Args:
    topology: the chip and the dimensions of a slice, such as v5p:8x8x8.
    slices: number of slices.

  Raises:
    UsageError: if the topology is unknown.
  """
  with flag("topology", topology), blame.of_libraries():
    name, shape = chips.parse_topology(topology)
    # by default, the compiler treats a v4 chip as two devices; on real machines, it is one device
    cores = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
      found = topologies.get_topology_desc(topology, "tpu", num_slices=slices, **cores)
    except jax.errors.JaxRuntimeError as error:
      raise ValueError(f"the compiler says {_first_line(error)}") from error
  return Target(topology, chips.CHIPS[name], shape, slices, found.devices)


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:300]


def problem_of(config: Config, target: Target) -> assemble.Problem:
  """Builds the parts of a run for the target's devices, without placing or executing anything.

  Raises:
    UsageError: if a flag is invalid.
  """
  setting = assemble.check(config)
  with flag("mesh", config.mesh):
    places, count = meshes.count(setting.axes), len(target.devices)
    if places != count:
      raise ValueError(
        f"has {places} places, and {target.slices} x {target.topology} has {count} chips"
      )
    if setting.axes.get("slice", 1) != target.slices:
      raise ValueError(f"with --slices={target.slices} the mesh has slice:{target.slices}")
  return assemble.assemble(config, setting, target.devices)


def arguments(problem: assemble.Problem) -> tuple[TrainState, Data]:
  """Returns the shapes of a run's state and data, with their shardings."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = problem.executor.init.eval_shape(key)
  mesh = state.round.sharding.mesh
  everywhere = NamedSharding(mesh, P())
  rows = NamedSharding(mesh, P(tuple(meshes.worker_axes(mesh.shape))))
  place = lambda where: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  held = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, problem.examples))
  sizes = jax.ShapeDtypeStruct(problem.job.sizes.shape, jnp.int32)
  return state, Data(
    jax.tree.map(place(rows), held), place(everywhere)(sizes), place(everywhere)(key)
  )


def compiled_round(config: Config, target: Target, effort: float = 0.0) -> dict[str, Any]:
  """Compiles one round and returns its resource use; bytes and FLOPs are those of one device.

  Args:
    config: the run's flags.
    target: the devices for which to compile.
    effort: the compiler's optimization effort, in [-1, 1]; runs use 0. With less effort,
      compilation is faster, and the program overlaps fewer operations and therefore needs less
      memory.

  Raises:
    UsageError: if a flag is invalid, or the program does not fit.
  """
  with jax.sharding.use_abstract_mesh(meshes.like(target.devices[0])):
    problem = problem_of(config, target)
    built = _compile(problem, target, effort)
    work = _work(problem, built)
  read = schedule.Schedule(hlo.module_of(built.program))
  try:
    spans, unread = read.spans(built.mesh), ""
  except ValueError as error:
    spans, unread = None, str(error)
  transfers = None if spans is None else [span.transfer for span in spans]
  steps = problem.job.method.local_steps * built.rounds
  return {
    **{name: getattr(config, name) for name in ("task", "model", "method", "mesh", "batch_size")},
    "effort": effort,
    "steps_per_round": problem.job.method.local_steps,
    "rounds": built.rounds,
    "memory": _memory(built.program.memory_analysis(), built.held, target),
    "flops": work["flops"],
    "hbm_bytes": work["hbm"],
    "collectives": _collectives(spans, steps, target.slices),
    "collectives_unread": unread,
    "products": read.products() / steps,
    "roofline": _roofline(work, transfers, steps, target),
    "seconds": {name: round(value, 2) for name, value in built.seconds.items()},
  }


class Built(NamedTuple):
  """A traced and compiled round."""

  rounds: int
  jaxpr: Any
  program: Any  # a jax.stages.Compiled
  mesh: Mesh
  held: dict[str, int]  # bytes of the arguments on one device, by name
  seconds: dict[str, float]


def _compile(problem: assemble.Problem, target: Target, effort: float) -> Built:
  """Compiles one round, or enough rounds to show how exchanges overlap with later rounds.

  Raises:
    UsageError: if the program does not fit.
  """
  state, data = arguments(problem)
  mesh, started = state.round.sharding.mesh, time.perf_counter()
  rounds = pipelined.rounds_shown(problem.executor.run)
  traced = problem.executor.run.trace(state, data, rounds=rounds)
  lowered, lowered_at = traced.lower(), time.perf_counter()
  held = {"state": _held(state), "examples": _held(data)}
  try:
    program = lowered.compile({"exec_time_optimization_effort": effort})
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UsageError(too_large(str(error), held, dict(mesh.shape), target)) from error
  seconds = {"lowering": lowered_at - started, "compiling": time.perf_counter() - lowered_at}
  return Built(rounds, traced.jaxpr, program, mesh, held, seconds)


# ---- resource use


def _held(tree: Tree) -> int:
  """Counts the bytes of a tree's elements on one device, without padding."""
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(size(x) for x in jax.tree.leaves(tree))


def _memory(found: Any, held: dict[str, int], target: Target) -> dict[str, Any]:
  """Returns the bytes of each kind of memory, and the unused fraction of the chip's memory."""
  kinds = {
    "arguments": found.argument_size_in_bytes,
    "outputs": found.output_size_in_bytes,
    "aliased": found.alias_size_in_bytes,
    "temporaries": found.temp_size_in_bytes,
    "code": found.generated_code_size_in_bytes,
  }
  used = sum(kinds.values()) - 2 * kinds["aliased"]
  left = 1 - used / target.chip.hbm
  return {**kinds, "used": used, "hbm": target.chip.hbm, "left": left, "of_arguments": held}


def too_large(text: str, held: dict[str, int], axes: dict[str, int], target: Target) -> str:
  """Formats the error for a program that does not fit, with the largest part and a remedy."""
  found = re.search(r"[Uu]sed ([\d.]+)([KMG]?) of|temporaries \(([\d.]+)([KMG]?)\)", text)
  unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
  needed = float(found[1] or found[3]) * unit[found[2] or found[4] or ""] if found else 0.0
  needed = max(needed, sum(held.values()))
  parts = {**held, "temporaries": needed - sum(held.values())}
  largest = max(parts, key=lambda name: parts[name])
  axis = "data" if largest == "examples" else "fsdp"
  size = axes.get(axis, 1) * 2 ** math.ceil(math.log2(max(needed / target.chip.hbm, 1.01)))
  also = ", and so does a smaller --batch_size" if largest == "temporaries" else ""
  shown = ",".join(f"{name}:{size}" for name, size in axes.items())
  amount = lambda value: f"{value / 2**30:.2f} GiB"
  return (
    f"--mesh='{shown}': does not fit: {amount(needed)} for each of the chips of {target.topology}, "
    f"{amount(needed - target.chip.hbm)} more than its {amount(target.chip.hbm)}; most of it "
    f"{largest} ({amount(parts[largest])}); a longer '{axis}' such as '{axis}:{size}' "
    f"leaves less on a chip{also}"
  )


def _work(problem: assemble.Problem, built: Built) -> dict[str, Any]:
  """Counts FLOPs and HBM bytes of a step on one device."""
  job, axes = problem.job, dict(built.mesh.shape)
  steps = job.method.local_steps * built.rounds
  return {
    "flops": {
      "run": flops.flops(built.jaxpr, axes) / steps,
      "needed": _needed(job, built.mesh),
    },
    "hbm": flops.carried(built.jaxpr, axes) / steps,
  }


def _needed(job: Job, mesh: Mesh) -> float:
  """Counts the FLOPs of a step's gradient on one device, without recomputation.

  The program is traced without a target chip. The model then uses operations that are counted
  exactly, unless the model requires a chip's own kernels.
  """
  inner = {name: size for name, size in mesh.shape.items() if name not in WORKER_AXES}
  types = (AxisType.Auto,) * len(inner)
  args, own = workers.of_loss(job), job.task.grads

  def count() -> float:
    if own:
      return flops.flops(jax.make_jaxpr(own)(*args), inner)
    loss = lambda *args: loss_and_metrics(job.task)(*args)[0]
    return flops.of_gradient(loss, *args, axes=inner)

  try:
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(inner.values()), tuple(inner), types)):
      return count()
  except ValueError:
    with jax.set_mesh(mesh):
      return count()


def _collectives(
  spans: list[schedule.Span] | None, steps: int, slices: int
) -> list[dict[str, Any]]:
  """Lists the collectives, with bytes and number per step; identical collectives are merged."""
  times: Counter[schedule.Span] = Counter()
  for span in spans or ():
    once = span.transfer._replace(times=1)
    times[span._replace(transfer=once)] += span.transfer.times
  return [
    {
      "operation": transfer.operation,
      "axis": "+".join(transfer.axes),
      "dtype": transfer.dtype,
      "payload_bytes": transfer.payload,
      "sent_bytes": transfer.sent,
      "times": count / steps,
      "crosses_slices": chips.crossing("+".join(transfer.axes), slices),
      "asynchronous": asynchronous,
      "products_meanwhile": products,
      "loops_meanwhile": loops,
    }
    for (transfer, asynchronous, products, loops), count in times.items()
  ]


def _roofline(
  work: dict[str, Any], transfers: list[wire.Transfer] | None, period: int, target: Target
) -> dict[str, Any]:
  """Computes the lower bound on the time of a step, and the parts of the bound."""
  within, across = None, None
  if transfers is not None:
    within, across = chips.split(wire.by_axis(transfers, period), target.slices)
  needs = chips.Work(work["flops"]["run"], work["hbm"], within, across)
  found = chips.roofline(target.chip, target.shape, needs)
  by, seconds = found.bound
  return {
    "ici_bytes": within,
    "dcn_bytes": across,
    "seconds": found._asdict(),
    "seconds_per_step": seconds,
    "bound_by": by,
    "left_out": found.unknown,
    "mfu": chips.utilization(target.chip, work["flops"]["needed"], seconds),
  }
