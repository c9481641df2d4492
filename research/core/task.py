"""Tasks and executions: a model with its data and objective, and what runs a method on it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from research.core.base import Array, Key, Params, State, Tree

Metrics = dict[str, Array]  # scalars, means over a batch
Batch = dict[str, Any]  # arrays [examples, ...]; "mask" [examples], where present, is 1 or 0


class Feed(NamedTuple):
  """Training examples that are read from disk as they are needed, in an endless order.

  Step t takes the examples t B, ..., (t + 1) B - 1 of the order, B being the batch of all workers.
  """

  examples: int  # in an epoch
  read: Callable[[int, int, int], Batch]  # (seed, first, count) -> numpy [count, ...], pure


class Task(NamedTuple):
  """A model, its data and its objective: the mean of `loss` over all examples in `train`.

  `sample` is a pure function of (step, key) and of the number of examples that a worker has, cheap
  and free of the data itself, so that an executor draws the samples of many steps at once; `batch`
  fetches them. Both see one worker's examples, arrays [examples, ...].

  A task that seeks a fixed point x = T(x), not a minimum, gives `grads`: x - T(x) in place of the
  gradient, so that `sgd(1.0)` iterates T, and beside it a value, which `loss` is too; neither is
  differentiated. A mean over examples like a gradient, it is aggregated, compressed and delayed as
  one. Its L1 norm over all examples is the metric "residual".

  With a `feed` the objective is the mean over what that reads, and `train` a sample of it, by which
  it is measured; `sample` is then `sampling.in_order`.
  """

  init: Callable[[Key], Params]
  # mean over the batch, by its mask if it has one; or a pair of it and of Metrics for the rows
  loss: Callable[[Params, Batch, Key], Any]
  evaluate: Callable[[Params, Batch], dict[str, Array]]  # metrics, each such a mean
  sample: Callable[..., Tree]  # (size, step, key, *, batch_size) -> index [batch_size]
  batch: Callable[[Batch, Tree], Batch]  # (examples of one worker, index) -> batch
  train: Batch  # numpy arrays [examples, ...]; "y" is what partitions sort by
  test: Batch | None = None
  optimum: Params | None = None  # the exact minimiser, where it is known
  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # see `parallel/rules.py`
  chunk: int = 1024  # examples that a device evaluates at once
  # (stages, examples, fsdp) -> how a pipeline takes a worker's batch through layers: a NamedTuple
  # with a `bubble`, the share of time in which a stage is idle
  schedule: Callable[[int, int, int], Any] | None = None
  feed: Feed | None = None  # where the training examples fit no memory
  grads: Callable[[Params, Batch, Key], tuple[Array, Tree]] | None = None  # (value, x - T(x))
  project: Callable[[Params], Params] | None = None  # onto the convex set of models that may be
  # metrics of a whole model that are no means over examples: AUC, RMSE, recall@10
  measure: Callable[[Params], dict[str, Array]] = lambda params: {}
  by: Any = None  # numpy [examples] that partitions sort by, in place of "y"


def loss_and_metrics(task: Task) -> Callable[[Params, Batch, Key], tuple[Array, Metrics]]:
  """(params, batch, key) -> the loss, and the metrics that it returns beside itself."""

  def both(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
    found = task.loss(params, batch, key)
    value, own = found if isinstance(found, tuple) else (found, {})
    if "loss" in own:
      raise ValueError("the loss returns a metric 'loss' beside itself; give it another name")
    return value, own

  return both


def measured_and_grad(task: Task) -> Callable[[Params, Batch, Key], tuple[Any, Tree]]:
  """(params, batch, key) -> (loss, metrics) and gradient, or what stands for one."""
  if task.grads is None:
    return jax.value_and_grad(loss_and_metrics(task), has_aux=True)
  grads = task.grads

  def both(params: Params, batch: Batch, key: Key) -> tuple[Any, Tree]:
    value, found = grads(params, batch, key)
    return (value, {}), found

  return both


def value_and_grad(task: Task) -> Callable[[Params, Batch, Key], tuple[Array, Tree]]:
  """(params, batch, key) -> loss and gradient, or what stands for one."""
  differentiated = measured_and_grad(task)

  def both(params: Params, batch: Batch, key: Key) -> tuple[Array, Tree]:
    (value, _), grads = differentiated(params, batch, key)
    return value, grads

  return both


class Data(NamedTuple):
  """The training examples by owner, on the devices. P = workers, or clients of a population.

  Like TrainState a tree: of arrays, of their shardings, of axes of `vmap`.
  """

  examples: Tree  # arrays [P, most examples of any, ...], zero where an owner has fewer
  sizes: Tree  # [P] int32, examples that each has
  key: Tree  # a typed key, of the order in which they are drawn


class TrainState(NamedTuple):
  """All that a run needs to go on: what a checkpoint holds."""

  round: Tree  # int32, rounds done; the position in the data is a function of it
  key: Tree  # a typed key; what a round draws is a function of (key, round, worker)
  method: State  # shared leaves once, private leaves with one row per worker or client


class Executor(NamedTuple):
  """How N workers are executed; all that the training loop sees."""

  init: Callable[[Key], TrainState]  # straight into its shardings
  place: Callable[..., Data]  # (examples [P, ...], sizes [P], key), numpy to devices
  run: Callable[..., tuple[TrainState, dict[str, Array]]]  # (state, data, rounds): one dispatch
  params: Callable[[TrainState], Params]
  layout: Any  # what of the state is private, a `parallel.layout.Layout`
