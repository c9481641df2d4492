"""Computes the exact curvature and optima of convex problems, in float64 with numpy."""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from research.core import checks


class Optimum(NamedTuple):
  """The minimizer and the minimum of an objective."""

  at: np.ndarray  # float64 [features]
  value: float


def curvature(x: np.ndarray) -> np.ndarray:
  """Computes the eigenvalues of x'x/N, the Hessian of (1/2N) ||x w - y||^2, in ascending order.

  A quarter of the largest eigenvalue is the smoothness of the mean logistic loss.

  Args:
    x: the features of the examples, [N, features].
  """
  x = np.asarray(x, np.float64)
  return np.linalg.eigvalsh(x.T @ x / len(x))


def optimum_of_logistic(x: np.ndarray, y: np.ndarray, l2: float) -> Optimum:
  """Minimizes 1/N sum_i log(1 + exp(x_i w)) - y_i x_i w + l2/2 ||w||^2 by Newton's method.

  Args:
    x: the features of the examples, [N, features].
    y: the labels 0 or 1, [N].
    l2: a positive number, so that the minimum is unique.

  Raises:
    ValueError: if l2 is not above 0.
  """
  checks.above("l2", l2)
  rows, y = sparse.csr_array(x, dtype=np.float64), np.asarray(y, np.float64)
  value = lambda w: float(np.mean(np.logaddexp(0, rows @ w) - y * (rows @ w)) + l2 / 2 * w @ w)
  w, whole_steps = np.zeros(x.shape[1]), 0
  while whole_steps < 3:
    p = (1 + np.tanh(rows @ w / 2)) / 2
    gradient = rows.T @ (p - y) / len(y) + l2 * w
    weighted = rows.multiply((p * (1 - p) / len(y))[:, None])
    hessian = (rows.T @ weighted).toarray() + l2 * np.eye(len(w))
    step = np.linalg.solve(hessian, gradient)
    size, decrement = 1.0, gradient @ step
    if decrement < 1e-10:  # a further step squares the decrement, below the resolution of values
      whole_steps += 1
    else:
      while value(w - size * step) > value(w) - size * decrement / 4:
        size /= 2
    w = w - size * step
  return Optimum(w, value(w))


class Split(NamedTuple):
  """An l2-logistic problem whose examples are partitioned over workers, sorted by label."""

  l2: float
  optimum: np.ndarray  # float64 [features]
  smoothness: float  # L, the smoothness of the full objective
  parts: np.ndarray  # L_i, the smoothness of each worker's objective

  def distance(self, models: np.ndarray) -> float:
    """Computes the mean of ||x - x*||^2 / ||x*||^2 over models [W, features]."""
    apart = np.sum((models - self.optimum) ** 2, 1)
    return float(np.mean(apart) / (self.optimum @ self.optimum))


def split_logistic(x: np.ndarray, y: np.ndarray, workers: int, ratio: float) -> Split:
  """Partitions a logistic problem over workers; l2 is the loss's smoothness divided by `ratio`.

  Args:
    x: the features of the examples, [N, features].
    y: the labels 0 or 1, [N].
    workers: the number of parts.
    ratio: the ratio of the loss's smoothness to l2.
  """
  smoothness = lambda rows: float(curvature(rows)[-1]) / 4
  l2 = smoothness(x) / ratio
  parts = np.array_split(x[np.argsort(y, kind="stable")], workers)
  each = np.array([smoothness(part) + l2 for part in parts])
  return Split(l2, optimum_of_logistic(x, y, l2).at, smoothness(x) + l2, each)


def optimum_of_squares(x: np.ndarray, y: np.ndarray, l2: float) -> Optimum:
  """Minimizes (1/2N) ||x w - y||^2 + l2/2 ||w||^2, which is ridge regression.

  Args:
    x: the features of the examples, [N, features].
    y: the targets, [N].
    l2: a positive number, so that the minimum is unique.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  w = np.linalg.solve(x.T @ x / len(x) + l2 * np.eye(x.shape[1]), x.T @ y / len(x))
  return Optimum(w, float(np.mean((x @ w - y) ** 2) / 2 + l2 / 2 * w @ w))
