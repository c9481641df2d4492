"""Factorizes matrices with exact solves: alternating least squares, and private user factors.

An entity e is a user or an item; z_e = (p_e, b_e) contains its factors and its bias. Given the
factors and biases of the other side, z_e solves a small ridge regression on the ratings of e:

    min over z of sum_j (r_ej - mean - b_j - z'(p_j, 1))^2 + l2 n_e^power (|p|^2 + bias b^2)

over z = (p, b), where n_e is the number of ratings of e.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.recommend import movielens as data
from research.tasks.recommend.measures import measured
from research.tasks.recommend.recommend import check, per_rating


class Rows(NamedTuple):
  """Contains the ratings of each of E entities, padded to the largest number of ratings."""

  other: np.ndarray  # int32 [E, M], the other entity of each rating
  stars: np.ndarray  # float32 [E, M], ratings minus their mean; 0 as padding
  count: np.ndarray  # int32 [E]


def movielens_als(
  split: str = "u1",
  factors: int = 10,
  l2: float = 0.12,
  power: float = 1.0,
  bias: float = 1.0,
  part: str = "test",
  *,
  data_dir: str = "",
) -> Task:
  """Factorizes the ratings by alternating least squares, with `data_parallel(sgd(1.0), mean())`.

  This fixed-point task (see `Task.grads`) uses all examples at once: `--batch_size=all`. The
  parameters are {"entities": [U + I, factors + 1], "turn"}; an example is a user or an item with
  its ratings. A step moves one side to its solution, the users at turn 0 and the items at turn 1,
  and passes the turn to the other side. Each worker solves exactly for its own entities. Two steps
  make a sweep. The metrics are those of `recommend.movielens`. The metric "residual" stays above 1,
  because it includes the turn, which changes in every step.

  Args:
    split: the name of the split; see `movielens.load`.
    factors: the number of factors, at least 1.
    l2: the ridge penalty, > 0: per rating with the default power of 1; with a power of 0, of an
      entity whatever its number of ratings, and then about 10.
    power: the power of an entity's number of ratings in its penalty, from 0 to 1.
    bias: the penalty of a bias relative to that of a factor, > 0.
    part: the ratings to measure on, "test" or "validation"; see `movielens.load`.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found.
    ValueError: if the split or the part is unknown, or a number is out of range.

  Reference: Zhou, Wilkinson, Schreiber, Pan, 2008, Large-scale parallel collaborative filtering for
    the Netflix prize (ALS with weighted regularization); here, the unknowns include biases.
  """
  _check(factors, l2, power, bias)
  train, test = data.load(split, data_dir, part)
  users, items = (1 + n for n in data.last(train, test))
  shape = users, items
  total = users + items
  mean = float(train.stars.mean())
  by_user = rows_of(train.user, train.item + users, train.stars - mean, users)
  by_item = rows_of(train.item, train.user, train.stars - mean, items)
  most = max(by_user.other.shape[1], by_item.other.shape[1])
  wide = lambda a: np.pad(a, [(0, 0), (0, most - a.shape[1])])
  ratings = len(train.stars)

  ridge = _ridge(factors, l2, power, bias)

  def init(key: Key) -> Params:
    first = 0.1 * jax.random.normal(key, (total, factors))
    return {"entities": jnp.pad(first, ((0, 0), (0, 1))), "turn": jnp.zeros(())}

  def grads(params: Params, batch: Batch, key: Key) -> tuple[Array, Params]:
    del key
    z, turn = params["entities"], params["turn"]
    solved, errors = jax.vmap(
      lambda other, stars, count, own: _solve(z, other, stars, count, own, ridge)
    )(batch["other"], batch["stars"], batch["count"], z[batch["row"]])
    now = jnp.round(turn)  # the workers' weighted mean of 1 is 1 only up to rounding
    moves = (batch["y"] == now).astype(z.dtype)
    share = total * moves / len(moves)
    if "mask" in batch:
      mask = batch["mask"].astype(z.dtype)
      share = total * moves * mask / jnp.maximum(jnp.sum(mask), 1)
    apart = (z[batch["row"]] - solved) * share[:, None]
    residual = {"entities": jnp.zeros_like(z).at[batch["row"]].add(apart), "turn": turn - (1 - now)}
    return sampling.mean(errors, batch) * total / (4 * ratings), residual

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    return grads(params, batch, key)[0]

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  def everything(params: Params) -> Array:
    z = params["entities"]
    p, b = z[:, :-1], z[:, -1]
    return mean + b[:users, None] + b[None, users:] + p[:users] @ p[users:].T

  examples = {
    "row": np.arange(total, dtype=np.int32),
    "other": np.concatenate([wide(by_user.other), wide(by_item.other)]),
    "stars": np.concatenate([wide(by_user.stars), wide(by_item.stars)]),
    "count": np.concatenate([by_user.count, by_item.count]),
    "y": (np.arange(total) >= users).astype(np.int32),
  }
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, examples)
  measure = measured(everything, train, test, shape)
  return task._replace(grads=grads, measure=measure, measured_on="test")


def movielens_federated(
  split: str = "u1",
  factors: int = 10,
  l2: float = 0.12,
  own_l2: float = 0.12,
  power: float = 1.0,
  bias: float = 1.0,
  part: str = "test",
  *,
  data_dir: str = "",
) -> Task:
  """Factorizes the ratings such that user factors never leave the users.

  An example is one user with all ratings of this user. The parameters, and hence the messages, are
  only those of the items, {"item": [I, factors], "item_bias": [I]}. To evaluate the loss, each user
  first solves for its own factors and bias as above, given the current item parameters. The
  objective is that of `recommend.movielens`, a mean over ratings, evaluated with these user
  factors. The gradient of the objective treats the user factors as constants, which is exact if the
  objective includes their ridge penalty. With --population=943, every client of a federated method
  is one user. The metrics are those of `recommend.movielens`; to compute them, all users solve for
  their factors, too.

  Args:
    split: the name of the split; see `movielens.load`.
    factors: the number of factors, at least 1.
    l2: the weight of the items' penalty, as in `recommend.movielens`.
    own_l2: the ridge penalty of a user, > 0; see l2 of `movielens_als`.
    power: the power of an entity's number of ratings in its penalty, from 0 to 1. Below 1, users
      need to know how many ratings each item has.
    bias: the penalty of a bias relative to that of a factor, > 0.
    part: the ratings to measure on, "test" or "validation"; see `movielens.load`.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found.
    ValueError: if the split or the part is unknown, or a number is out of range.

  Reference: Singhal, Sidahmed, Garrett, Wu, Rush, Prakash, 2021, Federated reconstruction:
    partially local federated learning, arXiv 2102.03448; here, the reconstruction is exact.
  """
  _check(factors, own_l2, power, bias)
  check(factors, l2)
  train, test = data.load(split, data_dir, part)
  users, items = (1 + n for n in data.last(train, test))
  shape = users, items
  mean = float(train.stars.mean())
  rows = rows_of(train.user, train.item, train.stars - mean, users)
  scale = users / len(train.stars)
  ridge = _ridge(factors, own_l2, power, bias)
  weights = per_rating(np.bincount(train.item, minlength=items), power)

  def init(key: Key) -> Params:
    item = 0.1 * jax.random.normal(key, (items, factors))
    return {"item": item, "item_bias": jnp.zeros(items)}

  def reconstructed(params: Params, other: Array, stars: Array, count: Array) -> Array:
    table = jnp.concatenate([params["item"], params["item_bias"][:, None]], 1)
    zero = jnp.zeros(factors + 1, table.dtype)
    return _solve(lax.stop_gradient(table), other, stars, count, zero, ridge)[0]

  def of_user(params: Params, other: Array, stars: Array, count: Array) -> Array:
    z = lax.stop_gradient(reconstructed(params, other, stars, count))
    there = (jnp.arange(len(other)) < count).astype(z.dtype)
    q, b = params["item"][other], params["item_bias"][other]
    errors = stars - b - q @ z[:-1] - z[-1]
    penalty = l2 * jnp.asarray(weights, z.dtype)[other] * (bias * b**2 + jnp.sum(q**2, 1))
    return jnp.sum(there * (errors**2 + penalty)) / 2

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    each = jax.vmap(lambda *row: of_user(params, *row))
    return scale * sampling.mean(each(batch["other"], batch["stars"], batch["count"]), batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  def everything(params: Params) -> Array:
    solve = jax.vmap(lambda *row: reconstructed(params, *row))
    z = solve(jnp.asarray(rows.other), jnp.asarray(rows.stars), jnp.asarray(rows.count))
    return mean + z[:, -1:] + params["item_bias"][None] + z[:, :-1] @ params["item"].T

  examples = rows._asdict() | {"y": rows.count}
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, examples)
  measure = measured(everything, train, test, shape)
  return task._replace(measure=measure, measured_on="test", chunk=256)


def rows_of(entity: np.ndarray, other: np.ndarray, stars: np.ndarray, entities: int) -> Rows:
  """Groups ratings by entity, in their original order.

  Args:
    entity: the entity of each rating, [N].
    other: the other entity of each rating, [N].
    stars: the ratings minus their mean, [N].
    entities: E, the number of entities.
  """
  count = np.bincount(entity, minlength=entities)
  order = np.argsort(entity, kind="stable")
  place = np.arange(len(entity)) - np.repeat(np.cumsum(count) - count, count)
  shape = entities, max(1, int(count.max()))
  rows = Rows(np.zeros(shape, np.int32), np.zeros(shape, np.float32), count.astype(np.int32))
  rows.other[entity[order], place] = other[order]
  rows.stars[entity[order], place] = stars[order]
  return rows


def _ridge(factors: int, l2: float, power: float, bias: float) -> Callable[[Array], Array]:
  """Returns the function from an entity's number of ratings to its penalty matrix."""
  shape = np.diag([1.0] * factors + [bias])
  return lambda n: l2 * jnp.maximum(n, 1) ** power * jnp.asarray(shape, n.dtype)


