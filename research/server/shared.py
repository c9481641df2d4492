"""Runs a Hogwild worker, which reads and updates a model in shared memory without locks."""

import multiprocessing
import os
import signal
from multiprocessing import shared_memory
from typing import Any, NamedTuple

import numpy as np

from research.server import actors
from research.training.config import Config


class Memory(NamedTuple):
  """The shared memory of all processes: the flat model, and one entry per worker."""

  model: np.ndarray  # float32 [n]
  steps: np.ndarray  # int64 [W], numbers of completed steps
  losses: np.ndarray  # float64 [W], sums of the losses over steps
  stop: np.ndarray  # int64 [1]


def sizes(parameters: int, workers: int) -> int:
  """Returns the size of the shared block in bytes."""
  return 8 * (1 + 2 * workers) + 4 * parameters


def view(block: shared_memory.SharedMemory, parameters: int, workers: int) -> Memory:
  """Returns the arrays in a shared block."""
  at = lambda dtype, count, offset: np.ndarray((count,), dtype, block.buf, offset)
  return Memory(
    at(np.float32, parameters, 8 * (1 + 2 * workers)),
    at(np.int64, workers, 8),
    at(np.float64, workers, 8 * (1 + workers)),
    at(np.int64, 1, 0),
  )


def run(config: Config, worker: int, name: str, parameters: int, given: actors.Inherited) -> None:
  """Runs steps until the run is complete, `stop` is set, or the parent process has ended.

  Steps that have begun are finished, so a run may end with up to W - 1 extra steps. A step reads
  the model while other workers write it, and writes only the coordinates in which the update is not
  zero; with sparse examples, these coordinates are few.

  Args:
    config: the configuration of the run.
    worker: this worker's number.
    name: the name of the shared memory block.
    parameters: the number of parameters in the model.
    given: the settings of the parent process.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles SIGINT
  starter = multiprocessing.parent_process()
  assert starter is not None
  actors.settle("cpu", given)
  import jax
  from jax.flatten_util import ravel_pytree

  from research.methods.data_parallel import DataParallel
  from research.parallel import sharded
  from research.parallel.local_phase import measured_and_clipped_grad
  from research.server import setup as setups
  from research.server import work

  made = setups.setup(config, needs_ray=False)
  task, method = made.job.task, made.apart.method
  assert isinstance(method, DataParallel), "see setup._check_lock_free"
  optimizer = method.inner
  block = shared_memory.SharedMemory(name=name)
  memory = view(block, parameters, made.workers)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  unravel = ravel_pytree(zeros)[1]
  own = jax.random.fold_in(made.keys.data, worker)
  examples, size = work.examples_of(made.examples, made.job.sizes, worker)
  examples = jax.device_put(examples)
  gradient = measured_and_clipped_grad(made.job, sharded.ALONE)

  @jax.jit
  def step(flat: Any, state: Any, number: Any) -> Any:
    params = unravel(flat)
    batch = examples
    if made.job.batch_size is not None:
      index = task.sample(size, number, own, batch_size=made.job.batch_size)
      batch = task.batch(examples, index)
    measured, grads = gradient(params, batch, jax.random.fold_in(own, number))
    updates, state = optimizer.update(grads, state, params)
    return measured["loss"], ravel_pytree(updates)[0], state

  state, number = (
    optimizer.init(unravel(jax.numpy.asarray(memory.model))),
    int(memory.steps[worker]),
  )
  try:
    while not memory.stop[0] and os.getppid() == starter.pid:
      if memory.steps.sum() >= made.updates:
        break
      loss, update, state = step(memory.model.copy(), state, np.int32(number))
      update = np.asarray(update)
      (where,) = np.nonzero(update)
      np.add.at(memory.model, where, update[where])
      number += 1
      memory.losses[worker] += float(loss)
      memory.steps[worker] = number
  finally:
    del memory
    block.close()
