"""Defines a small regression with private data, and runs methods on it with any executor."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.method import Method
from research.core.task import Task
from research.parallel import overlapped, pmap, simulate, spmd
from research.parallel.job import Job, resolved
from research.tasks import partition, sampling

FEATURES, OUTPUTS = 6, 3
SIMULATED = {"data": 8}
EXECUTORS = {
  "simulate": simulate.simulate,
  "spmd": spmd.spmd,
  "pmap": pmap.pmap,
  "overlapped": overlapped.overlapped,
}


def regression(samples: int = 240, seed: int = 0) -> Task:
  """Creates a least-squares task in plain JAX, with weights [6, 3] and bias [3].

  Args:
    samples: the number of examples.
    seed: the seed of the data.
  """
  random = np.random.default_rng(seed)
  x = random.normal(size=(samples, FEATURES)).astype(np.float32)
  truth = random.normal(size=(FEATURES, OUTPUTS)).astype(np.float32)
  y = x @ truth + 0.1 * random.normal(size=(samples, OUTPUTS)).astype(np.float32)

  def loss(params, batch, key):
    del key
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    each = 0.5 * jnp.sum(error**2, -1)
    mask = batch.get("mask", jnp.ones_like(each))
    return jnp.sum(mask * each) / jnp.maximum(jnp.sum(mask), 1)

  def init(key):
    w = 0.1 * jax.random.normal(key, (FEATURES, OUTPUTS))
    return {"b": jnp.zeros(OUTPUTS), "w": w}

  def evaluate(params, batch):
    return {"loss": loss(params, batch, None)}

  train = {"x": x, "y": y}
  return Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train, train)


def split(task: Task, sizes: Sequence[int]):
  """Partitions the examples of a task over owners, in order.

  Args:
    task: the task.
    sizes: the number of examples of each owner.
  """
  edges = np.cumsum([0, *sizes])
  parts = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
  return partition.stack(task.train, parts)


class Running:
  """Runs a method on the regression with one executor; `rest` sets further fields of the Job."""

  metrics: dict[str, Any]

  def __init__(
    self,
    method: Method,
    executor: str,
    axes: Mapping[str, int],
    sizes: Sequence[int] = (30,) * 8,
    batch_size: int | None = 8,
    clip_norm: float = 0.0,
    task: Task | None = None,
    **rest: Any,
  ):
    task, self._sizes = task or regression(), sizes
    counts = split(task, sizes)[1]
    self.job = resolved(Job(method, task, dict(axes), counts, batch_size, clip_norm, **rest))
    self.executor = EXECUTORS[executor](self.job)
    self.layout = self.executor.layout
    self._begin(task)

  def _begin(self, task: Task) -> None:
    self.state = self.executor.init(jax.random.key(0))
    self.data = self.executor.place(*split(task, self._sizes), jax.random.key(1))

  def again(self, task: Task | None = None) -> "Running":
    """Returns a new run of the same job, which shares the compiled programs.

    Args:
      task: the task with other examples of the same shapes; None means the job's.
    """
    other = copy.copy(self)
    other._begin(task or self.job.task)
    return other

  def rounds(self, *counts: int) -> "Running":
    for count in counts:
      self.state, self.metrics = self.executor.run(self.state, self.data, rounds=count)
    return self

  def params(self) -> Any:
    return jax.device_get(self.executor.params(self.state))


def distance(a: Any, b: Any) -> float:
  """Computes max|a - b| / max|b| over all leaves of two trees.

  Args:
    a: a tree of arrays.
    b: a tree of the same structure.
  """
  leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  top = max(float(np.abs(y).max()) for _, y in leaves)
  return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in leaves) / top
