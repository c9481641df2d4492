"""Executor on `shard_map` over the worker axes; the compiler partitions along the other axes."""

from functools import partial

import jax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.analysis.rounds import programs
from research.comm import mesh as meshes
from research.core import blame
from research.core.base import Aggregator, Tree
from research.core.task import Executor
from research.optim import fitting
from research.parallel import inference, pipelined, sharded, traffic, workers
from research.parallel import layout as layouts
from research.parallel.job import Job, largest_sum, resolved


def spmd(job: Job) -> Executor:
  """Runs each worker on its own devices, in one process or in several.

  Along the other axes the compiler shards a worker's parameters, state and batch, and each device
  aggregates its own shard. `check_vma` is off, so that each worker gets its own gradient, not the
  sum over all workers.

  Args:
    job: the job.

  Raises:
    ValueError: if the mesh does not fit the devices, the model or the batch, the population is not
      a multiple of the number of workers, or the method's exchange does not support sharding inside
      a worker.
  """
  mesh = meshes.device_mesh(job.axes, job.devices)
  job, layout = resolved(job), inference.layout_of(job)
  names = tuple(meshes.worker_axes(job.axes))
  initial = partial(workers.initial, job, layout)
  cut = sharded.cut_of(job.axes, job.task)
  _check_inside(job, mesh, names)
  if cut and next(job.method.parts(Aggregator), None) is None:
    _only_sums(job, layout)
  elif cut:
    job = job._replace(method=job.method.over(lambda inner: sharded.PerShard(inner, cut)))
    job = resolved(job)
  if cut:
    model = fitting.Model(job.task.dimensions, cut)
    job = job._replace(method=fitting.method_for(job.method, model))
  rows = P(names)
  whole = _models(job, layout) if job.zero < 3 else None
  shardings = sharded.of_state(layout.state, mesh, names, layout.state_shapes, cut, whole)
  specs = sharded.of_state(layout.state, None, names)
  once = meshes.options_to_run_once(mesh)
  init = sharded.jit(initial, out_shardings=shardings, compiler_options=once)
  inside = sharded.inside(job.axes, cut, job.zero)

  early = pipelined.overlaps(job, layout, mesh)

  def run(state, data, rounds, first=0):
    def per_worker(state, data):
      args = job, layout.state, state, data, rounds, inside
      if early:
        return pipelined.rounds_of_worker(*args, first)
      return workers.rounds_of_worker(*args)

    return jax.shard_map(
      per_worker,
      mesh=mesh,
      in_specs=(specs, sharded.of_data(rows)),
      out_specs=(specs, P()),
      axis_names=set(names),
      check_vma=False,
    )(state, data)

  run = sharded.jit(
    run,
    static_argnames=("rounds", "first"),
    donate_argnames="state",
    out_shardings=(shardings, NamedSharding(mesh, P())),
    compiler_options=meshes.options_for_sums(mesh, largest_sum(job)),
  )
  deployed = lambda state: workers.deployed(job, layout, state.method)
  along = lambda x: sharded.spec_of(cut, x.shape, "fsdp" if job.zero < 3 else None)
  lies = lambda x: NamedSharding(mesh, P(*along(x)))
  model = jax.eval_shape(job.task.init, jax.random.key(0))
  params = sharded.jit(deployed, out_shardings=jax.tree.map(lies, model))
  dispatch = pipelined.Phased(run, job.method) if early else run
  return Executor(init, partial(sharded.place, mesh, names), dispatch, params, layout)


def _models(job: Job, layout: layouts.Layout) -> Tree:
  """Marks the leaves of the state that are deployed parameters."""
  program = jax.make_jaxpr(job.method.params)(layout.state_shapes).jaxpr
  deployed = set(map(id, program.outvars))
  flags = [id(variable) in deployed for variable in program.invars]
  return jax.tree.structure(layout.state_shapes).unflatten(flags)


def _check_inside(job: Job, mesh: Mesh, names: tuple[str, ...]) -> None:
  """Checks a worker's batch and model against the axes inside a worker, by tracing the loss.

  Raises:
    ValueError: if an axis does not divide a dimension that it shards.
  """
  along, size = job.axes.get("fsdp", 1), job.batch_size
  if size is not None and size % along:
    raise ValueError(
      f"'fsdp:{along}' does not divide the batch of {size} examples of a worker; nearest: "
      f"--batch_size={job.workers * along * -(-size // along)}"
    )
  if set(job.axes) != set(names):
    loss = jax.shard_map(
      job.task.loss, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=set(names), check_vma=False
    )
    with blame.of_libraries():
      program = jax.make_jaxpr(loss)(*workers.of_loss(job)).jaxpr
    if job.axes.get("seq", 1) > 1 and not _lies_along("seq", program):
      raise ValueError("'seq' shards nothing in this model; leave it out")


def _lies_along(axis: str, program: core.Jaxpr) -> bool:
  """Returns whether a program has a sharding constraint along a mesh axis."""
  for eqn in program.eqns:
    if eqn.primitive.name == "sharding_constraint" and axis in jax.tree.leaves(
      tuple(eqn.params["sharding"].spec)
    ):
      return True
    if any(_lies_along(axis, inner.jaxpr) for inner in programs(eqn)):
      return True
  return False


def _only_sums(job: Job, layout: layouts.Layout) -> None:
  """Rejects methods that encode sharded leaves: encoding would communicate inside a worker."""
  found = traffic.of_method(job, layout, 1).transfers
  others = {t.operation for t in found} - {"all-reduce"}
  inner = ", ".join(name for name in job.axes if name not in meshes.worker_axes(job.axes))
  if others:
    raise ValueError(
      f"inside a worker only what is summed may be cut, and this method sends by "
      f"{' and '.join(sorted(others))}; leave out {inner}"
    )
