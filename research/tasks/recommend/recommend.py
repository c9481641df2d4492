"""Recommends films by matrix factorization or factorization machines, with any method."""

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.recommend import movielens as data
from research.tasks.recommend.measures import measured
from research.tasks.recommend.movielens import Ratings

KINDS = ("factors", "features", "both")


def movielens(
  split: str = "u1",
  factors: int = 10,
  l2: float = 0.12,
  model_of: str = "factors",
  scale: float = 0.1,
  power: float = 1.0,
  bias: float = 1.0,
  part: str = "test",
  *,
  data_dir: str = "",
) -> Task:
  """Predicts ratings from factors of users and items, from features, or from both.

      r_hat = mean + b_u + b_i + p_u'q_i                                            ("factors")
      r_hat = mean + sum_f c_f + sum over pairs f < g of v_f'v_g                    ("features")

  The indices f and g run over the features of the user and the features of the item: the second
  model is a factorization machine. "both" treats the user and the item as two more features, each
  with its own table. Features help with the cold start, because users and items without ratings
  still have features. The objective is the sum over ratings of half the squared error, plus

      l2/2 sum_e n_e^power (|v_e|^2 + bias c_e^2)

  over users, items and features e, divided by the number of ratings; n_e is the number of ratings
  that use e. With the default power of 1, the penalty of a rating contains all parameters that its
  prediction uses. With a power of 0, it is plain ridge regression, with an l2 of about 10.

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
    power: how the penalty grows with the number of ratings, from 0 to 1.
    bias: the penalty of a bias relative to that of a factor, >= 0.
    part: the ratings to measure on, "test" or "validation"; see `movielens.load`.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found.
    ValueError: if the split, `model_of` or the part is unknown, or a number is out of range.

  Reference: Koren, Bell, Volinsky, 2009, Matrix factorization techniques for recommender systems;
    Rendle, 2010, Factorization machines, ICDM.
  """
  if model_of not in KINDS:
    raise ValueError(f"model_of={model_of!r} is none of {', '.join(KINDS)}")
  check(factors, l2, power, bias)
  train, test = data.load(split, data_dir, part)
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
  weights = {name: np.ones(rows[name], np.float32) for name in kept}
  if power != 1:
    used = {"user": train.user, "item": train.item}
    used["feature"] = np.concatenate(
      [features.users[train.user].ravel(), features.items[train.item].ravel()]
    )
    weights = {n: per_rating(np.bincount(used[n], minlength=rows[n]), power) for n in kept}

  def init(key: Key) -> Params:
    keys = dict(zip(rows, jax.random.split(key, len(rows)), strict=True))
    table = lambda name: scale * jax.random.normal(keys[name], (data.rounded(rows[name]), factors))
    biases = {f"{name}_bias": jnp.zeros(data.rounded(rows[name])) for name in kept}
    return biases | {name: table(name) for name in kept}

  def looked_up(params: Params, user: Array, item: Array) -> list[tuple[Array, ...]]:
    """Returns biases [b, f], factors [b, f, k], a mask and penalty weights [b, f], per table."""
    own = {"user": user[:, None], "item": item[:, None]}
    both = jnp.concatenate(
      [jnp.asarray(features.users)[user], jnp.asarray(features.items)[item]], 1
    )
    own["feature"] = both
    there = {n: i < rows[n] - (n == "feature") for n, i in own.items()}
    return [
      (
        params[f"{n}_bias"][own[n]],
        params[n][own[n]],
        there[n].astype(params[n].dtype),
        jnp.asarray(weights[n], params[n].dtype)[own[n]],
      )
      for n in kept
    ]

  def predicted(params: Params, user: Array, item: Array) -> tuple[Array, Array]:
    """Returns the predicted stars, and the sums of squares in the penalty, both [b]."""
    biases, vectors, there, weight = (
      jnp.concatenate(parts, 1) for parts in zip(*looked_up(params, user, item), strict=True)
    )
    biases, vectors = biases * there, vectors * there[..., None]
    pairs = (jnp.sum(vectors, 1) ** 2 - jnp.sum(vectors**2, 1)).sum(-1) / 2
    squares = jnp.sum(weight * (bias * biases**2 + jnp.sum(vectors**2, 2)), 1)
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


def per_rating(count: np.ndarray, power: float) -> np.ndarray:
  """Returns n^(power - 1): the weights in every rating's penalty which add up to n^power.

  Args:
    count: the number n of ratings of each entity; 0 counts as 1.
    power: the power.
  """
  return np.maximum(count, 1).astype(np.float32) ** (power - 1)


def check(factors: int, l2: float, power: float = 1.0, bias: float = 1.0) -> None:
  """Rejects invalid hyper-parameters.

  Args:
    factors: the number of factors.
    l2: the weight of the penalty.
    power: the power of an entity's number of ratings in its penalty.
    bias: the penalty of a bias relative to that of a factor.

  Raises:
    ValueError: if factors is below 1, l2 or bias is negative, or power is not in [0, 1].
  """
  if factors < 1 or not l2 >= 0:
    raise ValueError(f"factors={factors}, l2={l2}: need factors >= 1 and l2 >= 0")
  if not 0 <= power <= 1 or not bias >= 0:
    raise ValueError(f"power={power}, bias={bias}: need power from 0 to 1 and bias >= 0")


def _examples(ratings: Ratings) -> Batch:
  return {"user": ratings.user, "item": ratings.item, "y": ratings.stars}
