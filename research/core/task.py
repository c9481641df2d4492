"""Defines tasks (a model with its data and objective) and executors, which run methods."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from research.core.base import Array, Key, Params, State, Tree

Metrics = dict[str, Array]  # scalars, means over a batch
Batch = dict[str, Any]  # arrays [examples, ...]; an optional "mask" [examples] is 1 or 0


class Feed(NamedTuple):
  """Training examples that are read from disk on demand, in an infinite order.

  Step t uses the examples t B, ..., (t + 1) B - 1 of the order, where B is the global batch size.
  """

  examples: int  # number of examples per epoch
  read: Callable[[int, int, int], Batch]  # (seed, first, count) -> numpy [count, ...], pure


class Task(NamedTuple):
  """A model, its data and its objective: the mean of `loss` over all examples in `train`.

  `sample` is a cheap pure function of the step, the key and a worker's number of examples. It does
  not depend on the data, so an executor can draw the samples of many steps at once. `batch` fetches
  the sampled examples. Both functions handle the examples of one worker, arrays [examples, ...].

  A task that seeks a fixed point x = T(x) instead of a minimum defines `grads`. This function
  returns a value equal to `loss`, and x - T(x) instead of a gradient, so that `sgd(1.0)` iterates
  T. Neither `loss` nor T is differentiated. Like a gradient, x - T(x) is a mean over examples; it
  is aggregated, compressed and delayed in the same way. The metric "residual" is the L1 norm of
  x - T(x) over all examples.

  With a `feed`, the objective is the mean over the examples that the feed reads. In this case,
  `train` is a sample of these examples for measuring the loss, and `sample` is `sampling.in_order`.
  """

  init: Callable[[Key], Params]
  # mean over the batch, masked if there is a mask; or a pair (mean, Metrics)
  loss: Callable[[Params, Batch, Key], Any]
  evaluate: Callable[[Params, Batch], dict[str, Array]]  # metrics, each a mean over the batch
  sample: Callable[..., Tree]  # (size, step, key, *, batch_size) -> index [batch_size]
  batch: Callable[[Batch, Tree], Batch]  # (examples of one worker, index) -> batch
  train: Batch  # numpy arrays [examples, ...]; partitions sort by "y"
  test: Batch | None = None
  optimum: Params | None = None  # the exact minimizer, if it is known
  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # see `parallel/rules.py`
  dimensions: tuple[tuple[str, tuple[str, ...]], ...] = ()  # see `core/dimensions.py`
  chunk: int = 1024  # number of examples that a device evaluates at once
  # (stages, examples, fsdp) -> the pipeline schedule of a worker's batch: a NamedTuple with a
  # `bubble`, the fraction of time in which a stage is idle
  schedule: Callable[[int, int, int], Any] | None = None
  feed: Feed | None = None  # for training examples that do not fit in memory
  grads: Callable[[Params, Batch, Key], tuple[Array, Tree]] | None = None  # (value, x - T(x))
  project: Callable[[Params], Params] | None = None  # onto the convex set of feasible models
  # metrics of the model that are not means over examples, such as AUC, RMSE, recall@10
  measure: Callable[[Params], dict[str, Array]] = lambda params: {}
  by: Any = None  # numpy [examples] that partitions sort by, instead of "y"
  measured_on: str = ""  # the data that `measure` uses, such as "test"; "" if it uses none
  model: Callable[[Params], Any] | None = None  # the user's model with these parameters
  title: str = "own task"  # in titles and summaries of a run whose task is given as an object


def loss_and_metrics(task: Task) -> Callable[[Params, Batch, Key], tuple[Array, Metrics]]:
  """Returns the task's loss as a function (params, batch, key) -> (loss, auxiliary metrics).

  Args:
    task: the task; if its loss returns no metrics, the metrics are empty.

  Raises:
    ValueError: at trace time, if a metric is named 'loss'.
  """

  def both(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
    found = task.loss(params, batch, key)
    value, own = found if isinstance(found, tuple) else (found, {})
    if "loss" in own:
      raise ValueError("the loss returns an auxiliary metric 'loss'; give it another name")
    return value, own

  return both


def measured_and_grad(task: Task) -> Callable[[Params, Batch, Key], tuple[Any, Tree]]:
  """Returns the function (params, batch, key) -> ((loss, metrics), gradient) of a task.

  Args:
    task: the task; if it defines `grads`, that function is used instead, and the metrics are empty.
  """
  if task.grads is None:
    return jax.value_and_grad(loss_and_metrics(task), has_aux=True)
  grads = task.grads

  def both(params: Params, batch: Batch, key: Key) -> tuple[Any, Tree]:
    value, found = grads(params, batch, key)
    return (value, {}), found

  return both


def value_and_grad(task: Task) -> Callable[[Params, Batch, Key], tuple[Array, Tree]]:
  """Returns the function (params, batch, key) -> (loss, gradient) of a task.

  Args:
    task: the task; if it defines `grads`, that function is used instead.
  """
  differentiated = measured_and_grad(task)

  def both(params: Params, batch: Batch, key: Key) -> tuple[Array, Tree]:
    (value, _), grads = differentiated(params, batch, key)
    return value, grads

  return both


class Data(NamedTuple):
  """The training examples of each of the P owners (workers or clients), on devices.

  Like TrainState, this is a tree of arrays, of their shardings, or of `vmap` axes.
  """

  examples: Tree  # arrays [P, maximum examples of an owner, ...], padded with zeros
  sizes: Tree  # [P] int32, number of examples of each owner
  key: Tree  # a typed key for the sampling order


class TrainState(NamedTuple):
  """The state of a run that a checkpoint stores."""

  round: Tree  # int32, number of completed rounds; determines the position in the data
  key: Tree  # a typed key; all draws of a round are functions of (key, round, worker)
  method: State  # shared leaves once, private leaves with one row per worker or client


class Executor(NamedTuple):
  """Runs N workers; the training loop reaches them only through this interface."""

  init: Callable[[Key], TrainState]  # creates the state directly in its shardings
  place: Callable[..., Data]  # (examples [P, ...], sizes [P], key), from numpy to devices
  # (state, data, rounds): one dispatch; returns a TrainState, or what `settled` converts to one
  run: Callable[..., tuple[Any, dict[str, Array]]]
  params: Callable[[Any], Params]
  layout: Any  # which leaves of the state are private, a `parallel.layout.Layout`
  # the state as it is saved and compared, for executors whose rounds overlap
  settled: Callable[[Any], TrainState] = lambda state: state
  # (state, data) -> seconds per local step for the computation alone and for the exchange alone,
  # measured now on copies of the state; None if the two do not overlap
  alone: Callable[[Any, Data], tuple[float, float]] | None = None
