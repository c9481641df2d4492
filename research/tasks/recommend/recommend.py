"""Recommends films by matrix factorization or factorization machines, with any method."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.recommend import movielens as data
from research.tasks.recommend.movielens import LEAST, MOST, Ratings

CUT = 10  # cutoff of NDCG@10 and recall@10
LIKED = 4.0  # minimum number of stars of a relevant film
ROWS = 64  # table sizes are rounded up to a multiple of this, so that any mesh can shard them
KINDS = ("factors", "features", "both")


def movielens(
  split: str = "u1",
  factors: int = 10,
  l2: float = 0.12,
  model_of: str = "factors",
  scale: float = 0.1,
  *,
  data_dir: str = "",
) -> Task:
  """Predicts ratings from factors of users and items, from features, or from both.

      r_hat = mean + b_u + b_i + p_u'q_i                                            ("factors")
      r_hat = mean + sum_f c_f + sum over pairs f < g of v_f'v_g                    ("features")

  The indices f and g run over the features of the user and the features of the item: the second
  model is a factorization machine. "both" treats the user and the item as two more features, each
  with its own table. Features help with the cold start, because users and items without ratings
  still have features. The objective is the mean over ratings of half the squared error plus l2/2
  times the sum of squares of all parameters that the prediction of the rating uses.

  Tables are sharded by rows along the mesh axis `model`, and a lookup moves only the requested
  rows:

      --executor=spmd --mesh="data:4,model:2"

  The metrics are "rmse", "ndcg@10" and "recall@10". For "rmse", predictions are clipped to the
  range of stars. For the other two, the films that a user did not rate in training are ranked by
  their predicted ratings, and test films with four stars or more are relevant. These two metrics
  are means over the users that have a relevant film. For "cold_items", only the cold films are
  ranked.

  Args:
    split: "u1", "u2", "u3", "cold_items" or "cold_users"; see `movielens.load`.
    factors: the length of p, q and v, at least 1.
    l2: the weight of the penalty, >= 0.
    model_of: what the model predicts from: "factors", "features" or "both".
    scale: the standard deviation of the initial factors.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found.
    ValueError: if the split or `model_of` is unknown, or a number is out of range.

  Reference: Koren, Bell, Volinsky, 2009, Matrix factorization techniques for recommender systems;
    Rendle, 2010, Factorization machines, ICDM.
  """
  if model_of not in KINDS:
    raise ValueError(f"model_of={model_of!r} is none of {', '.join(KINDS)}")
  check(factors, l2)
  train, test = data.load(split, data_dir)
  nothing = [np.zeros((1 + n, 0), np.int32) for n in data.last(train, test)]
  features = data.Features(nothing[0], nothing[1], 0)
  if split in (*data.FOLDS, *data.COLD):
    features = data.features(data_dir)
  elif model_of != "factors":
    raise ValueError(f"model_of={model_of!r} needs features, and {split} has none: take 'factors'")
  users, items = len(features.users), len(features.items)
  rows = {"user": users, "item": items, "feature": features.size + 1}
  kept = {"factors": ("user", "item"), "features": ("feature",)}.get(model_of, tuple(rows))
  mean = float(train.stars.mean())

  def init(key: Key) -> Params:
    keys = dict(zip(rows, jax.random.split(key, len(rows)), strict=True))
    table = lambda name: scale * jax.random.normal(keys[name], (_rounded(rows[name]), factors))
    biases = {f"{name}_bias": jnp.zeros(_rounded(rows[name])) for name in kept}
    return biases | {name: table(name) for name in kept}

  def looked_up(params: Params, user: Array, item: Array) -> list[tuple[Array, Array, Array]]:
    """Returns the biases [b, f], the factors [b, f, k] and a mask of valid entries, per table."""
    own = {"user": user[:, None], "item": item[:, None]}
    both = jnp.concatenate(
      [jnp.asarray(features.users)[user], jnp.asarray(features.items)[item]], 1
    )
    own["feature"] = both
    there = {n: i < rows[n] - (n == "feature") for n, i in own.items()}
    return [
      (params[f"{n}_bias"][own[n]], params[n][own[n]], there[n].astype(params[n].dtype))
      for n in kept
    ]

  def predicted(params: Params, user: Array, item: Array) -> tuple[Array, Array]:
    """Returns the predicted stars, and the sums of squares in the penalty, both [b]."""
    biases, vectors, there = (
      jnp.concatenate(parts, 1) for parts in zip(*looked_up(params, user, item), strict=True)
    )
    biases, vectors = biases * there, vectors * there[..., None]
    pairs = (jnp.sum(vectors, 1) ** 2 - jnp.sum(vectors**2, 1)).sum(-1) / 2
    squares = jnp.sum(biases**2, 1) + jnp.sum(vectors**2, (1, 2))
    return mean + jnp.sum(biases, 1) + pairs, squares

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    stars, squares = predicted(params, batch["user"], batch["item"])
    return sampling.mean((stars - batch["y"]) ** 2 / 2 + l2 / 2 * squares, batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  def everything(params: Params) -> Array:
    user, item = jnp.arange(users), jnp.arange(items)
    one = lambda u: predicted(params, jnp.full(items, u), item)[0]
    return jax.lax.map(one, user, batch_size=64)

  task = Task(
    init,
    loss,
    evaluate,
    sampling.epoch_sample,
    sampling.take,
    _examples(train),
    _examples(test),
    rules=((r"_bias$", ("model",)), (r"", ("model", None))),
  )
  shown = np.unique(test.item) if split == "cold_items" else None
  measure = measured(everything, train, test, (users, items), shown)
  return task._replace(measure=measure, measured_on="test", chunk=8192)


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
  seen, liked = np.zeros(shape, bool), np.zeros(shape, bool)
  seen[train.user, train.item] = True
  if shown is not None:
    seen[:, np.setdiff1d(np.arange(shape[1]), shown)] = True
  good = test.stars >= LIKED
  liked[test.user[good], test.item[good]] = True
  if not (liked & ~seen).any():
    raise ValueError(f"no user gives {LIKED:g} stars to a test item: there is nothing to recommend")

  def measure(params: Params) -> dict[str, Array]:
    stars = predict(jax.tree.map(jnp.asarray, params))
    error = jnp.clip(stars[test.user, test.item], LEAST, MOST) - jnp.asarray(test.stars)
    return {"rmse": jnp.sqrt(jnp.mean(error**2))} | recommended(stars, seen, liked)

  return measure


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


def check(factors: int, l2: float) -> None:
  """Rejects invalid hyper-parameters.

  Args:
    factors: the number of factors.
    l2: the weight of the penalty.

  Raises:
    ValueError: if factors is below 1, or l2 is negative.
  """
  if factors < 1 or not l2 >= 0:
    raise ValueError(f"factors={factors}, l2={l2}: need factors >= 1 and l2 >= 0")


def _rounded(rows: int) -> int:
  return -(-rows // ROWS) * ROWS


def _examples(ratings: Ratings) -> Batch:
  return {"user": ratings.user, "item": ratings.item, "y": ratings.stars}
