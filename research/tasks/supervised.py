"""Builds a supervised learning task from a model, examples and a loss."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core import checks
from research.core.base import Array, Key, Params
from research.core.dimensions import checked
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.networks import network

# (outputs [batch, ...], batch) -> one value per example [batch]
OfExamples = Callable[[Any, Batch], Any]


def supervised(
  model: Any,
  train: Batch,
  test: Batch | None = None,
  *,
  loss: str | OfExamples = "softmax",
  metrics: Mapping[str, OfExamples] | None = None,
  l2: float = 0.0,
  nonconvex: float = 0.0,
  optimum: Params | None = None,
  scale: float = 255.0,
  features: int = 0,
) -> Task:
  """Returns the task of minimizing the mean loss of a model over `train`.

  The objective is 1/N sum_i loss_i(w) + l2/2 ||w||^2 + nonconvex sum_j w_j^2 / (1 + w_j^2), where w
  contains all parameters, including biases. The mean over a batch includes only the examples that
  its mask keeps. The loss of each batch includes the full penalty, so that the mean over batches,
  weighted by their numbers of examples, is the objective.

  `evaluate` returns "loss", the objective including the penalty; "accuracy" for classes; the given
  metrics; and, if the optimum is known, "distance", max|params - optimum| / max|optimum|.

  Bytes (uint8) remain bytes in memory and in batches, so that an image takes one byte per pixel.
  They are converted to floats and divided by `scale` only when the model reads them. Other
  integers, such as tokens, are passed to the model unchanged.

  Args:
    model: a Flax linen or Flax NNX module that maps x [batch, ...] to outputs [batch, ...], an
      Equinox module of a single example, or a function that makes an NNX or Equinox module from a
      key; see `networks.network`. Dropout draws from the key of the loss and is off in `evaluate`.
      The `dimensions` of the model, if any, become those of the task (`core/dimensions.py`).
    train: the training examples, as numpy arrays: "x" [N, ...], or sparse rows as
      `models.classic.Linear` accepts them; "y" [N, ...], which may be missing if the loss and the
      metrics are your own; and other arrays of any name.
    test: the same arrays for the test examples.
    loss: "softmax", the cross-entropy in nats, with y int [N] in [0, outputs); "logistic", the same
      for y in {0, 1} and one output; "squares", half of the squared error summed over outputs, with
      y float [N] or [N, outputs]; or a function (outputs, batch) -> losses [batch]. The function
      may also return (losses, further metrics by name, each [batch]); these metrics are added to
      the rows as "auxiliary".
    metrics: the further metrics by name, each a function like `loss`.
    l2: the weight of the quadratic penalty, >= 0.
    nonconvex: the weight of the bounded penalty, >= 0, which is the regularizer of nonconvex
      logistic regression.
    optimum: the exact minimizer of the objective, if it is known.
    scale: the number by which bytes are divided.
    features: the number of features, which is required for sparse rows.

  Returns:
    The task.

  Raises:
    ValueError: if the kind of model or the loss is unknown; l2 is negative; or examples, labels,
      outputs and model do not match.
  """
  for name, weight in (("l2", l2), ("nonconvex", nonconvex)):
    if not weight >= 0:
      raise ValueError(f"{name}={weight} is negative")
  for name in ("loss", "distance"):
    if name in (metrics or ()):
      raise ValueError(f"metrics: '{name}' is the name of a metric of every task; use another name")
  error = loss if callable(loss) else _of_labels(loss)
  own = {**metrics} if metrics else {}
  if loss in ("softmax", "logistic"):
    own = {"accuracy": lambda outputs, batch: _correct(outputs, batch["y"])} | own
  for part, examples in (("train", train), ("test", test)):
    if examples is not None:
      _check_arrays(part, examples)
  if test is not None:
    _check_alike(train, test)
  title, init_, apply, bound = network(model)
  first = jax.tree.map(lambda a: a[:1], train["x"])
  example = np.zeros((1, features), np.float32) if features else first

  def init(key: Key) -> Params:
    return init_(key, _floats(example, scale))

  def predict(params: Params, x: Any, key: Key | None = None) -> Any:
    return apply(params, _floats(x, scale), key)

  def objective(params: Params, outputs: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
    found = error(outputs, batch)
    each, own = found if isinstance(found, tuple) else (found, {})
    if "loss" in own:
      raise ValueError("a metric that a loss returns beside itself cannot have the name 'loss'")
    value = sampling.mean(each, batch)
    leaves = jax.tree.leaves(params)
    if l2 > 0:
      value += l2 / 2 * sum(jnp.vdot(p, p) for p in leaves)
    if nonconvex > 0:
      value += nonconvex * sum(jnp.sum(p * p / (1 + p * p)) for p in leaves)
    return value, {name: sampling.mean(x, batch) for name, x in own.items()}

  def batch_loss(params: Params, batch: Batch, key: Key) -> Any:
    value, own = objective(params, predict(params, batch["x"], key), batch)
    return (value, own) if own else value

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    outputs = predict(params, batch["x"])
    value, own_of_loss = objective(params, outputs, batch)
    found = {"loss": value, **own_of_loss}
    found |= {name: sampling.mean(of(outputs, batch), batch) for name, of in own.items()}
    if optimum is not None:
      found["distance"] = _distance(params, optimum)
    return found

  outputs = jax.eval_shape(lambda x: predict(init(jax.random.key(0)), x), first)
  if not callable(loss) and getattr(outputs, "ndim", 0) < 2:
    shape = getattr(outputs, "shape", None)
    raise ValueError(f"the model's outputs are of shape {shape}, not [batch, outputs]")
  for examples in (train, test):
    if examples is not None and not callable(loss):
      _check(examples, loss, outputs.shape[1])
  for name, of in {"loss": error, **own}.items():
    _check_values(name, of, outputs, jax.tree.map(lambda a: a[:1], train))
  task = Task(
    init, batch_loss, evaluate, sampling.epoch_sample, sampling.take, train, test, optimum
  )
  declared = getattr(model, "dimensions", ())
  return task._replace(model=bound, title=title, dimensions=checked(declared))


def _of_labels(loss: str) -> OfExamples:
  """Returns the loss with the given name."""
  if loss not in LOSSES:
    near = checks.nearest(loss, LOSSES, cutoff=0.0)
    raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}; did you mean {near}?")
  return lambda outputs, batch: LOSSES[loss](outputs, batch["y"])


def _softmax(logits: Array, y: Array) -> Array:
  chosen = jnp.sum(logits * jax.nn.one_hot(y, logits.shape[1], dtype=logits.dtype), axis=1)
  return jax.nn.logsumexp(logits, axis=1) - chosen


def _logistic(logits: Array, y: Array) -> Array:
  return jax.nn.softplus(logits[:, 0]) - y.astype(logits.dtype) * logits[:, 0]


def _squares(predictions: Array, y: Array) -> Array:
  residual = predictions - y.reshape(predictions.shape)
  return jnp.sum(residual**2, axis=1) / 2


# (outputs of the module [batch, outputs], labels) -> losses [batch]
LOSSES: dict[str, Callable[[Array, Array], Array]] = {
  "softmax": _softmax,
  "logistic": _logistic,
  "squares": _squares,
}


def _correct(logits: Array, y: Array) -> Array:
  predicted = logits[:, 0] > 0 if logits.shape[1] == 1 else jnp.argmax(logits, axis=1)
  return (predicted.astype(y.dtype) == y).astype(logits.dtype)


def _floats(x: Any, scale: float) -> Any:
  if isinstance(x, dict) or x.dtype != jnp.uint8:
    return x
  return x.astype(jnp.float32) / scale


def _distance(params: Params, optimum: Params) -> Array:
  def largest(tree: Params) -> Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))

  difference = jax.tree.map(lambda p, o: p - jnp.asarray(o, p.dtype), params, optimum)
  return largest(difference) / largest(optimum)


def _check_alike(train: Batch, test: Batch) -> None:
  """Rejects test examples whose arrays differ in name or shape from the training arrays.

  Sparse rows may differ in length.

  Raises:
    ValueError: if an array is missing or its shape differs; the message names the array.
  """
  shapes = lambda batch: {
    f"[{name!r}]": None if isinstance(x, dict) else x.shape[1:] for name, x in batch.items()
  }
  both = wanted, found = shapes(train), shapes(test)
  for name in sorted({*wanted} | {*found}):
    of = [f"[N, {', '.join(map(str, s[name] or '...'))}]" if name in s else "none" for s in both]
    if of[0] != of[1]:
      raise ValueError(f"test{name} is {of[1]}, and train{name} is {of[0]}")


def _check_arrays(part: str, examples: Batch) -> None:
  """Rejects examples that are not arrays of equal length."""
  if not isinstance(examples, Mapping) or "x" not in examples:
    raise ValueError(f'{part}: not a dictionary with arrays "x" [N, ...], and "y" for labels')
  if "mask" in examples:
    raise ValueError(f'{part}["mask"]: the name is reserved for a mask; use another name')
  for name, array in examples.items():
    for leaf in jax.tree.leaves(array):
      if not isinstance(leaf, np.ndarray):
        raise ValueError(f'{part}["{name}"] is a {type(leaf).__name__}, and no numpy array')
      if leaf.ndim == 0 or leaf.dtype == object:
        raise ValueError(f'{part}["{name}"] is not an array of examples: {leaf.dtype} {leaf.shape}')
  counts = sorted({len(leaf) for leaf in jax.tree.leaves(examples)})
  if len(counts) != 1 or counts == [0]:
    raise ValueError(f"the arrays of examples have lengths {counts}; they need one, and examples")


def _check_values(name: str, of: OfExamples, outputs: Any, batch: Batch) -> None:
  found = jax.eval_shape(of, outputs, batch)
  values, further = found if isinstance(found, tuple) else (found, {})
  for own, value in {name: values, **further}.items():
    if getattr(value, "shape", None) != (1,):
      shape = getattr(value, "shape", type(value).__name__)
      raise ValueError(f"{own}: gives {shape} for one example; it gives a value of each, [batch]")


def _check(examples: Batch, loss: str, outputs: int) -> None:
  if "y" not in examples:
    raise ValueError(f'the {loss} loss needs labels "y"; without them give a function as loss=')
  y = examples["y"]
  if loss == "squares":
    if y[0].size != outputs:
      raise ValueError(f"labels have {y[0].size} entries each, and the model {outputs} outputs")
    return
  classes = max(outputs, 2) if loss == "softmax" else 2
  if (outputs == 1) != (loss == "logistic"):
    raise ValueError(f"the {loss} loss does not go with a model of {outputs} outputs")
  if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
    raise ValueError(f"labels from {y.min()} to {y.max()} are not integers in [0, {classes})")
