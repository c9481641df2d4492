"""Pairs each computing device of the workers with a communication device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.comm import mesh as meshes
from research.core.base import Tree
from research.parallel.job import Job


def two_meshes(job: Job) -> tuple[Mesh, Mesh]:
  """Returns the meshes of the computing devices and of their communication devices.

  Args:
    job: the job.

  Raises:
    ValueError: if a process has fewer communication devices than computing devices.
  """
  computing, beside = [], {}
  on_cpu, processes = jax.default_backend() == "cpu", jax.process_count()
  for process in range(processes):
    own = [d for d in jax.devices() if d.process_index == process]
    first = own[: len(own) // 2] if on_cpu else own
    second = own[len(first) :] if on_cpu else _of_hosts(process)
    computing += first
    beside |= dict(zip(first, second, strict=False))
  wanted, there = meshes.count(job.axes), len(computing)
  if wanted > there or (processes > 1 and wanted != there) or len(beside) < there:
    shown = ",".join(f"{name}:{size}" for name, size in job.axes.items())
    needed = -(-wanted // processes) * (2 if on_cpu else 1)
    raise ValueError(
      f"'{shown}' needs {wanted} devices that compute and {wanted} CPU devices that communicate, "
      f"and there are {there} and {len(beside)}; set JAX_NUM_CPU_DEVICES={needed} for each process"
    )
  mesh = meshes.device_mesh(job.axes, computing[:wanted])
  pairs = np.vectorize(beside.__getitem__, otypes=[object])(mesh.devices)
  return mesh, Mesh(pairs, mesh.axis_names, axis_types=mesh.axis_types)


def _of_hosts(process: int) -> list[Any]:
  """Returns the CPU devices of a process whose default devices are accelerators."""
  return [d for d in jax.devices("cpu") if d.process_index == process]


def moved(tree: Tree, shardings: Tree) -> Tree:
  """Copies arrays between the computing and the communication devices.

  Each process moves its own shards, so no process waits for another process.

  Args:
    tree: arrays on one mesh.
    shardings: for each array, the same partition on the other mesh.
  """
  leaves, treedef = jax.tree.flatten(tree)
  places = treedef.flatten_up_to(shardings)
  shards, devices, counts = [], [], []
  for leaf, place in zip(leaves, places, strict=True):
    targets = place.addressable_devices_indices_map(leaf.shape)
    by_index = dict(zip(leaf.sharding.mesh.devices.flat, place.mesh.devices.flat, strict=True))
    own = {by_index[shard.device]: shard.data for shard in leaf.addressable_shards}
    shards += [own[device] for device in targets]
    devices += list(targets)
    counts.append(len(targets))
  copies = iter(jax.device_put(shards, devices))
  make = jax.make_array_from_single_device_arrays
  found = [
    make(leaf.shape, place, [next(copies) for _ in range(count)])
    for leaf, place, count in zip(leaves, places, counts, strict=True)
  ]
  return treedef.unflatten(found)
