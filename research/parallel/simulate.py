"""Executor that simulates many workers by `vmap`: the worker axis is an array axis."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm import collectives
from research.comm import mesh as meshes
from research.core.base import Key, State, Tree
from research.core.method import Local
from research.core.task import Data, Executor, Metrics, TrainState
from research.parallel import diagnostics, inference, sharded, workers
from research.parallel import layout as layouts
from research.parallel.cohorts import draw
from research.parallel.job import Job, largest_sum, resolved
from research.parallel.local_phase import local_phase

# Model size in bytes above which local steps on a CPU run faster for one worker after the other
# (results/bench, case local_phase).
_ALONE = 2**20


def simulate(job: Job) -> Executor:
  """Runs any number of workers on any number of devices, by `vmap`.

  The worker axis is sharded over the largest number of devices that divides the number of workers.
  Axes inside a worker affect the result in one way only: leaves are aggregated block by block.

  The local phase never communicates, so `lax.map` may run this phase instead: each device then runs
  its workers one after the other. On a CPU, `lax.map` is faster if a round has several steps and
  the model is not small: under `vmap`, the matrix products are batched, and a worker's data is
  evicted from the cache between its steps.

  Args:
    job: the job.

  Raises:
    ValueError: if the population is not a multiple of the number of workers.
  """
  layout = inference.layout_of(job)
  job = workers.blocked(resolved(job))._replace(axes=meshes.worker_axes(job.axes))
  mesh = meshes.simulation_mesh(job.workers)
  shardings = sharded.of_state(layout.state, mesh, ("data",))
  init = sharded.jit(
    partial(workers.initial, job, layout),
    out_shardings=shardings,
    compiler_options=meshes.options_to_run_once(mesh),
  )
  everywhere = NamedSharding(mesh, P())
  run = sharded.jit(
    partial(_run, job, layout, partial(_local_phase, job, layout, mesh)),
    static_argnames="rounds",
    donate_argnames="state",
    out_shardings=(shardings, everywhere),
    compiler_options=meshes.options_for_sums(mesh, largest_sum(job)),
  )
  deployed = lambda state: workers.deployed(job, layout, state.method)
  params = sharded.jit(deployed, out_shardings=NamedSharding(mesh, P()))
  return Executor(init, partial(sharded.place, mesh, ("data",)), run, params, layout)


def is_mapped(job: Job, mesh: Mesh) -> bool:
  """Returns whether the local phase runs one worker after the other on the devices of a mesh.

  Args:
    job: the resolved job.
    mesh: the mesh.
  """
  if job.local_phase != "auto":
    return job.local_phase == "map"
  params = jax.tree.leaves(jax.eval_shape(job.task.init, jax.random.key(0)))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
  return meshes.runs_on_cpu(mesh) and job.method.local_steps > 1 and size >= _ALONE


def _local_phase(
  job: Job, layout: layouts.Layout, mesh: Mesh, measures: bool | None
) -> Callable[..., Any]:
  """Returns a function (key, states, rows) -> (Local, measurements) of all workers.

  The function runs by vmap or by map. `rows` are the per-worker arguments of `_work`. The rows, and
  the private leaves of states and Local, have a leading dimension [W].
  """
  work = partial(_work, job, measures)
  state_axes, local_axes = layouts.lead(layout.state), layouts.lead(layout.local)

  def at_once(key, states, rows):
    return jax.vmap(partial(work, key), (state_axes, 0), (local_axes, 0))(states, rows)

  def one_by_one(key, states, rows):
    at = lambda i, private, tree: jax.tree.map(lambda p, x: x[i] if p else x, private, tree)
    whole = jax.tree.map(lambda _: True, rows)
    count = jax.tree.leaves(rows)[0].shape[0]
    local, measured = lax.map(
      lambda i: work(key, at(i, layout.state, states), at(i, whole, rows)), jnp.arange(count)
    )
    return jax.tree.map(lambda p, x: x if p else x[0], layout.local, local), measured

  spread = lambda private: jax.tree.map(lambda p: P("data") if p else P(), private)
  return jax.shard_map(
    one_by_one if is_mapped(job, mesh) else at_once,
    mesh=mesh,
    in_specs=(P(), spread(layout.state), P("data")),
    out_specs=(spread(layout.local), P("data")),
    check_vma=False,
  )


def _work(
  job: Job, measures: bool | None, key: Key, state: State, rows: Tree
) -> tuple[Local, Metrics]:
  """Runs one worker's local phase."""
  examples, size, worker, index = rows
  own_key = collectives.key_of(key, worker)
  return local_phase(job, state, examples, size, index, own_key, measures=measures)


