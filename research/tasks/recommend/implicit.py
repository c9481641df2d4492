"""Ranks films from the films that users have liked, by weighted factorization with exact solves.

Film i is a positive of user u who has given it at least `least` stars. With preference p_ui = 1 for
a positive and 0 otherwise, and confidence c_ui = 1 + alpha p_ui, the objective contains all pairs:

    sum over u, i of c_ui (p_ui - x_u'y_i)^2 + l2 (sum_u |x_u|^2 + sum_i |y_i|^2)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core import checks
from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.recommend import movielens as data
from research.tasks.recommend.als import eliminated, rows_of
from research.tasks.recommend.measures import ranked

AT_ONCE = 128  # entities that are solved at once; a bound on memory


def movielens_implicit(
  split: str = "u1",
  factors: int = 32,
  l2: float = 20.0,
  alpha: float = 2.0,
  least: float = 4.0,
  part: str = "test",
  *,
  data_dir: str = "",
) -> Task:
  """Ranks films by iALS, with `data_parallel(sgd(1.0), mean())`.

  This fixed-point task (see `Task.grads`) uses all examples at once: `--batch_size=all`. The
  parameters are {"entities": [U + I, factors], "turn"}; an example is a user with the films that
  this user likes, or a film with the users who like it. A step moves one side to its minimum given
  the other side, the users at turn 0 and the films at turn 1, and passes the turn. Each worker
  solves for its own entities. The loss is half the squared error per pair, without the penalty.

  The metrics are "ndcg@10" and "recall@10" of `recommend.movielens`: the films that a user has not
  rated in training are ranked by x_u'y_i, and test films with four stars or more are relevant.

  Args:
    split: the name of the split; see `movielens.load`.
    factors: the number of factors, at least 1.
    l2: the ridge penalty, > 0.
    alpha: the additional confidence of a positive, > 0.
    least: the minimum number of stars of a positive.
    part: the ratings to measure on, "test" or "validation"; see `movielens.load`.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found.
    ValueError: if the split or the part is unknown, or a number is out of range.

  Reference: Hu, Koren, Volinsky, 2008, Collaborative filtering for implicit feedback datasets,
    ICDM, with r_ui = 1.
  """
  _check(factors, l2, alpha)
  train, test = data.load(split, data_dir, part)
  users, items = shape = _shape(train, test)
  total = users + items
  likes = data.liked(train, least)
  by_user = rows_of(likes.user, likes.item + users, likes.stars, users)
  by_item = rows_of(likes.item, likes.user, likes.stars, items)
  most = max(by_user.other.shape[1], by_item.other.shape[1])
  wide = lambda a: np.pad(a, [(0, 0), (0, most - a.shape[1])])
  rank = ranked(train, test, shape)

  def init(key: Key) -> Params:
    return {"entities": 0.1 * jax.random.normal(key, (total, factors)), "turn": jnp.zeros(())}

  def grads(params: Params, batch: Batch, key: Key) -> tuple[Array, Params]:
    del key
    z, turn = params["entities"], params["turn"]
    by_side = jnp.stack([z[users:].T @ z[users:], z[:users].T @ z[:users]])

    def one(row: tuple[Array, ...]) -> tuple[Array, Array]:
      own, other, count, side = row
      x, gram = _present(z, other, count), by_side[side]
      return _solved(x, gram, l2, alpha), _error(z[own], x, gram, count, alpha)

    rows = batch["row"], batch["other"], batch["count"], batch["y"]
    solved, errors = lax.map(one, rows, batch_size=AT_ONCE)
    now = jnp.round(turn)  # the workers' weighted mean of 1 is 1 only up to rounding
    moves = (batch["y"] == now).astype(z.dtype)
    share = total * moves / len(moves)
    if "mask" in batch:
      mask = batch["mask"].astype(z.dtype)
      share = total * moves * mask / jnp.maximum(jnp.sum(mask), 1)
    apart = (z[batch["row"]] - solved) * share[:, None]
    residual = {"entities": jnp.zeros_like(z).at[batch["row"]].add(apart), "turn": turn - (1 - now)}
    return sampling.mean(errors, batch) * total / (4 * users * items), residual

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    return grads(params, batch, key)[0]

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  def measure(params: Params) -> dict[str, Array]:
    z = jnp.asarray(params["entities"])
    return rank(z[:users] @ z[users:].T)

  examples = {
    "row": np.arange(total, dtype=np.int32),
    "other": np.concatenate([wide(by_user.other), wide(by_item.other)]),
    "count": np.concatenate([by_user.count, by_item.count]),
    "y": (np.arange(total) >= users).astype(np.int32),
  }
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, examples)
  return task._replace(grads=grads, measure=measure, measured_on="test")


def movielens_implicit_federated(
  split: str = "u1",
  factors: int = 32,
  l2: float = 20.0,
  alpha: float = 2.0,
  least: float = 4.0,
  part: str = "test",
  *,
  data_dir: str = "",
) -> Task:
  """Ranks films with user vectors that never leave the users.

  An example is one user with the films that this user likes. The parameters, and hence the
  messages, are only {"item": [I, factors]}. To evaluate the loss, each user first solves for its
  own vector given the films. The objective is that of `movielens_implicit` divided by 2 U; its
  gradient treats the user vectors as constants, which is exact at their minimum. Every film that is
  no positive is a negative, so the gradient of a user contains all films.

  Args:
    split: the name of the split; see `movielens.load`.
    factors: the number of factors, at least 1.
    l2: the ridge penalty, > 0.
    alpha: the additional confidence of a positive, > 0.
    least: the minimum number of stars of a positive.
    part: the ratings to measure on, "test" or "validation"; see `movielens.load`.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found.
    ValueError: if the split or the part is unknown, or a number is out of range.

  Reference: Ammad-ud-din, Ivannikova, Khan, Oyomno, Fu, Tan, Flanagan, 2019, Federated
    collaborative filtering for privacy-preserving personalized recommendation system, arXiv
    1901.09888.
  """
  _check(factors, l2, alpha)
  train, test = data.load(split, data_dir, part)
  users, items = shape = _shape(train, test)
  rows = rows_of(*data.liked(train, least), users)
  examples = {"other": rows.other, "count": rows.count, "y": rows.count}
  rank = ranked(train, test, shape)

  def init(key: Key) -> Params:
    return {"item": 0.1 * jax.random.normal(key, (items, factors))}

  def vector(item: Array, gram: Array, row: Batch) -> Array:
    return _solved(_present(item, row["other"], row["count"]), gram, l2, alpha)

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    item = params["item"]
    gram, fixed = item.T @ item, lax.stop_gradient(item)
    own = {name: batch[name] for name in ("other", "count")}

    def of_user(row: Batch) -> Array:
      z = lax.stop_gradient(vector(fixed, fixed.T @ fixed, row))
      x = _present(item, row["other"], row["count"])
      return _error(z, x, gram, row["count"], alpha) + l2 * jnp.sum(z**2)

    each = lax.map(of_user, own, batch_size=AT_ONCE)
    return (sampling.mean(each, batch) + l2 / users * jnp.sum(item**2)) / 2

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  def measure(params: Params) -> dict[str, Array]:
    item = jnp.asarray(params["item"])
    own = {name: jnp.asarray(examples[name]) for name in ("other", "count")}
    solve = lambda row: vector(item, item.T @ item, row)
    return rank(lax.map(solve, own, batch_size=AT_ONCE) @ item.T)

  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, examples)
  return task._replace(measure=measure, measured_on="test", chunk=AT_ONCE)


def _present(z: Array, other: Array, count: Array) -> Array:
  """Returns the vectors of an entity's positives [M, k]; zero as padding."""
  return z[other] * (jnp.arange(len(other)) < count).astype(z.dtype)[:, None]


def _solved(x: Array, gram: Array, l2: float, alpha: float) -> Array:
  """Returns the minimum (G + alpha X'X + l2 I)^-1 (1 + alpha) X'1 of an entity."""
  ridge = l2 * jnp.eye(len(gram), dtype=x.dtype)
  return eliminated(gram + alpha * x.T @ x + ridge, (1 + alpha) * jnp.sum(x, 0))


def _error(z: Array, x: Array, gram: Array, count: Array, alpha: float) -> Array:
  """Returns sum_i c_i (p_i - z'y_i)^2 over all i: z'G z, corrected for the positives."""
  s = x @ z
  positives = (1 + alpha) * (count.astype(z.dtype) - 2 * jnp.sum(s)) + alpha * jnp.sum(s**2)
  return z @ gram @ z + positives


def _shape(train: data.Ratings, test: data.Ratings) -> tuple[int, int]:
  user, item = data.last(train, test)
  return user + 1, item + 1


def _check(factors: int, l2: float, alpha: float) -> None:
  checks.at_least("factors", factors, 1)
  for name, value in (("l2", l2), ("alpha", alpha)):
    checks.above(name, value, 0)
