"""What every execution of a method on a task needs to know, all of it static."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.comm import mesh as meshes
from research.core.base import Aggregator
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
    return self.method.epochs > 0 and self.batch_size is not None and not self.even

  def own_steps(self, sizes: Any) -> Any:
    """Local steps in a round of a method by epochs, of owners with so many examples each."""
    batches = sizes // sizes if self.batch_size is None else sizes // self.batch_size
    return self.method.epochs * (batches + (batches == 0))


def aggregators(method: Method) -> list[Aggregator]:
  """Those of a method, each once; none of a method without `over`."""
  found: dict[int, Aggregator] = {}

  def noted(aggregator: Aggregator) -> Aggregator:
    found[id(aggregator)] = aggregator
    return aggregator

  if method.over is not None:
    method.over(noted)
  return list(found.values())


def traits(method: Method) -> frozenset[str]:
  """Those of all aggregators of a method, see `aggregate/composition.py`."""
  return frozenset().union(*(aggregator.traits for aggregator in aggregators(method)))


def constrained(job: Job) -> Job:
  """The job with a method that keeps to the task's constraints by itself.

  Raises:
    ValueError: if the method cannot.
  """
  if job.task.project is None:
    return job
  if job.method.onto is None:
    raise ValueError(
      "the task keeps its model in a convex set, which this method does not; take data_parallel, "
      "local_sgd or consensus_admm, or one of them in averaged"
    )
  method = job.method.onto(job.task.project)
  return job._replace(method=method, task=job.task._replace(project=None))


def resolved(job: Job) -> Job:
  """The job with a method that knows its rounds: their steps, and who takes part in them."""
  job = constrained(job)
  method = job.method
  if method.of_rounds is None:
    return job
  period = int(job.own_steps(job.sizes.max())) if method.epochs else method.period
  return job._replace(method=method.of_rounds(period, job.workers / len(job.sizes)))


def stages(job: Job) -> tuple[Job, ...]:
  """A resolved job for each period of the method, in order; their states are the same."""
  job = constrained(job)
  found = [resolved(job)]
  for first_round, period in job.method.later:
    assert job.method.of_rounds, "a method whose period changes says what it is with another"
    last = found[-1]
    steps = (first_round - last.first_round) * last.method.period
    method = job.method.of_rounds(period, job.workers / len(job.sizes))
    first = {"first_round": first_round, "first_step": last.first_step + steps}
    found.append(job._replace(method=method, **first))
  return tuple(found)


def largest_sum(job: Job) -> int:
  """Elements of the largest sum over workers."""
  params = jax.eval_shape(job.task.init, jax.random.key(0))
  return job.workers * max(leaf.size for leaf in jax.tree.leaves(params))
