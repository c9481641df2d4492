"""Runs the local phase of one worker's round: gradients and local steps, no communication."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.privacy.clipping import clipped
from research.core.base import Array, Key, State, Tree
from research.core.method import Local
from research.core.task import Batch, Metrics, loss_and_metrics, measured_and_grad
from research.parallel import diagnostics, sharded
from research.parallel.diagnostics import GRADIENT
from research.parallel.job import Job


def measured_and_clipped_grad(job: Job, inside: sharded.Inside) -> Callable[..., tuple[Any, Tree]]:
  """Returns a function (params, batch, key) -> (measurements, gradient) of one step.

  The measurements are the loss, named "loss", and the task's own metrics. The gradient is this
  worker's gradient, clipped to the norm `clip_norm` if `clip_norm` is positive.

  Args:
    job: the resolved job.
    inside: sharding constraints inside the worker.
  """
  differentiated = measured_and_grad(job.task)

  def clipped_grad(params, batch, key):
    (value, own), grads = differentiated(params, inside.batch(batch), key)
    grads = inside.grads(grads)
    grads = clipped(grads, job.clip_norm) if job.clip_norm > 0 else grads
    measured = {**own, "loss": value}
    return jax.tree.map(lambda x: x.astype(jnp.float32), measured), grads

  return clipped_grad


def local_phase(
  job: Job,
  state: State,
  examples: Batch,
  size: Array,
  index: Tree,
  key: Key,
  inside: sharded.Inside = sharded.ALONE,
  measures: bool | None = None,
  begun: tuple[int, Local] | None = None,
  last: int | None = None,
) -> tuple[Local, Metrics]:
  """Runs `begin`, then `step` `period` times, on one client's examples [n, ...]; no communication.

  A client that finishes its epochs before the round ends keeps its Local and its last measurements.
  If `measures` is True or False, the measurements include the entry GRADIENT: the squared norm of
  the last step's gradient if True, or zero if False.

  Args:
    job: the resolved job.
    state: this client's state at the start of the round.
    examples: the client's examples, padded to the size of the largest client.
    size: int32 scalar, the number of the client's examples without the padding.
    index: indices [H, b] of the mini-batches; None: all examples in every step.
    key: a typed key of this worker and round.
    inside: sharding constraints inside the worker.
    begun: if an earlier call began the phase, the number of steps taken so far and the Local after
      these steps.
    last: the number of steps after which the function returns; None means all steps of the round.

  Returns:
    The worker's Local, and the measurements [H] of its steps by name, such as "loss".
  """
  method, gradient = job.method, measured_and_clipped_grad(job, inside)
  first, local = begun or (0, method.begin(state))
  last = method.local_steps if last is None else last
  if job.batch_size is None and not job.even:
    most = jax.tree.leaves(examples)[0].shape[0]
    examples = {**examples, "mask": (jnp.arange(most) < size).astype(float)}

  drawn = jax.tree.map(lambda x: x[first:last], index)
  if ahead := index is not None and _fits(drawn, examples):
    drawn = jax.vmap(job.task.batch, (None, 0))(examples, drawn)

  def step(held, of_step):
    (local, _), (drawn, number) = held, of_step
    if job.batch_size is None:
      drawn = examples
    elif not ahead:
      drawn = job.task.batch(examples, drawn)
    batch, step_key = drawn, jax.random.fold_in(key, number)
    measured, grads = gradient(local.params, batch, step_key)
    if measures is not None:
      is_last = number == (job.own_steps(size) if job.by_epochs else method.local_steps) - 1
      nothing = lambda grads: jnp.zeros((), jnp.float32)
      norm = diagnostics.squared if measures else nothing
      measured[GRADIENT] = lax.cond(is_last, norm, nothing, grads)
    grad_fn = lambda params: gradient(params, batch, step_key)[1]
    return method.step(grads, local, state, key=step_key, grad_fn=grad_fn), measured

  def one(held, of_step):
    if not job.by_epochs:
      local, measured = step(held, of_step)
      return (local, None), measured
    goes_on = of_step[1] < job.own_steps(size)
    held = lax.cond(goes_on, step, lambda held, _: held, held, of_step)
    return held, held[1]

  steps = jnp.arange(first, last, dtype=jnp.int32)
  held: Any = local, None
  if job.by_epochs:
    held = local, _nothing_measured(job, local, examples, index, key, measures is not None)
  if last - first > 1:
    (local, _), measured = lax.scan(one, held, (drawn, steps))
    return local, measured
  (local, _), measured = one(held, jax.tree.map(lambda x: x[0], (drawn, steps)))
  return local, jax.tree.map(lambda x: x[None], measured)


def _nothing_measured(
  job: Job, local: Local, examples: Batch, index: Tree, key: Key, with_norm: bool
) -> Metrics:
  """Returns zeros in the structure of a step's measurements."""
  batch = examples
  if index is not None:
    batch = jax.eval_shape(job.task.batch, examples, jax.tree.map(lambda x: x[0], index))
  own = jax.eval_shape(loss_and_metrics(job.task), local.params, batch, key)[1]
  names = [*own, "loss", *([GRADIENT] if with_norm else [])]
  return {name: jnp.zeros((), jnp.float32) for name in names}


def _fits(index: Tree, examples: Batch) -> bool:
  """Returns whether all batches of a round together are no larger than the client's examples."""
  first = jax.tree.leaves(index)[0]
  return first.shape[0] > 1 and first.size <= jax.tree.leaves(examples)[0].shape[0]
