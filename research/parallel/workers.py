"""Runs one worker's part of a round; all executors share this code."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.blockwise import blockwise
from research.comm import collectives
from research.comm import mesh as meshes
from research.core.base import EVERYONE, Array, Key, Presence, State, Trait, Tree
from research.core.method import Local
from research.core.task import Batch, Data, Metrics, TrainState
from research.optim import fitting
from research.parallel import diagnostics, sharded
from research.parallel import layout as layouts
from research.parallel.cohorts import draw
from research.parallel.diagnostics import GRADIENT
from research.parallel.job import Job, resolved, traits
from research.parallel.local_phase import local_phase


def blocked(job: Job) -> Job:
  """Returns the job with blockwise aggregation if its mesh shards leaves.

  The result needs no mesh: one device aggregates all blocks of a worker.

  Args:
    job: the job.
  """
  cut = sharded.cut_of(job.axes, job.task)
  if cut is None:
    return job
  job = resolved(job._replace(method=job.method.over(lambda inner: blockwise(inner, cut))))
  model = fitting.Model(job.task.dimensions, cut, simulated=True)
  return job._replace(method=fitting.method_for(job.method, model))


def pick(private: Tree, held: State, client: Array) -> State:
  """Selects the state of one client.

  Args:
    private: tree of bool, whether a leaf is private.
    held: a worker's state; private leaves are rows [R, ...] of its clients.
    client: int32, index of the client's row.
  """
  one = lambda rows: rows[0] if rows.shape[0] == 1 else rows[client]
  return jax.tree.map(lambda p, leaf: one(leaf) if p else leaf, private, held)


def put(private: Tree, held: State, client: Array, state: State) -> State:
  """Writes one client's state back: replaces the client's rows and the shared leaves.

  Args:
    private: tree of bool, whether a leaf is private.
    held: a worker's state; private leaves are rows [R, ...] of its clients.
    client: int32, index of the client's row.
    state: the client's new state.
  """
  set_row = lambda rows, row: row[None] if rows.shape[0] == 1 else rows.at[client].set(row)
  merge = lambda p, old, new: set_row(old, new) if p else new
  return jax.tree.map(merge, private, held, state)


def sync(
  job: Job, local: Local, state: State, weight: Array, key: Key, anybody: Array | bool = True
) -> State:
  """Runs the part of a round that communicates, with the worker axes in scope.

  A round without participants leaves all state unchanged, round counters included. Methods that add
  noise run such a round anyway, so that the result does not reveal whether anyone participated.

  Args:
    job: the resolved job.
    local: the worker's Local after the round's last step.
    state: the state at the start of the round.
    weight: this worker's weight; 0 if the worker does not participate.
    key: a typed key of the round, equal on all workers.
    anybody: whether any worker participates.
  """
  if not job.misses:
    presence = EVERYONE if job.even else Presence(weight)
    return job.method.sync(local, state, key=key, presence=presence)
  after = job.method.sync(local, state, key=key, presence=Presence(weight, weight > 0))
  if Trait.NOISE in traits(job.method):
    return after
  return jax.tree.map(lambda new, old: jnp.where(anybody, new, old), after, state)


def rounds_of_worker(
  job: Job,
  private: Tree,
  state: TrainState,
  data: Data,
  rounds: int,
  inside: sharded.Inside = sharded.ALONE,
) -> tuple[TrainState, dict[str, Array]]:
  """Runs K rounds as one worker of `shard_map` or `pmap`.

  The worker's private leaves and examples are rows [R, ...]. The metrics are reduced once, at the
  end.

  Args:
    job: the resolved job.
    private: tree of bool, whether a leaf of the state is private.
    state: the worker's state, whose private leaves are rows [R, ...].
    data: the worker's examples, rows [R, ...].
    rounds: K, the number of rounds.
    inside: sharding constraints inside the worker.

  Returns:
    The new state, and the metrics in the form of `as_metrics`.
  """
  worker = collectives.worker_index()
  numbers = state.round + jnp.arange(rounds, dtype=jnp.int32)
  lots = draw(job, data, state.key, numbers, worker)

  def one(held, of_round, measures=None):
    number, lot = of_round
    sync_key, step_key, _ = collectives.round_keys(state.key, number)
    client = lot.owner - job.clients * worker
    examples = jax.tree.map(lambda x: pick(True, x, client), data.examples)
    size = data.sizes[lot.owner]
    local, measured = local_phase(
      job,
      pick(private, held, client),
      examples,
      size,
      lot.index,
      collectives.worker_key(step_key),
      inside,
      measures,
    )
    exchanged = local, pick(private, held, client), lot.weight, sync_key, lot.anybody
    if measures:
      after, norms = diagnostics.recorded(job, sync, *exchanged)
    else:
      after, norms = sync(job, *exchanged), {} if measures is None else diagnostics.nothing()
    written = all_finite(after) if job.clients > 1 else jnp.bool_(True)
    return put(private, held, client, after), (measured, norms, written)

  if job.diagnostics:
    due = diagnostics.due(job, numbers)
    held, found = diagnostics.scan(one, state.method, (numbers, lots), due)
  else:
    held, found = lax.scan(one, state.method, (numbers, lots))
  measured, norms, written = found
  finite = jnp.all(written) if job.clients > 1 else all_finite(held)
  metrics = reduce_metrics(shared_out(measured, lots.share), finite, norms)
  return TrainState(state.round + rounds, state.key, held), metrics


def shared_out(measured: Metrics, share: Array) -> Metrics:
  """Weights measurements [K, H, ...] by this worker's share [K, ...]; flattens to [K H, ...].

  The norm of the gradient is not a mean over examples and is therefore not weighted.

  Args:
    measured: the measurements [K, H, ...], by name.
    share: this worker's share of each round's examples, [K, ...].
  """

  def one(name: str, x: Array) -> Array:
    x = x if name == GRADIENT else x * share[:, None]
    return x.reshape(-1, *x.shape[2:])

  return {name: one(name, x) for name, x in measured.items()}


def all_finite(tree: Tree) -> Array:
  """Returns whether every floating-point element of a tree is finite.

  Args:
    tree: arrays.
  """
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def initial(job: Job, layout: layouts.Layout, key: Key) -> TrainState:
  """Initializes the state of round zero; private leaves have a row per client [P, ...].

  Args:
    job: the job.
    layout: which state of the job is private.
    key: a typed key.
  """
  job = blocked(resolved(job))
  params_key, run_key = jax.random.split(key)
  axes = meshes.worker_axes(job.axes)
  init = layouts.over_workers(job.method.init, axes, None, layouts.lead(layout.state))

  def rows(private, leaf):
    if not private:
      return leaf
    shape = leaf.shape[len(axes) :]
    leaf = leaf.reshape(job.workers, 1, *shape)
    return jnp.broadcast_to(leaf, (job.workers, job.clients, *shape)).reshape(-1, *shape)

  state = jax.tree.map(rows, layout.state, init(job.task.init(params_key)))
  return TrainState(jnp.zeros((), jnp.int32), run_key, state)


def deployed(job: Job, layout: layouts.Layout, state: State) -> Tree:
  """Returns the model to deploy: the mean of the clients' models if these models differ.

  Args:
    job: the resolved job.
    layout: which state of the job is private.
    state: the state, whose private leaves are rows [P, ...].
  """
  owners = {"owner": len(job.sizes)}
  in_axes = (layouts.lead(layout.state),)
  private = layouts.private_outputs(job.method.params, owners, in_axes, state)
  models = layouts.over_workers(job.method.params, owners, in_axes, layouts.lead(private))(state)
  return jax.tree.map(lambda p, x: jnp.mean(x, 0) if p else x, private, models)


def of_loss(job: Job) -> tuple[Tree, Batch, Key]:
  """Returns the shapes of the arguments of a worker's loss: parameters, a mini-batch, a key.

  Args:
    job: the resolved job.
  """
  key, most = jax.eval_shape(lambda: jax.random.key(0)), int(job.sizes.max())
  struct = lambda x: jax.ShapeDtypeStruct((most, *x.shape[1:]), x.dtype)
  batch = jax.tree.map(struct, job.task.train)
  if job.batch_size is not None:
    sample = lambda key: job.task.sample(most, jnp.int32(0), key, batch_size=job.batch_size)
    fetch = lambda examples, key: job.task.batch(examples, sample(key))
    batch = jax.eval_shape(fetch, batch, key)
  return jax.eval_shape(job.task.init, key), batch, key


def reduce_metrics(measured: Metrics, finite: Array, norms: Metrics | None = None) -> Metrics:
  """Averages measurements over the workers.

  Args:
    measured: measurements by name.
    finite: whether all state of this worker is finite.
    norms: diagnostics by name.

  Returns:
    The metrics in the form of `as_metrics`; "finite" is true if the state of all workers is finite.
  """
  alone = measured, norms or {}, finite.astype(jnp.float32)
  found, means, share = collectives.mean(alone)
  return as_metrics(found, means, share == 1)


def as_metrics(measured: Metrics, norms: Metrics, finite: Array) -> dict[str, Any]:
  """Returns the metrics of a dispatch of K rounds of H steps, in the form of an `Executor`.

  Args:
    measured: the measurements [K H] of the steps, by name.
    norms: the diagnostics [K], by name.
    finite: whether all state is finite.

  Returns:
    The entries "loss" [K H] and "finite"; if the task has its own metrics, also "auxiliary", arrays
    [K H] by name; with diagnostics, also "norms", an array [K] for each of `diagnostics.NAMES` and
    an array [K H] for the gradient.
  """
  own = {name: x for name, x in measured.items() if name not in ("loss", GRADIENT)}
  if GRADIENT in measured:
    norms = norms | {GRADIENT: measured[GRADIENT]}
  found = {"loss": measured["loss"], "finite": finite}
  return found | ({"auxiliary": own} if own else {}) | ({"norms": norms} if norms else {})
