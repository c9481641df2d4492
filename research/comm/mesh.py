"""Parses mesh strings and builds device meshes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from research.core import blame, checks
from research.core.base import WORKER_AXES
from research.core.text import QUOTED, listed, one_line, whole_number

# Axes within a worker, slow links first. `stage` divides the layers into stages. The other axes
# divide arrays: `fsdp` shards the parameters and the batch, `expert` shards the experts of a
# mixture, `seq` shards the tokens of examples, and `model` shards each layer.
INNER_AXES = ("stage", "fsdp", "expert", "seq", "model")


def parse_mesh(spec: str) -> dict[str, int]:
  """Parses 'slice:2,data:4,fsdp:2' into {'slice': 2, 'data': 4, 'fsdp': 2}.

  Args:
    spec: the entries AXIS:SIZE, separated by commas, in any order.

  Returns:
    The axis sizes by name, slow links first; `data` has size 1 if the spec does not contain it.

  Raises:
    ValueError: if an axis is unknown or repeated, or a size is not a positive integer.
  """
  legal = (*WORKER_AXES, *INNER_AXES)
  sizes: dict[str, int] = {}
  for part in spec.split(","):
    name, colon, size = (piece.strip() for piece in part.partition(":"))
    places = whole_number(size)
    if not colon or not places:
      shown = one_line(part.strip(), QUOTED)
      raise ValueError(f"'{shown}' is not AXIS:SIZE with a positive integer size")
    if name not in legal:
      shown = one_line(name, QUOTED)
      raise ValueError(f"unknown axis '{shown}'{checks.hint(name, legal)} legal: {listed(legal)}")
    if name in sizes:
      raise ValueError(f"axis '{name}' is named twice")
    sizes[name] = places
  sizes.setdefault("data", 1)
  return {name: sizes[name] for name in legal if name in sizes}


def worker_axes(axes: Mapping[str, int]) -> dict[str, int]:
  """Returns the sizes of the worker axes of a mesh, by name.

  Args:
    axes: the axis sizes of the mesh, by name.
  """
  return {name: size for name, size in axes.items() if name in WORKER_AXES}


def count(axes: Mapping[str, int]) -> int:
  """Returns the number of devices of a mesh, the product of its axis sizes.

  Args:
    axes: the axis sizes of the mesh, by name.
  """
  return math.prod(axes.values())


def device_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Builds a mesh over the first devices; all axes have type Auto.

  Args:
    axes: the axis sizes by name, slow links first.
    devices: the devices to use; None means all devices.

  Raises:
    ValueError: if there are too few devices; or if there are several processes and more devices
      than the mesh needs, since each process must own a part of the mesh.
  """
  devices = jax.devices() if devices is None else devices
  wanted, spare = count(axes), len(devices) - count(axes)
  shown = ",".join(f"{name}:{size}" for name, size in axes.items())
  if spare < 0 or (spare > 0 and jax.process_count() > 1):
    hint = (
      f"simulate the workers on any number of devices with --executor=simulate, or set "
      f"JAX_NUM_CPU_DEVICES={wanted}"
      if jax.process_count() == 1
      else "all devices of all processes take part"
    )
    raise ValueError(
      f"'{shown}' needs {wanted} device{'s' * (wanted > 1)} and there "
      f"{'are' if len(devices) > 1 else 'is'} {len(devices)} ({devices[0].platform}); {hint}"
    )
  devices, types = devices[:wanted], (AxisType.Auto,) * len(axes)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    sizes = tuple(axes.values())
    with blame.of_libraries():
      places = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(places, tuple(axes), axis_types=types)
  outer = next(iter(axes))  # slow links come first
  if axes[outer] % slices:
    raise ValueError(f"'{shown}': '{outer}' does not divide among the {slices} slices")
  fast = [size // slices if name == outer else size for name, size in axes.items()]
  slow = [slices if name == outer else 1 for name in axes]
  split = {"allow_split_physical_axes": True}
  with blame.of_libraries():
    places = mesh_utils.create_hybrid_device_mesh(fast, slow, devices, **split)
  return Mesh(places, tuple(axes), axis_types=types)


def simulation_mesh(workers: int, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds a one-dimensional mesh 'data' for simulated workers.

  The size of the mesh is the largest number of devices that divides the number of workers.

  Args:
    workers: the number of simulated workers.
    devices: the devices to use; None means all devices.

  Raises:
    ValueError: if there are several processes, and a device would have no worker.
  """
  devices = jax.devices() if devices is None else devices
  size = max(n for n in range(1, len(devices) + 1) if workers % n == 0)
  if size < len(devices) and jax.process_count() > 1:
    raise ValueError(f"{workers} workers do not spread over all {len(devices)} devices of the job")
  return device_mesh({"data": size}, devices[:size])


def runs_on_cpu(mesh: Mesh) -> bool:
  """Returns whether all devices of a mesh are CPUs.

  The devices may exist only as compilation targets.

  Args:
    mesh: the mesh.
  """
  return mesh.devices.flat[0].platform == "cpu"


def like(device: Any) -> AbstractMesh:
  """Returns a mesh without axes, under which code is traced for the platform of a device.

  Args:
    device: a device of the target platform.
  """
  of_one = Mesh(np.array([device]), ("data",))
  return AbstractMesh((), (), abstract_device=of_one.abstract_mesh.abstract_device)


def options_for_sums(mesh: Mesh, elements: int) -> dict[str, str | bool] | None:
  """Returns compiler options with which CPUs sum an array over its leading axis faster.

  Before jaxlib 0.12, XLA:CPU calls a library for such a sum. The library takes 40 times as long as
  XLA's own loops (31 ms instead of 0.7 ms for [8, 1024, 1024]), but is not slower for small sums.
  With these options, XLA uses its own loops.

  Args:
    mesh: the mesh to compile for.
    elements: the number of elements of the array.

  Returns:
    The options, or None if none are needed.
  """
  if not runs_on_cpu(mesh) or jax.__version_info__ >= (0, 12) or elements < 2**17:
    return None
  return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def options_to_run_once(mesh: Mesh) -> dict[str, Any] | None:
  """Returns compiler options for a program that runs once, such as the initialization of a model.

  At its highest level, LLVM unrolls loops over short dimensions: the initialization of a layer with
  10 outputs takes 2 s to compile for a CPU. At level 1 it takes 0.5 s; the program is as fast, and
  its result is the same, bit for bit.

  Args:
    mesh: the mesh to compile for.

  Returns:
    The options, or None if none are needed.
  """
  if not runs_on_cpu(mesh) or jax.config.values["jax_disable_most_optimizations"]:
    return None
  return {"xla_backend_optimization_level": 1}
