"""Measures the peers of film recommendation: the libraries Cornac and implicit, and popularity."""

# pyright: reportMissingImports=false
# Only the extra `applications` installs Cornac and implicit.
import time
from collections.abc import Sequence
from typing import Any

import numpy as np


def cornac(folds: Sequence[str], part: str = "test", **changed: Any) -> tuple[float, float] | None:
  """Measures the mean RMSE and the seconds per fit of Cornac's biased matrix factorization.

  Args:
    folds: the splits to average over.
    part: the part to measure on; see `movielens.load`.
    changed: hyper-parameters that replace those chosen on the validation part.
  """
  try:
    from cornac.data import Dataset
    from cornac.models import MF
  except ImportError:
    return None
  from research.tasks.recommend import movielens

  errors, seconds = [], []
  given = {"k": 10, "max_iter": 100, "learning_rate": 0.005, "lambda_reg": 0.08} | changed
  for fold in folds:
    train, test = movielens.load(fold, part=part)
    columns = (column.tolist() for column in train)
    data = Dataset.build(list(zip(*columns, strict=True)))
    model = MF(use_bias=True, seed=0, **given)
    start = time.perf_counter()
    model.fit(data)
    seconds.append(time.perf_counter() - start)
    # users and items without training ratings have no bias and no factors
    pad = lambda table: np.concatenate([table, np.zeros((1, *table.shape[1:]), table.dtype)])
    user = np.array([data.uid_map.get(u, -1) for u in test.user.tolist()])
    item = np.array([data.iid_map.get(i, -1) for i in test.item.tolist()])
    p, q = pad(model.u_factors)[user], pad(model.i_factors)[item]
    stars = model.global_mean + pad(model.u_biases)[user] + pad(model.i_biases)[item]
    stars = np.clip(stars + np.sum(p * q, 1), movielens.LEAST, movielens.MOST)
    errors.append(float(np.sqrt(np.mean((stars - test.stars) ** 2))))
  return float(np.mean(errors)), float(np.mean(seconds))


def implicit_als(
  folds: Sequence[str], part: str = "test", *, l2: float = 20.0, alpha: float = 2.0
) -> dict[str, float] | None:
  """Measures the ranking of the library implicit's ALS, with the objective of `movielens_implicit`.

  Args:
    folds: the splits to average over.
    part: the part to measure on.
    l2: the ridge penalty.
    alpha: the additional confidence of a positive.
  """
  try:
    from implicit.als import AlternatingLeastSquares
  except ImportError:
    return None
  options: dict[str, Any] = {"factors": 32, "regularization": l2, "alpha": 1.0, "iterations": 15}
  options |= {"use_cg": False, "num_threads": 1, "random_state": 0}
  return _ranked(lambda: AlternatingLeastSquares(**options), folds, part, 1 + alpha)


def implicit_bpr(
  folds: Sequence[str], part: str = "test", **changed: Any
) -> dict[str, float] | None:
  """Measures the ranking of the library implicit's Bayesian personalized ranking.

  Args:
    folds: the splits to average over.
    part: the part to measure on.
    changed: hyper-parameters that replace those chosen on the validation part.
  """
  try:
    from implicit.bpr import BayesianPersonalizedRanking
  except ImportError:
    return None
  options: dict[str, Any] = {"factors": 32, "num_threads": 1, "random_state": 0}
  options |= {"learning_rate": 0.005, "regularization": 0.01, "iterations": 100} | changed
  return _ranked(lambda: BayesianPersonalizedRanking(**options), folds, part, 1.0)


def popular(folds: Sequence[str], part: str = "test") -> dict[str, float]:
  """Measures the ranking of films by how many users like them.

  Args:
    folds: the splits to average over.
    part: the part to measure on.
  """
  found = []
  for fold in folds:
    train, test, likes, shape = _loaded(fold, part)
    count = np.bincount(likes.item, minlength=shape[1]).astype(np.float32)
    found.append(_of(np.tile(count, (shape[0], 1)), train, test, shape))
  return _means(found)


def _ranked(build: Any, folds: Sequence[str], part: str, confidence: float) -> dict[str, float]:
  from scipy import sparse

  found = []
  for fold in folds:
    train, test, likes, shape = _loaded(fold, part)
    values = np.full(len(likes.user), confidence, np.float32)
    model = build()
    model.fit(sparse.csr_matrix((values, (likes.user, likes.item)), shape), show_progress=False)
    found.append(_of(model.user_factors @ model.item_factors.T, train, test, shape))
  return _means(found)


def _loaded(fold: str, part: str) -> tuple[Any, Any, Any, tuple[int, int]]:
  """Loads training and measured ratings, the training ratings that are positives, and (U, I)."""
  from research.tasks.recommend import measures, movielens

  train, test = movielens.load(fold, part=part)
  user, item = movielens.last(train, test)
  return train, test, movielens.liked(train, measures.LIKED), (user + 1, item + 1)


def _of(scores: np.ndarray, train: Any, test: Any, shape: tuple[int, int]) -> dict[str, float]:
  import jax.numpy as jnp

  from research.tasks.recommend import measures

  found = measures.ranked(train, test, shape)(jnp.asarray(scores))
  return {name: float(value) for name, value in found.items()}


def _means(found: list[dict[str, float]]) -> dict[str, float]:
  return {name: float(np.mean([one[name] for one in found])) for name in found[0]}
