"""Builds the task and model of a run from flags, and partitions the examples over owners."""

import math

import jax
import numpy as np

from research.comm import mesh as meshes
from research.core import blame, paths, registry
from research.core.spec import parse
from research.core.task import Batch, Task
from research.parallel.job import Job
from research.tasks.partition import Partition, stack
from research.training.config import Config, called, flag


def task_of(config: Config) -> Task:
  """Builds the task with its model from the flags.

  Args:
    config: the run.

  Raises:
    UsageError: if a flag is invalid; the message names the flag.
  """
  with flag("task", config.task):
    call = parse(config.task)
    factory = registry.lookup(("task",), call.name)
    parameter = registry.signature_of(factory).parameters.get("model")
  given = {}
  with flag("model", config.model):
    if config.model and parameter is None:
      raise ValueError(f"the task {call.name} has a model of its own; leave this out")
    if config.model:
      given = {"model": registry.build("model", config.model)}
  with flag("data_dir", config.data_dir):
    if config.data_dir:
      paths.local(config.data_dir)  # validated even if the task reads no files
  with flag("task", config.task):
    task = registry.build("task", call, **given, data_dir=config.data_dir)
  model = config.model or (parameter.default if parameter else "")
  with flag("model", model), blame.of_libraries():
    shapes = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
    size = sum(math.prod(x.shape) for x in shapes)
    if size >= 2**60:
      raise ValueError(f"a model of {size:.3g} parameters")
  return task


def count(examples: Batch) -> int:
  """Returns the number of examples in a batch.

  Args:
    examples: arrays [examples, ...].
  """
  return len(jax.tree.leaves(examples)[0])


def partitioned(
  config: Config, task: Task, owners: int, split: Partition | None = None
) -> tuple[Batch, np.ndarray]:
  """Partitions the training examples over the owners.

  Args:
    config: provides the seed and the spec of the partition.
    task: provides the training examples, `train`.
    owners: P, the number of workers or clients.
    split: a partition that replaces the partition of the spec.

  Returns:
    numpy arrays [P, n, ...], padded to the size of the largest owner, and the number of examples of
    each owner.

  Raises:
    UsageError: if the partition needs labels that do not exist, or does not fit the examples.
  """
  with flag("partition", config.partition):
    if split is None:
      split = registry.build("partition", config.partition)
    assert split is not None
    if task.by is not None:
      by = task.by
    elif "y" in task.train:
      by = np.asarray(task.train["y"])
    elif (name := called(config.partition)) in ("iid", "in_order", ""):
      by = np.zeros(count(task.train), np.int32)
    else:
      raise ValueError(f"{name} sorts by labels, and the examples have none; use iid()")
    return stack(task.train, split(by, owners, config.seed))


def test_of(job: Job, config: Config) -> tuple[Batch, np.ndarray] | None:
  """Splits the test examples evenly over the evaluating devices; None without a test set.

  Args:
    job: provides the task and the number of workers.
    config: provides the executor.

  Returns:
    numpy arrays [D, n, ...] and the number of examples [D] of each part.

  Raises:
    UsageError: if there are fewer examples than devices.
  """
  if job.task.test is None:
    return None
  found, shards = count(job.task.test), evaluation_shards(job, config.executor)
  with flag("mesh", config.mesh):
    if found < shards:
      raise ValueError(f"the {found} test examples do not spread over {shards} devices")
  return stack(job.task.test, np.array_split(np.arange(found), shards))


def evaluation_shards(job: Job, executor: str) -> int:
  """Returns the number of devices over which an executor distributes evaluation.

  Args:
    job: provides the number of workers.
    executor: name of the executor.
  """
  return meshes.simulation_mesh(job.workers).size if executor == "simulate" else job.workers
