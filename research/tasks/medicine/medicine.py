"""Builds tasks from medical records of scikit-learn, for hospitals with different patients."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Params
from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks.supervised import supervised

SHIFTS = ("label", "features")
HELD_OUT = 0.3  # share of the patients


def breast_cancer(
  shift: str = "label",
  l2: float = 0.01,
  hospitals: int = 0,
  only: int = 0,
  split: int = 0,
  *,
  model: Callable[[int], nn.Module] = Default("model", "logistic()"),
) -> Task:
  """Classifies tumours as malignant or benign, from 30 measurements of cell nuclei.

  The split into 398 training and 171 test patients is scikit-learn's stratified `train_test_split`.
  Measurements are standardized by their mean and deviation over the training patients. The metrics
  are "loss", "accuracy", and "auc", the probability that a malignant case has the higher score.

  With a partition such as `--partition="dirichlet(0.3)"`, `sorted()` or `shards(2)`, each worker is
  a hospital. The partition uses the labels that `shift` selects.

  Args:
    shift: how hospitals differ: "label" for the diagnosis, or "features" for the decile of the
      first principal component, which roughly measures the size of the nuclei.
    l2: the weight of the penalty l2/2 ||params||^2.
    hospitals: with `only`, the number of hospitals into which the training patients, sorted by
      `shift`, are divided.
    only: the number of the hospital that trains alone, from 1; 0 means that all train.
    split: the `random_state` of the split into training and test patients, >= 0.
    model: a function that makes the module for one output.

  Raises:
    ValueError: if shift is unknown, l2 or split is negative, or the hospital does not exist.

  Reference: Street, Wolberg, Mangasarian, 1993, Nuclear feature extraction for breast tumor
    diagnosis; UCI, as scikit-learn ships it.
  """
  from sklearn.datasets import load_breast_cancer

  x, y = load_breast_cancer(return_X_y=True)
  malignant = (np.asarray(y) == 0).astype(np.int32)
  train, test = _split(np.asarray(x), malignant, split, stratify=malignant)
  task = supervised(model(1), train, test, loss="logistic", l2=l2)
  predict = _predictions(model(1), test["x"])
  metric = lambda params: {"auc": auc(predict(params), jnp.asarray(test["y"]))}
  task = task._replace(measure=metric, measured_on="test")
  return _of_hospital(task, shift, train["y"], hospitals, only)


def diabetes(
  shift: str = "label",
  l2: float = 0.01,
  hospitals: int = 0,
  only: int = 0,
  split: int = 0,
  *,
  model: Callable[[int], nn.Module] = Default("model", "linear(bias=True)"),
) -> Task:
  """Predicts the progression of diabetes within a year, from 10 measurements.

  There are 309 training and 133 test patients. Measurements and progression are standardized by
  their mean and deviation over the training patients. The loss is half the squared error; the
  metric "rmse" is in the unit of the progression, which ranges from 25 to 346.

  Args:
    shift: how hospitals differ: "label" for the quintile of the progression, or "features" for the
      decile of the first principal component.
    l2: the weight of the penalty l2/2 ||params||^2.
    hospitals: with `only`, the number of hospitals; see `breast_cancer`.
    only: the number of the hospital that trains alone, from 1; 0 means that all train.
    split: the `random_state` of the split, >= 0; the split is not stratified.
    model: a function that makes the module for one output.

  Raises:
    ValueError: if shift is unknown, l2 or split is negative, or the hospital does not exist.

  Reference: Efron, Hastie, Johnstone, Tibshirani, 2004, Least angle regression; as scikit-learn
    ships it.
  """
  from sklearn.datasets import load_diabetes

  x, y = load_diabetes(return_X_y=True, scaled=False)
  train, test = _split(np.asarray(x), np.asarray(y, np.float32), split)
  center, spread = train["y"].mean(), train["y"].std()
  for part in (train, test):
    part["y"] = (part["y"] - center) / spread
  task = supervised(model(1), train, test, loss="squares", l2=l2)
  predict = _predictions(model(1), test["x"])
  error = lambda params: predict(params) - jnp.asarray(test["y"])
  metric = lambda params: {"rmse": float(spread) * jnp.sqrt(jnp.mean(error(params) ** 2))}
  task = task._replace(measure=metric, measured_on="test")
  return _of_hospital(task, shift, _quantiles(train["y"], 5), hospitals, only)


def auc(scores: Array, positive: Array) -> Array:
  """Computes the area under the ROC curve.

  The area is the probability that a positive example has a higher score than a negative one, where
  ties count as 1/2.

  Args:
    scores: the scores [n].
    positive: the labels [n], 1 for positive and 0 for negative examples; both must occur.

  Reference: Mann, Whitney, 1947; Hanley, McNeil, 1982.
  """
  ordered = jnp.sort(scores)
  below = jnp.searchsorted(ordered, scores, side="left")
  until = jnp.searchsorted(ordered, scores, side="right")
  rank = (below + until + 1).astype(scores.dtype) / 2  # ranks from 1; ties get their mean rank
  chosen = positive.astype(scores.dtype)
  count = jnp.sum(chosen)
  wins = jnp.sum(rank * chosen) - count * (count + 1) / 2
  return wins / (count * (len(scores) - count))


def _split(x: np.ndarray, y: np.ndarray, seed: int, stratify: Any = None) -> tuple[Batch, Batch]:
  from sklearn.model_selection import train_test_split

  if seed < 0:
    raise ValueError(f"split={seed} is negative")
  parts = train_test_split(x, y, test_size=HELD_OUT, stratify=stratify, random_state=seed)
  first = np.asarray(parts[0])
  center, spread = first.mean(0), first.std(0)
  scaled = [((part - center) / spread).astype(np.float32) for part in parts[:2]]
  return {"x": scaled[0], "y": parts[2]}, {"x": scaled[1], "y": parts[3]}


def _predictions(module: nn.Module, x: np.ndarray) -> Callable[[Params], Array]:
  def predict(params: Params) -> Array:
    found: Any = module.apply({"params": params}, jnp.asarray(x))
    return found[:, 0]

  return predict


def _quantiles(values: np.ndarray, count: int) -> np.ndarray:
  """Returns the quantile group of each value, int32, for `count` groups of equal size."""
  ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
  return (ranks * count // len(values)).astype(np.int32)


def _of_hospital(task: Task, shift: str, labels: np.ndarray, hospitals: int, only: int) -> Task:
  """Makes partitions use the labels of `shift`, or restricts the task to one hospital."""
  if shift not in SHIFTS:
    raise ValueError(f"shift={shift!r} is none of {', '.join(SHIFTS)}")
  by = labels
  if shift == "features":
    x = task.train["x"]
    by = _quantiles(x @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][0], 10)
  if not only:
    return task._replace(by=by)
  if not 1 <= only <= hospitals <= len(by):
    raise ValueError(f"only={only} is none of the hospitals 1 to {hospitals}")
  mine = np.array_split(np.argsort(by, kind="stable"), hospitals)[only - 1]
  train = {name: leaf[mine] for name, leaf in task.train.items()}
  return task._replace(train=train, by=by[mine])
