"""The static description of a run: method, task, mesh and clients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.comm import mesh as meshes
from research.core.base import Aggregator, Trait
from research.core.method import Method
from research.core.task import Task
from research.optim import fitting


class Job(NamedTuple):
  """A method, a task, and the assignment of examples to workers and clients.

  The population has P clients; P is a multiple of the number of workers, W. With P > W, each worker
  serves one client of its own stratum per round. With an `order`, a single worker serves the
  clients in turn: in round t, the worker serves client order[t mod E].
  """

  method: Method
  task: Task
  axes: dict[str, int]  # axis sizes of the mesh
  sizes: np.ndarray  # [P], examples per client
  batch_size: int | None  # examples per worker and step; None: all examples of a client
  clip_norm: float = 0.0  # norm to which a worker's gradient is clipped; 0: no clipping
  sampling_rate: float = 0.0  # rate of Poisson sampling of clients; 0: one client per worker
  dropout: float = 0.0  # probability that a worker's message of a round is lost
  present: np.ndarray | None = None  # [K, W] bool, workers on a network in each round; None: all
  order: np.ndarray | None = None  # [E] int32, clients that a single worker serves in turn
  zero: int = 3  # ZeRO stage, which sets the sharding along `fsdp`; see `sharded.inside`
  local_phase: str = "auto"  # in `simulate`: "vmap", "map", or "auto" for the faster of both
  first_round: int = 0  # first round of this job's stage, if the method's period changes
  first_step: int = 0  # number of local steps before the first round
  diagnostics: int = 0  # steps between rows measured by `diagnostics.recorded`; 0: none
  devices: Sequence[Any] | None = None  # devices that `spmd` compiles for; None: this machine's

  @property
  def workers(self) -> int:
    return meshes.count(meshes.worker_axes(self.axes))

  @property
  def clients(self) -> int:
    """R = P / W, the number of clients whose rows one worker stores."""
    return len(self.sizes) // self.workers

  @property
  def misses(self) -> bool:
    """Whether workers may miss rounds."""
    return bool(self.sampling_rate or self.dropout or self.present is not None)

  @property
  def even(self) -> bool:
    """Whether all clients have the same number of examples."""
    return bool((self.sizes == self.sizes[0]).all())

  @property
  def by_epochs(self) -> bool:
    """Whether clients take different numbers of steps in a round."""
    return self.method.passes > 0 and self.batch_size is not None and not self.even

  def own_steps(self, sizes: Any) -> Any:
    """Returns the local steps per round of clients with `sizes` examples, if rounds last epochs."""
    batches = sizes // sizes if self.batch_size is None else sizes // self.batch_size
    return self.method.passes * (batches + (batches == 0))


def traits(method: Method) -> Trait:
  """Returns the union of the traits of all aggregators of a method.

  Args:
    method: the method.
  """
  found = Trait(0)
  for aggregator in method.parts(Aggregator):
    found |= aggregator.traits
  return found


def constrained(job: Job) -> Job:
  """Fits the method's optimizers to the task's model, and moves the task's projection into it.

  Args:
    job: the job.

  Raises:
    ValueError: if the method has no projected form.
  """
  model = fitting.Model(job.task.dimensions)
  job = job._replace(method=fitting.method_for(job.method, model))
  if job.task.project is None:
    return job
  method = job.method.onto(job.task.project)
  if method is None:
    raise ValueError(
      "the task constrains its model to a convex set, which this method does not support; use "
      "data_parallel, local_sgd or consensus_admm, or one of them in averaged"
    )
  return job._replace(method=method, task=job.task._replace(project=None))


def resolved(job: Job) -> Job:
  """Sets the method's local steps per round and its participation rate.

  Args:
    job: the job.
  """
  job = constrained(job)
  method = job.method
  steps = int(job.own_steps(job.sizes.max())) if method.passes else method.local_steps
  return job._replace(method=method.in_rounds(steps, job.workers / len(job.sizes)))


def stages(job: Job) -> tuple[Job, ...]:
  """Resolves one job for each period of the method, in order; all share one state structure.

  Args:
    job: the job.
  """
  job = constrained(job)
  found = [resolved(job)]
  for first_round, steps in job.method.later:
    last = found[-1]
    before = (first_round - last.first_round) * last.method.local_steps
    method = job.method.in_rounds(steps, job.workers / len(job.sizes))
    first = {"first_round": first_round, "first_step": last.first_step + before}
    found.append(job._replace(method=method, **first))
  return tuple(found)


def largest_sum(job: Job) -> int:
  """Returns the number of elements of the largest sum over workers: W times the largest parameter.

  Args:
    job: the resolved job.
  """
  params = jax.eval_shape(job.task.init, jax.random.key(0))
  return job.workers * max(leaf.size for leaf in jax.tree.leaves(params))
