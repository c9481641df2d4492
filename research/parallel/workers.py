"""One worker's part of a round, shared by all executors."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.blockwise import blockwise
from research.aggregate.mean import mean
from research.analysis import wire
from research.comm import collectives
from research.comm import mesh as meshes
from research.core.base import EVERYONE, Array, Key, Presence, State, Trait, Tree
from research.core.method import Local
from research.core.task import Batch, Data, Metrics, TrainState, loss_and_metrics
from research.parallel import diagnostics, sharded
from research.parallel import layout as layouts
from research.parallel.cohorts import draw
from research.parallel.diagnostics import GRADIENT
from research.parallel.job import Job, resolved, traits
from research.parallel.local_phase import local_phase


def blocked(job: Job) -> Job:
  """Returns the job for one device per worker; aggregation is blockwise if leaves are sharded.

  Args:
    job: the job.
  """
  cut = sharded.cut_of(job.axes, job.task)
  if cut is None:
    return job
  return resolved(job._replace(method=job.method.over(lambda inner: blockwise(inner, cut))))


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
  """Writes one client's state back: replaces its rows and the shared leaves.

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
    weight: this worker's weight; 0: it does not participate.
    key: a typed key of the round, equal on all workers.
    anybody: whether any worker participates.
  """
  if not job.sampling_rate and not job.dropout:
    presence = EVERYONE if job.even else Presence(weight)
    return job.method.sync(local, state, key=key, presence=presence)
  after = job.method.sync(local, state, key=key, presence=Presence(weight, weight > 0))
  if Trait.NOISE in traits(job.method):
    return after
  return jax.tree.map(lambda new, old: jnp.where(anybody, new, old), after, state)


def infer_layout(job: Job) -> layouts.Layout:
  """Infers which state of the job is private, by tracing one of its rounds.

  Args:
    job: the job.

  Raises:
    ValueError: if the population is not a multiple of the workers; if workers serve several clients
      or drop out and the method keeps a worker's chunk or sends to neighbours; if participation is
      partial and the method needs everyone's earlier messages; or if clients are sampled at a rate
      and the method keeps per-client state.
  """
  job = blocked(resolved(job))
  if len(job.sizes) % job.workers:
    raise ValueError(
      f"a population of {len(job.sizes)} clients is not a multiple of the cohort, "
      f"{job.workers} workers"
    )
  key = jax.eval_shape(lambda: jax.random.key(0))
  most = int(job.sizes.max())
  struct = lambda x: jax.ShapeDtypeStruct((most, *x.shape[1:]), x.dtype)
  size, index = jax.ShapeDtypeStruct((), jnp.int32), None
  if job.batch_size is not None:
    sample = lambda s, k: job.task.sample(s, jnp.int32(0), k, batch_size=job.batch_size)
    spread = lambda x: jax.ShapeDtypeStruct((job.method.local_steps, *x.shape), x.dtype)
    index = jax.tree.map(spread, jax.eval_shape(sample, size, key))
  layout = layouts.infer(
    job.method.init,
    lambda state, *args: local_phase(job, state, *args),
    lambda local, state, weight: sync(job, local, state, weight, jax.random.key(0)),
    meshes.worker_axes(job.axes),
    jax.eval_shape(job.task.init, key),
    (jax.tree.map(struct, job.task.train), size, index, key),
  )
  kinds = jax.tree.leaves(layouts.kinds(layout.state))
  if job.clients > 1 and any(kind.startswith("chunks") for kind in kinds):
    raise ValueError("two_phase stores a memory per worker, but a population stores it per client")
  if job.clients > 1 and _has_neighbours(job, layout):
    raise ValueError("neighbours are workers, but a population stores state per client")
  is_partial = job.clients > 1 or job.dropout or job.sampling_rate
  if is_partial and Trait.EVERYONE in traits(job.method):
    raise ValueError(
      "ef21 and diana accumulate every worker's messages, which is incompatible with dropout and "
      "with a population; use error_feedback"
    )
  if job.sampling_rate and any(jax.tree.leaves(layout.state)):
    raise ValueError("the method stores state per client, which --sampling_rate does not support")
  return layout


def _has_neighbours(job: Job, layout: layouts.Layout) -> bool:
  return any(t.operation == "permute" for t in traffic(job, layout, 1).transfers)


def rounds_of_worker(
  job: Job,
  private: Tree,
  state: TrainState,
  data: Data,
  rounds: int,
  inside: sharded.Inside = sharded.ALONE,
) -> tuple[TrainState, dict[str, Array]]:
  """Runs K rounds as one worker of `shard_map` or `pmap`.

  Its private leaves and its examples are rows [R, ...]. The metrics are reduced once, at the end.

  Args:
    job: the resolved job.
    private: tree of bool, whether a leaf of the state is private.
    state: the worker's state, whose private leaves are rows [R, ...].
    data: its examples, rows [R, ...].
    rounds: K.
    inside: sharding constraints inside the worker.

  Returns:
    The new state, and the metrics of `as_metrics`.
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
    measured: measurements by name, [K, H, ...].
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
    layout: which of its state is private.
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
  """Returns the model to deploy: the mean of the clients' models where they differ.

  Args:
    job: the resolved job.
    layout: which of its state is private.
    state: the state, whose private leaves are rows [P, ...].
  """
  owners = {"owner": len(job.sizes)}
  in_axes = (layouts.lead(layout.state),)
  private = layouts.private_outputs(job.method.params, owners, in_axes, state)
  models = layouts.over_workers(job.method.params, owners, in_axes, layouts.lead(private))(state)
  return jax.tree.map(lambda p, x: jnp.mean(x, 0) if p else x, private, models)


