"""The same workers under `jax.pmap`, for code bases that still live there."""

from functools import partial

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.base import Data, Executor, TrainState
from research.comm import mesh as meshes
from research.parallel import layout as layouts
from research.parallel import sharded, workers


def pmap(job: workers.Job) -> Executor:
  """Runs one worker per device of this process; `shard_map` (`spmd`) replaces it.

  Raises:
    ValueError: if the mesh has another axis than `data` or does not fit the devices.
  """
  if set(job.axes) != {"data"}:
    raise ValueError(f"pmap has one axis, 'data:{job.workers}'; use --executor=spmd for {job.axes}")
  mesh = meshes.device_mesh(job.axes)
  layout = workers.infer_layout(job)
  shardings = sharded.of_state(layout.state, mesh, ("data",))
  init = jax.jit(partial(workers.initial, job, layout), out_shardings=shardings)
  state_axes = TrainState(None, None, layouts.lead(layout.state))
  by_worker = lambda x: x.reshape(job.workers, -1, *x.shape[1:])
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  each = lambda fn, state: state._replace(
    method=jax.tree.map(lambda p, x: fn(x) if p else x, layout.state, state.method)
  )

  def per_worker(rounds, state, data):
    return workers.rounds_of_worker(job, layout.state, state, data, rounds)

  mapped = {}

  def run(state, data, rounds):
    if rounds not in mapped:
      mapped[rounds] = jax.pmap(
        partial(per_worker, rounds),
        "data",
        in_axes=(state_axes, Data(0, None, None)),
        out_axes=(state_axes, None),
        devices=mesh.devices.flatten().tolist(),
      )
    rows = data._replace(examples=jax.tree.map(by_worker, data.examples))
    state, metrics = mapped[rounds](each(by_worker, state), rows)
    return each(flat, state), metrics

  deployed = lambda state: workers.deployed(job, layout, state.method)
  params = jax.jit(deployed, out_shardings=NamedSharding(mesh, P()))
  return Executor(init, partial(sharded.place, mesh, ("data",)), run, params)
