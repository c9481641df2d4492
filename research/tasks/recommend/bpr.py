"""Ranks films from pairs of a film that a user likes and another film."""

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.recommend import movielens as data
from research.tasks.recommend.measures import ranked
from research.tasks.recommend.recommend import check


def movielens_bpr(
  split: str = "u1",
  factors: int = 32,
  l2: float = 0.03,
  least: float = 4.0,
  part: str = "test",
  *,
  data_dir: str = "",
) -> Task:
  """Ranks films by Bayesian personalized ranking, with any method.

  With the score s_ui = b_i + x_u'y_i, the objective is the mean over the positives (u, i), and
  over all other films j, of

      log(1 + exp(s_uj - s_ui)) + l2/2 (|x_u|^2 + |y_i|^2 + |y_j|^2 + b_i^2 + b_j^2)

  A film is a positive of a user who has given it at least `least` stars. Every use of an example
  draws one film j uniformly from all films; if j is a positive of u, the pair has no weight. Like
  those of `movielens`, the tables are sharded by rows along the mesh axis `model`. The metrics are
  those of `movielens_implicit`.

  Args:
    split: the name of the split; see `movielens.load`.
    factors: the number of factors, at least 1.
    l2: the weight of the penalty, >= 0.
    least: the minimum number of stars of a positive.
    part: the ratings to measure on, "test" or "validation"; see `movielens.load`.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found.
    ValueError: if the split or the part is unknown, or a number is out of range.

  Reference: Rendle, Freudenthaler, Gantner, Schmidt-Thieme, 2009, BPR: Bayesian personalized
    ranking from implicit feedback, UAI, arXiv 1205.2618.
  """
  check(factors, l2)
  train, test = data.load(split, data_dir, part)
  users, items = (1 + n for n in data.last(train, test))
  shape = users, items
  likes = data.liked(train, least)
  positive = np.zeros(shape, bool)
  positive[likes.user, likes.item] = True
  rank = ranked(train, test, shape)
  tables = {"user": data.rounded(users), "item": data.rounded(items)}

  def init(key: Key) -> Params:
    keys = dict(zip(tables, jax.random.split(key), strict=True))
    table = lambda name: 0.1 * jax.random.normal(keys[name], (tables[name], factors))
    return {"item_bias": jnp.zeros(tables["item"])} | {name: table(name) for name in tables}

  def each(params: Params, batch: Batch, key: Key) -> Array:
    u, i = batch["user"], batch["item"]
    j = jax.random.randint(key, i.shape, 0, items)
    x, yi, yj = params["user"][u], params["item"][i], params["item"][j]
    bi, bj = params["item_bias"][i], params["item_bias"][j]
    margin = bi - bj + jnp.sum(x * (yi - yj), 1)
    squares = jnp.sum(x**2 + yi**2 + yj**2, 1) + bi**2 + bj**2
    negative = ~jnp.asarray(positive)[u, j]
    return negative * (jax.nn.softplus(-margin) + l2 / 2 * squares)

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    return sampling.mean(each(params, batch, key), batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  def measure(params: Params) -> dict[str, Array]:
    x, y, b = (jnp.asarray(params[name]) for name in ("user", "item", "item_bias"))
    return rank(b[None, :items] + x[:users] @ y[:items].T)

  task = Task(
    init,
    loss,
    evaluate,
    sampling.epoch_sample,
    sampling.take,
    {"user": likes.user, "item": likes.item, "y": likes.item},
    rules=((r"_bias$", ("model",)), (r"", ("model", None))),
  )
  return task._replace(measure=measure, measured_on="test", chunk=8192)
