"""What every execution of a method on a task needs to know, all of it static."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.comm import mesh as meshes
from research.core.base import Aggregator, Trait
from research.core.method import Method
from research.core.task import Task


class Job(NamedTuple):
  """A method, a task, and who the workers and the owners of its examples are.

  There are as many owners as workers, or a multiple: then every worker holds a stratum of the
  population and serves one client of it per round. With an `order` a single worker serves the
  population one by one: round t serves client order[t mod its length].
  """

  method: Method
  task: Task
  axes: dict[str, int]  # of the mesh
  sizes: np.ndarray  # [P], examples of each owner
  batch_size: int | None  # per worker and step; None: all of an owner's examples
  clip_norm: float = 0.0  # of each worker's gradient, before the method sees it; 0: none
  sampling_rate: float = 0.0  # of Poisson sampling of the population; 0: one client per worker
  dropout: float = 0.0  # the probability that a worker's round is lost before it is sent
  order: np.ndarray | None = None  # [E] int32, whom a single worker serves
  zero: int = 3  # what is cut along `fsdp`, see `sharded.inside`
  local_phase: str = "auto"  # how `simulate` runs it: "vmap", "map" or what is faster
  first_round: int = 0  # of the stage that this job is, where the method's period changes
  first_step: int = 0  # local steps before that round
  diagnostics: int = 0  # steps between rows for which `diagnostics.recorded` measures; 0: none
  devices: Sequence[Any] | None = None  # that `spmd` compiles for; None: those of this machine

  @property
  def workers(self) -> int:
    return meshes.count(meshes.worker_axes(self.axes))

  @property
  def clients(self) -> int:
    """R = P / W, the owners whose rows one worker holds."""
    return len(self.sizes) // self.workers

  @property
  def even(self) -> bool:
    """Whether all owners have equally many examples."""
    return bool((self.sizes == self.sizes[0]).all())

  @property
  def by_epochs(self) -> bool:
    """Whether owners take different numbers of steps in a round."""
    return self.method.passes > 0 and self.batch_size is not None and not self.even

  def own_steps(self, sizes: Any) -> Any:
    """Local steps in a round of a method by epochs, of owners with so many examples each."""
    batches = sizes // sizes if self.batch_size is None else sizes // self.batch_size
    return self.method.passes * (batches + (batches == 0))


def traits(method: Method) -> Trait:
  """Those of all aggregators of a method."""
  found = Trait(0)
  for aggregator in method.parts(Aggregator):
    found |= aggregator.traits
  return found


def constrained(job: Job) -> Job:
  """The job with a method that keeps to the task's constraints by itself.

  Raises:
    ValueError: if the method cannot.
  """
  if job.task.project is None:
    return job
  method = job.method.onto(job.task.project)
  if method is None:
    raise ValueError(
      "the task keeps its model in a convex set, which this method does not; take data_parallel, "
      "local_sgd or consensus_admm, or one of them in averaged"
    )
  return job._replace(method=method, task=job.task._replace(project=None))


def resolved(job: Job) -> Job:
  """The job with a method that knows its rounds: their steps, and who takes part in them."""
  job = constrained(job)
  method = job.method
  steps = int(job.own_steps(job.sizes.max())) if method.passes else method.local_steps
  return job._replace(method=method.in_rounds(steps, job.workers / len(job.sizes)))


def stages(job: Job) -> tuple[Job, ...]:
  """A resolved job for each period of the method, in order; their states are the same."""
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
  """Elements of the largest sum over workers."""
  params = jax.eval_shape(job.task.init, jax.random.key(0))
  return job.workers * max(leaf.size for leaf in jax.tree.leaves(params))
