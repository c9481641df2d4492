"""Provides the data of each dispatch, which stays on the devices or is read one dispatch ahead."""

import functools

import jax
import numpy as np

from research.core import blame
from research.core.base import Array
from research.core.method import Method
from research.core.task import Batch, Data
from research.parallel.job import Job
from research.training import sources
from research.training.config import Config, called, flag


def buffers(config: Config, method: Method, owners: int, batch_size: int) -> np.ndarray:
  """Returns the buffer sizes [P] of the workers in examples, enough for the longest dispatch.

  Args:
    config: provides the steps per dispatch.
    method: provides the periods.
    owners: P, number of workers.
    batch_size: examples per worker and step.
  """
  periods = (method.local_steps, *(period for _, period in method.later))
  steps = max(-(-config.steps_per_dispatch // period) * period for period in periods)
  return np.full(owners, steps * batch_size)


def check(config: Config, method: Method) -> None:
  """Rejects options that need more of a streamed data set than the next batches.

  Args:
    config: the run.
    method: the run's method.

  Raises:
    UsageError: if a flag is invalid; the message names the flag.
  """
  wrong = {
    "batch_size": config.batch_size == "all" and "they are read batch by batch; give a number",
    "population": config.population and "clients would have examples of their own",
    "partition": called(config.partition) != "iid"
    and "they are assigned to workers in order; use iid()",
    "tolerance": config.tolerance and "the gradient of the full objective is not available",
    "method": (method.passes and "workers have no examples of their own; use period=, not epochs=")
    or (method.one_by_one and "workers that are served one by one have examples of their own"),
  }
  for name, reason in wrong.items():
    with flag(name, getattr(config, name)):
      if reason:
        raise ValueError(f"the task streams its training examples: {reason}")


class Training:
  """Provides the training data of each dispatch.

  For a task with a feed, the data is a buffer [P, D b, ...] of D steps. The batch of step t is at
  position t mod D, wherever dispatches begin and end. Each process reads only the examples of its
  own devices. All buffers have the same shape, so that no program is recompiled. `ahead` fills the
  next buffer while the devices compute.
  """

  def __init__(self, config: Config, job: Job, placed: Data):
    """Creates the data of a run.

    Args:
      config: the run.
      job: the resolved job.
      placed: the task's `train` on the devices; the buffers of a feed have the same sharding.
    """
    self.config, self.job, self.placed = config, job, placed
    self.next: tuple[int, int, Data] | None = None
    self.sampled: dict[str, str] = {}  # summary entry: the examples of the training loss
    if job.task.feed:
      count = sources.count(job.task.train)
      self.sampled["train_loss_on"] = f"{count} of {job.task.feed.examples} training examples"

  def of(self, first: int, last: int) -> Data:
    """Returns the data of the dispatch of steps first, ..., last - 1."""
    if self.job.task.feed is None:
      return self.placed
    if self.next is None or self.next[:2] != (first, last):
      self.ahead(first, last)
    assert self.next
    found, self.next = self.next[2], None
    return found

  def ahead(self, first: int, last: int) -> None:
    """Reads the data of the next dispatch, for `of`."""
    if self.job.task.feed is None:
      return
    rows = functools.cache(functools.partial(self._rows, first, last))
    with flag("task", self.config.task), blame.of_libraries():
      examples = {name: self._placed(rows, name) for name in rows(0, 0)}
    sizes = self.job.sizes.astype(np.int32)
    everywhere = self.placed.sizes.sharding
    put = jax.make_array_from_callback(sizes.shape, everywhere, lambda index: sizes[index])
    self.next = first, last, Data(examples, put, self.placed.key)

  def _placed(self, rows, name: str) -> Array:
    workers, sharding = self.job.workers, jax.tree.leaves(self.placed.examples)[0].sharding
    part = lambda index: rows(*index[0].indices(workers)[:2])[name]
    return jax.make_array_from_callback((workers, *rows(0, 0)[name].shape[1:]), sharding, part)

  def _rows(self, first: int, last: int, start: int, stop: int) -> Batch:
    """Returns the buffers of the workers start, ..., stop - 1."""
    job, seed = self.job, self.config.seed
    assert job.task.feed
    assert job.batch_size
    batch, length = job.batch_size, int(job.sizes[0])
    empty = job.task.feed.read(seed, 0, 0)
    shape = lambda x: (stop - start, length, *x.shape[1:])
    rows = {name: np.zeros(shape(x), x.dtype) for name, x in empty.items()}
    for step in range(first, last):
      place = step * batch % length
      for worker in range(start, stop):
        read = job.task.feed.read(seed, (step * job.workers + worker) * batch, batch)
        for name, x in read.items():
          rows[name][worker - start, place : place + batch] = x
    return rows
