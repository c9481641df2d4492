"""Measures the predictions of all ratings: RMSE, and how a user's liked films are ranked."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Params
from research.tasks.recommend.movielens import LEAST, MOST, Ratings

CUT = 10  # cutoff of NDCG@10 and recall@10
LIKED = 4.0  # minimum number of stars of a relevant film


def measured(
  predict: Callable[[Params], Array],
  train: Ratings,
  test: Ratings,
  shape: tuple[int, int],
  shown: np.ndarray | None = None,
) -> Callable[[Params], dict[str, Array]]:
  """Returns a task's function `measure`, which computes RMSE, NDCG@10 and recall@10.

  Args:
    predict: a function from parameters to the predictions of all ratings [U, I].
    train: the training ratings; a user's training items are not ranked for this user.
    test: the ratings to predict.
    shape: the numbers of users and items, (U, I).
    shown: the items that are ranked; None means all items.
  """
  rank = ranked(train, test, shape, shown)

  def measure(params: Params) -> dict[str, Array]:
    stars = predict(jax.tree.map(jnp.asarray, params))
    error = jnp.clip(stars[test.user, test.item], LEAST, MOST) - jnp.asarray(test.stars)
    return {"rmse": jnp.sqrt(jnp.mean(error**2))} | rank(stars)

  return measure


def ranked(
  train: Ratings, test: Ratings, shape: tuple[int, int], shown: np.ndarray | None = None
) -> Callable[[Array], dict[str, Array]]:
  """Returns the function from scores [U, I] to NDCG@10 and recall@10 of the films that users like.

  Args:
    train: the training ratings; a user's training items are not ranked for this user.
    test: the held-out ratings; those of four stars or more are relevant.
    shape: the numbers of users and items, (U, I).
    shown: the items that are ranked; None means all items.

  Raises:
    ValueError: if no test rating is relevant.
  """
  seen, liked = np.zeros(shape, bool), np.zeros(shape, bool)
  seen[train.user, train.item] = True
  if shown is not None:
    seen[:, np.setdiff1d(np.arange(shape[1]), shown)] = True
  good = test.stars >= LIKED
  liked[test.user[good], test.item[good]] = True
  if not (liked & ~seen).any():
    raise ValueError(f"no user gives {LIKED:g} stars to a test item: there is nothing to recommend")
  return lambda scores: recommended(scores, seen, liked)


def recommended(
  scores: Array, seen: np.ndarray, liked: np.ndarray, cut: int = CUT
) -> dict[str, Array]:
  """Computes NDCG@k with gains 0 or 1, and recall@k, the fraction of relevant items in the top k.

  Args:
    scores: the scores [U, I].
    seen: a mask [U, I], True for items that are not ranked for a user.
    liked: a mask [U, I], True for relevant items; users without relevant items do not count.
    cut: k, the number of top items.
  """
  cut = min(cut, scores.shape[1])
  hits = liked & ~seen
  first = jax.lax.top_k(jnp.where(seen, -jnp.inf, scores), cut)[1]
  hit = jnp.take_along_axis(jnp.asarray(hits), first, 1).astype(scores.dtype)
  discount = 1 / jnp.log2(jnp.arange(2, cut + 2).astype(scores.dtype))
  count = hits.sum(1)
  best = jnp.cumsum(discount)[np.clip(count, 1, cut) - 1]
  users = (count > 0).astype(scores.dtype)
  mean = lambda values: jnp.sum(users * values) / jnp.sum(users)
  return {
    f"ndcg@{cut}": mean(hit @ discount / best),
    f"recall@{cut}": mean(jnp.sum(hit, 1) / np.maximum(count, 1).astype(scores.dtype)),
  }
