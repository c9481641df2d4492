"""Supervised learning: a task from a flax module, labelled examples and a loss."""

import difflib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling


def supervised(
  module: nn.Module,
  train: Batch,
  test: Batch | None = None,
  *,
  loss: str = "softmax",
  l2: float = 0.0,
  nonconvex: float = 0.0,
  optimum: Params | None = None,
  scale: float = 255.0,
  features: int = 0,
) -> Task:
  """The task of minimising the mean loss of `module` over `train`.

  The objective is 1/N sum_i loss_i(w) + l2/2 ||w||^2 + nonconvex sum_j w_j^2 / (1 + w_j^2), where w
  are all parameters, biases included. A batch's mean counts the examples that its mask keeps; the
  penalty is always whole, so that means over batches, weighted by their counts, average to the
  objective.

  `evaluate` gives "loss", the objective with its penalty; "accuracy", but for squares; and
  "distance", max|params - optimum| / max|optimum|, where the optimum is known.

  Integer inputs stay as they are in memory, batches included, and become floats, divided by
  `scale`, only as the module reads them: images take one byte per pixel.

  Args:
    module: from x [batch, ...] to [batch, outputs].
    train: numpy arrays "x" [N, ...], or sparse rows as `models.classic.Linear` takes them, and "y".
    test: the same, of other examples.
    loss: "softmax", cross-entropy in nats, y int [N] in [0, outputs); "logistic", the same for
      y in {0, 1} and one output; or "squares", half of the squared error summed over outputs,
      y float [N] or [N, outputs].
    l2: weight of the quadratic penalty, >= 0.
    nonconvex: weight of the bounded one, >= 0, the regularizer of nonconvex logistic regression.
    optimum: the exact minimiser over `train`.
    scale: divides integer inputs.
    features: of sparse rows, which do not say it themselves.

  Raises:
    ValueError: the loss is unknown; l2 is negative; examples, labels, outputs or model do not fit.
  """
  if loss not in LOSSES:
    near = difflib.get_close_matches(loss, LOSSES, 1, 0.0)[0]
    raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}; did you mean {near}?")
  for name, weight in (("l2", l2), ("nonconvex", nonconvex)):
    if not weight >= 0:
      raise ValueError(f"{name}={weight} is negative")
  error = LOSSES[loss]
  first = jax.tree.map(lambda a: a[:1], train["x"])
  example = np.zeros((1, features), np.float32) if features else first

  def init(key: Key) -> Params:
    return module.init(key, _floats(example, scale))["params"]

  def predict(params: Params, x: Any) -> Array:
    return module.apply({"params": params}, _floats(x, scale))  # pyright: ignore[reportReturnType]

  def objective(params: Params, logits: Array, batch: Batch) -> Array:
    value = sampling.mean(error(logits, batch["y"]), batch)
    leaves = jax.tree.leaves(params)
    if l2 > 0:
      value += l2 / 2 * sum(jnp.vdot(p, p) for p in leaves)
    if nonconvex > 0:
      value += nonconvex * sum(jnp.sum(p * p / (1 + p * p)) for p in leaves)
    return value

  def batch_loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    return objective(params, predict(params, batch["x"]), batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    logits = predict(params, batch["x"])
    metrics = {"loss": objective(params, logits, batch)}
    if loss != "squares":
      metrics["accuracy"] = sampling.mean(_correct(logits, batch["y"]), batch)
    if optimum is not None:
      metrics["distance"] = _distance(params, optimum)
    return metrics

  outputs = jax.eval_shape(lambda: predict(init(jax.random.key(0)), first)).shape[1]
  for examples in (train, test):
    if examples is not None:
      _check(examples, loss, outputs)
  return Task(
    init, batch_loss, evaluate, sampling.epoch_sample, sampling.take, train, test, optimum
  )


def _softmax(logits: Array, y: Array) -> Array:
  chosen = jnp.sum(logits * jax.nn.one_hot(y, logits.shape[1], dtype=logits.dtype), axis=1)
  return jax.nn.logsumexp(logits, axis=1) - chosen


def _logistic(logits: Array, y: Array) -> Array:
  return jax.nn.softplus(logits[:, 0]) - y.astype(logits.dtype) * logits[:, 0]


def _squares(predictions: Array, y: Array) -> Array:
  residual = predictions - y.reshape(predictions.shape)
  return jnp.sum(residual**2, axis=1) / 2


# (outputs of the module [batch, outputs], labels) -> loss of each example [batch]
LOSSES: dict[str, Callable[[Array, Array], Array]] = {
  "softmax": _softmax,
  "logistic": _logistic,
  "squares": _squares,
}


def _correct(logits: Array, y: Array) -> Array:
  predicted = logits[:, 0] > 0 if logits.shape[1] == 1 else jnp.argmax(logits, axis=1)
  return (predicted.astype(y.dtype) == y).astype(logits.dtype)


def _floats(x: Any, scale: float) -> Any:
  if isinstance(x, dict) or not jnp.issubdtype(x.dtype, jnp.integer):
    return x
  return x.astype(jnp.float32) / scale


def _distance(params: Params, optimum: Params) -> Array:
  def largest(tree: Params) -> Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))

  difference = jax.tree.map(lambda p, o: p - jnp.asarray(o, p.dtype), params, optimum)
  return largest(difference) / largest(optimum)


def _check(examples: Batch, loss: str, outputs: int) -> None:
  y = examples["y"]
  counts = sorted({len(leaf) for leaf in jax.tree.leaves(examples)})
  if len(counts) != 1 or counts == [0]:
    raise ValueError(f"the arrays of examples have lengths {counts}; they need one, and examples")
  if loss == "squares":
    if y[0].size != outputs:
      raise ValueError(f"labels have {y[0].size} entries each, and the model {outputs} outputs")
    return
  classes = max(outputs, 2) if loss == "softmax" else 2
  if (outputs == 1) != (loss == "logistic"):
    raise ValueError(f"the {loss} loss does not go with a model of {outputs} outputs")
  if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
    raise ValueError(f"labels from {y.min()} to {y.max()} are not integers in [0, {classes})")
