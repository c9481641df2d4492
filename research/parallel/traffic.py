"""Reads the traffic of a job from the traced program of one worker."""

import jax
import jax.numpy as jnp

from research.aggregate.blockwise import blockwise
from research.aggregate.mean import mean
from research.analysis import wire
from research.comm import mesh as meshes
from research.core.task import loss_and_metrics
from research.parallel import layout as layouts
from research.parallel import sharded, workers
from research.parallel.job import Job


def of_method(job: Job, layout: layouts.Layout, rounds: int) -> wire.Traffic:
  """Returns the traffic of one worker's algorithm in the first `rounds` rounds.

  Args:
    job: the resolved job.
    layout: which state of the job is private.
    rounds: the number of rounds.
  """
  found = by_round(job, layout).between(0, rounds)
  return found._replace(transfers=wire.happened(found.transfers))


def by_round(job: Job, layout: layouts.Layout) -> wire.RoundTraffic:
  """Returns the traffic of one worker's algorithm in any range of rounds, from the traced sync.

  If a worker has several devices, the traffic is the sum over these devices.

  Args:
    job: the resolved job.
    layout: which state of the job is private.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  weight = jax.ShapeDtypeStruct((), jnp.float32)
  cut = workers.blocked(job)
  round_ = lambda state, local, weight, key: workers.sync(cut, local, state, weight, key)
  args = (layout.state_shapes, layout.local_shapes, weight, key)
  axes = meshes.worker_axes(job.axes)
  params = jax.eval_shape(job.task.init, key)
  init = layouts.over_workers(cut.method.init, axes, None, layouts.lead(layout.state))
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
  copies = sharded.replicas(job.axes)
  return wire.RoundTraffic(round_, *args, axes=axes, first=lambda: init(zeros()), copies=copies)


def of_dense(job: Job) -> list[wire.Transfer]:
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


def of_metrics(job: Job, rounds: int) -> list[wire.Transfer]:
  """Returns the traffic of the metrics of a dispatch of K rounds, without diagnostics.

  Args:
    job: the resolved job.
    rounds: K.
  """
  params, batch, key = workers.of_loss(job)
  own = jax.eval_shape(loss_and_metrics(job.task), params, batch, key)[1]
  steps = jax.ShapeDtypeStruct((rounds * job.method.local_steps,), jnp.float32)
  finite = jax.ShapeDtypeStruct((), jnp.bool_)
  measured = dict.fromkeys([*own, "loss"], steps)
  return wire.traffic(workers.reduce_metrics, measured, finite, axes=meshes.worker_axes(job.axes))