def _solve(
  z: Array,
  other: Array,
  stars: Array,
  count: Array,
  own: Array,
  ridge: Callable[[Array], Array],
) -> tuple[Array, Array]:
  """Returns an entity's solution, and the sum of squared errors with its current values `own`."""
  there = (jnp.arange(len(other)) < count).astype(z.dtype)
  x = jnp.concatenate([z[other, :-1], jnp.ones((len(other), 1), z.dtype)], 1) * there[:, None]
  target = (stars.astype(z.dtype) - z[other, -1]) * there
  solved = eliminated(x.T @ x + ridge(count.astype(z.dtype)), x.T @ target)
  return solved, jnp.sum((target - x @ own) ** 2)


def eliminated(a: Array, b: Array) -> Array:
  """Solves a x = b by Gauss-Jordan elimination, without LAPACK.

  Symmetric positive definite matrices need no pivoting. In jaxlib 0.10, a batched LAPACK call waits
  for threads of the pool in which it runs: if every thread of the pool makes such a call at the
  same time, none of the calls returns.

  Args:
    a: the matrix [n, n], symmetric and positive definite.
    b: the right-hand side [n].

  Returns:
    The solution x [n].
  """

  def one(j: Array, rows: Array) -> Array:
    pivot = rows[j] / rows[j, j]
    return (rows - rows[:, j, None] * pivot[None]).at[j].set(pivot)

  return lax.fori_loop(0, len(b), one, jnp.concatenate([a, b[:, None]], 1))[:, -1]


def _check(factors: int, l2: float, power: float, bias: float) -> None:
  check(factors, l2, power, bias)
  if not (l2 > 0 and bias > 0):
    raise ValueError(f"l2={l2}, bias={bias}: least squares of few ratings need both > 0")