def traffic(job: Job, layout: layouts.Layout, rounds: int) -> wire.Traffic:
  """Returns the traffic of one worker's algorithm in the first rounds; meant for few rounds.

  Args:
    job: the resolved job.
    layout: which of its state is private.
    rounds: the number of rounds.
  """
  found = sending(job, layout).between(0, rounds)
  return found._replace(transfers=wire.happened(found.transfers))


def sending(job: Job, layout: layouts.Layout) -> wire.RoundTraffic:
  """Returns the traffic of one worker's algorithm in any range of rounds, from the traced sync.

  For a worker of several devices, the traffic is that of all of them together.

  Args:
    job: the resolved job.
    layout: which of its state is private.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  weight = jax.ShapeDtypeStruct((), jnp.float32)
  round_ = lambda state, local, weight, key: sync(blocked(job), local, state, weight, key)
  args = (layout.state_shapes, layout.local_shapes, weight, key)
  axes = meshes.worker_axes(job.axes)
  params = jax.eval_shape(job.task.init, key)
  init = layouts.over_workers(blocked(job).method.init, axes, None, layouts.lead(layout.state))
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
  copies = sharded.replicas(job.axes)
  return wire.RoundTraffic(round_, *args, axes=axes, first=lambda: init(zeros()), copies=copies)


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


def dense_traffic(job: Job) -> list[wire.Transfer]:
  """Returns the traffic of an exact mean of one gradient, the baseline for every method.

  Args:
    job: the resolved job.
  """
  params = jax.eval_shape(job.task.init, jax.random.key(0))
  cut = sharded.cut_of(job.axes, job.task)
  exact = blockwise(mean(), cut) if cut else mean()
  average = lambda grads: exact.aggregate(grads, exact.init(grads), jax.random.key(0)).value
  found = wire.traffic(average, params, axes=meshes.worker_axes(job.axes))
  return wire.copied(found, sharded.replicas(job.axes))


def metrics_traffic(job: Job, rounds: int) -> list[wire.Transfer]:
  """Returns the traffic of the metrics of a dispatch of K rounds, without diagnostics.

  Args:
    job: the resolved job.
    rounds: K.
  """
  params, batch, key = of_loss(job)
  own = jax.eval_shape(loss_and_metrics(job.task), params, batch, key)[1]
  steps = jax.ShapeDtypeStruct((rounds * job.method.local_steps,), jnp.float32)
  finite = jax.ShapeDtypeStruct((), jnp.bool_)
  measured = dict.fromkeys([*own, "loss"], steps)
  return wire.traffic(reduce_metrics, measured, finite, axes=meshes.worker_axes(job.axes))


def reduce_metrics(measured: Metrics, finite: Array, norms: Metrics | None = None) -> Metrics:
  """Averages measurements over the workers.

  Args:
    measured: measurements by name.
    finite: whether all state of this worker is finite.
    norms: diagnostics by name.

  Returns:
    The metrics of `as_metrics`; "finite" is true if the state of all workers is finite.
  """
  alone = measured, norms or {}, finite.astype(jnp.float32)
  found, means, share = collectives.mean(alone)
  return as_metrics(found, means, share == 1)


def as_metrics(measured: Metrics, norms: Metrics, finite: Array) -> dict[str, Any]:
  """Returns the metrics of a dispatch of K rounds of H steps, in the form of an `Executor`.

  Args:
    measured: measurements of the steps by name, [K H].
    norms: diagnostics by name, [K].
    finite: whether all state is finite.

  Returns:
    "loss" [K H] and "finite"; the task's own metrics, if any, as "auxiliary", [K H] by name; with
    diagnostics "norms", [K] by `diagnostics.NAMES` and [K H] of the gradient.
  """
  own = {name: x for name, x in measured.items() if name not in ("loss", GRADIENT)}
  if GRADIENT in measured:
    norms = norms | {GRADIENT: measured[GRADIENT]}
  found = {"loss": measured["loss"], "finite": finite}
  return found | ({"auxiliary": own} if own else {}) | ({"norms": norms} if norms else {})
