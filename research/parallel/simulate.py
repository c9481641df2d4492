"""Many workers on the devices that exist: the worker axis is an axis of the arrays."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.base import Data, Executor, TrainState
from research.comm import collectives
from research.comm import mesh as meshes
from research.parallel import layout as layouts
from research.parallel import sharded, workers


def simulate(job: workers.Job) -> Executor:
  """Runs any number of workers on any number of devices, by `vmap`.

  The worker axis is sharded over as many devices as hold equal numbers of workers. Axes inside a
  worker change the mathematics only in that its leaves are aggregated block by block.

  Raises:
    ValueError: if the population is not a multiple of the workers.
  """
  layout = workers.infer_layout(job)
  job = workers.blocked(job)._replace(axes=meshes.worker_axes(job.axes))
  mesh = meshes.simulation_mesh(job.workers)
  shardings = sharded.of_state(layout.state, mesh, ("data",))
  init = jax.jit(partial(workers.initial, job, layout), out_shardings=shardings)
  everywhere = NamedSharding(mesh, P())
  run = jax.jit(
    partial(_run, job, layout),
    static_argnames="rounds",
    donate_argnames="state",
    out_shardings=(shardings, everywhere),
    compiler_options=meshes.options_for_sums(_largest(job)),
  )
  deployed = lambda state: workers.deployed(job, layout, state.method)
  params = jax.jit(deployed, out_shardings=NamedSharding(mesh, P()))
  return Executor(init, partial(sharded.place, mesh, ("data",)), run, params)


def _largest(job: workers.Job) -> int:
  """Elements of the largest sum over workers."""
  params = jax.eval_shape(job.task.init, jax.random.key(0))
  return job.workers * max(leaf.size for leaf in jax.tree.leaves(params))


def _run(
  job: workers.Job, layout: layouts.Layout, state: TrainState, data: Data, rounds: int
) -> tuple[TrainState, dict[str, jax.Array]]:
  everyone = jnp.arange(job.workers, dtype=jnp.int32)
  numbers = state.round + jnp.arange(rounds, dtype=jnp.int32)
  draw = partial(workers.draw, job, data, state.key, numbers)
  lots = jax.vmap(draw, out_axes=1)(everyone)  # [K, W, ...]
  one = partial(_round, job, layout, data, state.key)
  method, losses = lax.scan(one, state.method, (numbers, lots))
  weight = jnp.where(jnp.any(lots.weight > 0, 1, keepdims=True), lots.weight, 1)  # or all drawn
  share = weight / jnp.sum(weight, 1, keepdims=True)
  loss = jnp.sum(losses * share[:, :, None], 1).reshape(-1)
  metrics = {"loss": loss, "finite": workers.all_finite(method)}
  return TrainState(state.round + rounds, state.key, method), metrics


def _round(job, layout, data, key, state, of_round):
  """One round of all workers: the local phase under a plain vmap, the sync under the named axes."""
  number, lots = of_round
  sync_key, step_key, _ = collectives.round_keys(key, number)
  everyone = jnp.arange(job.workers, dtype=jnp.int32)
  owners = lots.owner
  served = lambda rows: rows[owners] if job.clients > 1 else rows
  states = jax.tree.map(lambda p, x: served(x) if p else x, layout.state, state)

  def work(state, examples, size, worker, index):
    own_key = collectives.key_of(step_key, worker)
    return workers.local_phase(job, state, examples, size, index, own_key)

  state_axes, local_axes = layouts.lead(layout.state), layouts.lead(layout.local)
  examples = jax.tree.map(served, data.examples)
  local, losses = jax.vmap(work, (state_axes, 0, 0, 0, 0), (local_axes, 0))(
    states, examples, served(data.sizes), everyone, lots.index
  )
  axes = meshes.worker_axes(job.axes)
  fold = lambda x: x.reshape(*axes.values(), *x.shape[1:])
  unfold = lambda x: x.reshape(job.workers, *x.shape[len(axes) :])
  meet = layouts.over_workers(
    partial(workers.sync, job), axes, (local_axes, state_axes, 0, None), state_axes
  )
  after = meet(
    jax.tree.map(lambda p, x: fold(x) if p else x, layout.local, local),
    jax.tree.map(lambda p, x: fold(x) if p else x, layout.state, states),
    fold(lots.weight),
    sync_key,
  )

  def put(private, rows, new):
    if not private:
      return new
    return rows.at[owners].set(unfold(new)) if job.clients > 1 else unfold(new)

  return jax.tree.map(put, layout.state, state, after), losses
