"""Infers which state of a job is private, and rejects jobs in which that state must be shared."""

import jax
import jax.numpy as jnp

from research.comm import mesh as meshes
from research.core.base import Trait, Tree
from research.parallel import layout as layouts
from research.parallel import traffic, workers
from research.parallel.job import Job, resolved, traits
from research.parallel.local_phase import local_phase


def layout_of(job: Job) -> layouts.Layout:
  """Infers which state of the job is private, by tracing one of its rounds.

  Args:
    job: the job.

  Raises:
    ValueError: if the population is not a multiple of the number of workers; if workers serve
      several clients or drop out, but the method keeps one chunk per worker or sends to neighbours;
      if participation is partial, but the method needs the earlier messages of all workers; or if
      clients are sampled at a rate, but the method keeps per-client state.
  """
  job = workers.blocked(resolved(job))
  if len(job.sizes) % job.workers:
    raise ValueError(
      f"a population of {len(job.sizes)} clients is not a multiple of the cohort, "
      f"{job.workers} workers"
    )
  key = jax.eval_shape(lambda: jax.random.key(0))
  layout = layouts.infer(
    job.method.init,
    lambda state, *args: local_phase(job, state, *args),
    lambda local, state, weight: workers.sync(job, local, state, weight, jax.random.key(0)),
    meshes.worker_axes(job.axes),
    jax.eval_shape(job.task.init, key),
    phase_arguments(job),
  )
  kinds = jax.tree.leaves(layouts.kinds(layout.state))
  if job.clients > 1 and any(kind.startswith("chunks") for kind in kinds):
    raise ValueError("two_phase stores a memory per worker, but a population stores it per client")
  if job.clients > 1 and _has_neighbours(job, layout):
    raise ValueError("neighbours are workers, but a population stores state per client")
  is_partial = job.clients > 1 or job.misses
  if is_partial and Trait.EVERYONE in traits(job.method):
    raise ValueError(
      "ef21 and diana accumulate every worker's messages, which is incompatible with dropout and "
      "with a population; use error_feedback"
    )
  if job.sampling_rate and any(jax.tree.leaves(layout.state)):
    raise ValueError("the method stores state per client, which --sampling_rate does not support")
  return layout


def phase_arguments(job: Job) -> tuple[Tree, ...]:
  """Returns the shapes of the private arguments of one worker's local phase.

  Args:
    job: the resolved job.

  Returns:
    The examples, their number, the indices of the mini-batches, and the key.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  most = int(job.sizes.max())
  struct = lambda x: jax.ShapeDtypeStruct((most, *x.shape[1:]), x.dtype)
  size, index = jax.ShapeDtypeStruct((), jnp.int32), None
  if job.batch_size is not None:
    sample = lambda s, k: job.task.sample(s, jnp.int32(0), k, batch_size=job.batch_size)
    spread = lambda x: jax.ShapeDtypeStruct((job.method.local_steps, *x.shape), x.dtype)
    index = jax.tree.map(spread, jax.eval_shape(sample, size, key))
  return jax.tree.map(struct, job.task.train), size, index, key


def _has_neighbours(job: Job, layout: layouts.Layout) -> bool:
  return any(t.operation == "permute" for t in traffic.of_method(job, layout, 1).transfers)
