"""One worker per place on the worker axes, by `shard_map`; other axes are the compiler's."""

from functools import partial

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.base import Executor
from research.comm import mesh as meshes
from research.parallel import layout as layouts
from research.parallel import sharded, workers
from research.parallel.job import Job, resolved


def spmd(job: Job) -> Executor:
  """Runs each worker on its own devices, in one process or in several.

  Along `fsdp` the compiler cuts the parameters, the state and the batch inside a worker, and each
  device aggregates the shard that it holds.
  `check_vma` is off, so that a gradient is this worker's own and not already the sum over all.

  Raises:
    ValueError: if the mesh does not fit the devices, the population not the workers, or the method
      exchanges what a mesh that cuts parameters inside a worker does not allow.
  """
  mesh = meshes.device_mesh(job.axes, job.devices)
  job, layout = resolved(job), workers.infer_layout(job)
  names = tuple(meshes.worker_axes(job.axes))
  initial = partial(workers.initial, job, layout)
  cut = sharded.cut_of(job.axes, job.task)
  if cut and job.method.over:
    job = job._replace(method=job.method.over(lambda inner: sharded.per_shard(inner, cut)))
    job = resolved(job)
  elif cut:
    _only_sums(job, layout)
  rows = P(names)
  shardings = sharded.of_state(layout.state, mesh, names, layout.state_shapes, cut)
  specs = sharded.of_state(layout.state, None, names)
  init = jax.jit(initial, out_shardings=shardings)
  constrain = partial(sharded.split_batch, job.axes)

  def run(state, data, rounds):
    per_worker = lambda s, d: workers.rounds_of_worker(job, layout.state, s, d, rounds, constrain)
    return jax.shard_map(
      per_worker,
      mesh=mesh,
      in_specs=(specs, sharded.of_data(rows)),
      out_specs=(specs, P()),
      axis_names=set(names),
      check_vma=False,
    )(state, data)

  run = jax.jit(
    run,
    static_argnames="rounds",
    donate_argnames="state",
    out_shardings=(shardings, NamedSharding(mesh, P())),
  )
  deployed = lambda state: workers.deployed(job, layout, state.method)
  params = jax.jit(deployed, out_shardings=NamedSharding(mesh, P()))
  return Executor(init, partial(sharded.place, mesh, names), run, params)


def _only_sums(job: Job, layout: layouts.Layout) -> None:
  """Encoders of leaves that the compiler has cut would need an exchange inside each worker."""
  found = workers.traffic(job, layout, 1).transfers
  others = {t.operation for t in found} - {"all-reduce"}
  inner = ", ".join(name for name in job.axes if name not in meshes.worker_axes(job.axes))
  if others:
    raise ValueError(
      f"inside a worker only what is summed may be cut, and this method sends by "
      f"{' and '.join(sorted(others))}; leave out {inner}"
    )
