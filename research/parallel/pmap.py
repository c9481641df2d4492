"""Executor on `jax.pmap`, for code bases that still use it."""

import functools
from functools import partial

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm import mesh as meshes
from research.core.task import Data, Executor, TrainState
from research.parallel import inference, sharded, workers
from research.parallel import layout as layouts
from research.parallel.job import Job, resolved


def pmap(job: Job) -> Executor:
  """Runs one worker per device of this process. Prefer `spmd`, which uses `shard_map`.

  The state is not donated: `pmap` cannot donate leaves that are not mapped.

  Args:
    job: the job.

  Raises:
    ValueError: if the mesh has an axis other than `data` or does not fit the devices.
  """
  if set(job.axes) != {"data"}:
    raise ValueError("pmap has one axis, 'data'; use --executor=spmd")
  if job.clients > 1 or jax.process_count() > 1:
    raise ValueError("pmap serves all owners in each round, in one process; use --executor=spmd")
  mesh = meshes.device_mesh(job.axes)
  job, layout = resolved(job), inference.layout_of(job)
  shardings = sharded.of_state(layout.state, mesh, ("data",))
  init = sharded.jit(
    partial(workers.initial, job, layout),
    out_shardings=shardings,
    compiler_options=meshes.options_to_run_once(mesh),
  )
  state_axes = TrainState(None, None, layouts.lead(layout.state))
  lead = lambda state: state._replace(
    method=jax.tree.map(lambda p, x: x[None] if p else x, layout.state, state.method)
  )
  first = lambda state: state._replace(
    method=jax.tree.map(lambda p, x: x[0] if p else x, layout.state, state.method)
  )

  def per_worker(rounds, state, data):
    data = data._replace(examples=jax.tree.map(lambda x: x[None], data.examples))
    state, metrics = workers.rounds_of_worker(job, layout.state, lead(state), data, rounds)
    return first(state), metrics

  @functools.cache
  def mapped(rounds):
    return jax.pmap(
      partial(per_worker, rounds),
      "data",
      in_axes=(state_axes, Data(0, None, None)),
      out_axes=(state_axes, None),
      devices=mesh.devices.flatten().tolist(),
    )

  run = lambda state, data, rounds: mapped(rounds)(state, data)
  deployed = lambda state: workers.deployed(job, layout, state.method)
  params = sharded.jit(deployed, out_shardings=NamedSharding(mesh, P()))
  return Executor(init, partial(sharded.place, mesh, ("data",)), run, params, layout)