def _run(
  job: Job,
  layout: layouts.Layout,
  local_phase: Callable[..., Any],
  state: TrainState,
  data: Data,
  rounds: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  everyone = jnp.arange(job.workers, dtype=jnp.int32)
  numbers = state.round + jnp.arange(rounds, dtype=jnp.int32)
  of_worker = partial(draw, job, data, state.key, numbers)
  lots = jax.vmap(of_worker, out_axes=1)(everyone)  # [K, W, ...]
  one = partial(_round, job, layout, local_phase, data, state.key)
  if job.diagnostics:
    due = diagnostics.due(job, numbers)
    method, found = diagnostics.scan(one, state.method, (numbers, lots), due)
  else:
    method, found = lax.scan(one, state.method, (numbers, lots))
  measured, norms, written = found
  finite = jnp.all(written) if job.clients > 1 else workers.all_finite(method)
  of_steps = {
    name: jnp.mean(x if name == diagnostics.GRADIENT else x * lots.share[:, :, None], 1).reshape(-1)
    for name, x in measured.items()
  }
  metrics = workers.as_metrics(of_steps, norms, finite)
  return TrainState(state.round + rounds, state.key, method), metrics


def _round(job, layout, local_phase, data, key, state, of_round, measures=None):
  """Runs one round of all workers: the local phase, and then the sync under the named axes."""
  number, lots = of_round
  sync_key, step_key, _ = collectives.round_keys(key, number)
  everyone = jnp.arange(job.workers, dtype=jnp.int32)
  owners = lots.owner
  served = lambda rows: rows[owners] if job.clients > 1 else rows
  states = jax.tree.map(lambda p, x: served(x) if p else x, layout.state, state)

  state_axes, local_axes = layouts.lead(layout.state), layouts.lead(layout.local)
  rows = (jax.tree.map(served, data.examples), served(data.sizes), everyone, lots.index)
  local, measured = local_phase(measures)(step_key, states, rows)
  axes = meshes.worker_axes(job.axes)
  fold = lambda x: x.reshape(*axes.values(), *x.shape[1:])
  unfold = lambda x: x.reshape(job.workers, *x.shape[len(axes) :])
  in_axes = (local_axes, state_axes, 0, None, None)
  meet = layouts.over_workers(partial(workers.sync, job), axes, in_axes, state_axes)
  exchanged = (
    jax.tree.map(lambda p, x: fold(x) if p else x, layout.local, local),
    jax.tree.map(lambda p, x: fold(x) if p else x, layout.state, states),
    fold(lots.weight),
    sync_key,
    lots.anybody[0],
  )
  if measures:
    recorded = partial(diagnostics.recorded, job, workers.sync)
    after, norms = layouts.over_workers(recorded, axes, in_axes, (state_axes, 0))(*exchanged)
  else:
    after, norms = meet(*exchanged), {} if measures is None else diagnostics.nothing()

  def put(private, rows, new):
    if not private:
      return new
    return rows.at[owners].set(unfold(new)) if job.clients > 1 else unfold(new)

  written = workers.all_finite(after) if job.clients > 1 else jnp.bool_(True)
  return jax.tree.map(put, layout.state, state, after), (
    measured,
    jax.tree.map(jnp.mean, norms),
    written,
  )
