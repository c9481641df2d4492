"""Recommending: factors, features, least squares, users who keep theirs, implicit feedback."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Running, distance

from research.analysis import compiled
from research.core import registry
from research.tasks.recommend import als, bpr, implicit, measures, movielens, recommend

KEY = jax.random.key(0)
USERS, ITEMS = 40, 24


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
  """Ratings of rank two with biases, rounded to stars: a file."""
  rng = np.random.default_rng(0)
  stars = 3 + rng.normal(size=(USERS, 2)) @ rng.normal(size=(2, ITEMS)) + rng.normal(size=ITEMS)
  user, item = np.nonzero(rng.random((USERS, ITEMS)) < 0.6)
  rows = np.stack([user + 1, item + 1, np.clip(stars[user, item].round(), 1, 5)], 1).astype(int)
  path = tmp_path_factory.mktemp("ratings") / "r.tsv"
  path.write_text("\n".join("\t".join(map(str, (*row, 0))) for row in rows))
  return str(path)


def run(task, method: str, rounds: int, workers: int, executor="simulate", batch=None, **inner):
  sizes = [len(part) for part in np.array_split(task.train["y"], workers)]
  built = registry.build("method", method)
  axes = {"data": workers, **inner}
  return Running(built, executor, axes, sizes, batch, task=task).rounds(rounds)


@pytest.mark.slow
def test_factors_learn_and_predictions_are_what_they_say(table):
  task = recommend.movielens(table, factors=2, l2=0.01)
  measure = jax.jit(task.measure)
  before = measure(task.init(KEY))
  params = run(task, "data_parallel(adam(0.05), mean())", 150, 2).params()
  after = measure(params)
  assert after["rmse"] < 0.75 * before["rmse"]
  assert after["ndcg@10"] > before["ndcg@10"]
  train, test = movielens.load(table)
  biases = params["user_bias"][test.user] + params["item_bias"][test.item]
  dot = np.sum(params["user"][test.user] * params["item"][test.item], 1)
  stars = np.clip(train.stars.mean() + biases + dot, 1, 5)
  np.testing.assert_allclose(after["rmse"], np.sqrt(np.mean((stars - test.stars) ** 2)), rtol=1e-5)


@pytest.mark.slow
def test_tables_along_an_axis_move_the_rows_asked_for(table):
  """Equal to one device per worker; nothing as large as a table goes along `model`."""
  task = recommend.movielens(table, factors=2)
  method = "data_parallel(sgd(0.1), mean())"
  want = run(task, method, 4, 2, batch=4)
  got = run(task, method, 4, 2, "spmd", batch=4, model=4)
  assert distance(got.params(), want.params()) < 1e-5
  program = got.executor.run.lower(got.state, got.data, rounds=1).compile()
  found = compiled.traffic(program, got.state.round.sharding.mesh)
  along = [t.payload for t in found if "model" in t.axes]
  assert along
  assert max(along) < 64 * 2 * 4  # bytes of a table [64, 2]
  leaf = got.state.method.params["user"]
  assert leaf.sharding.shard_shape(leaf.shape) == (16, 2)


def test_ranking_metrics_against_a_loop():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(6, 9)).astype(np.float32)
  seen, liked = rng.random((6, 9)) < 0.3, rng.random((6, 9)) < 0.4
  liked[0] = False
  ndcg, recall = [], []
  for s, before, good in zip(scores, seen, liked & ~seen, strict=True):
    if good.any():
      first = np.argsort(-np.where(before, -np.inf, s))[:3]
      gains = good[first] / np.log2(np.arange(2, 5))
      ndcg.append(gains.sum() / (1 / np.log2(np.arange(2, 5)))[: good.sum()].sum())
      recall.append(good[first].sum() / good.sum())
  found = jax.jit(lambda: measures.recommended(jnp.asarray(scores), seen, liked, 3))()
  assert found["ndcg@3"] == pytest.approx(np.mean(ndcg), abs=1e-6)
  assert found["recall@3"] == pytest.approx(np.mean(recall), abs=1e-6)


def test_only_items_that_are_shown_are_ranked():
  """The liked item comes second of all that were not seen, and first where it alone is shown."""
  one = lambda item, stars: movielens.Ratings(*np.array([[0, 1], [item, item], [stars, stars]]))
  predict = lambda params: jnp.tile(jnp.array([9.0, 8.0, 1.0, 0.0]), (2, 1))
  ranked = lambda shown: measures.measured(predict, one(0, 3), one(2, 5), (2, 4), shown)({})
  every, alone = jax.jit(lambda: (ranked(None), ranked(np.array([2]))))()
  np.testing.assert_allclose(every["ndcg@4"], 1 / np.log2(3), rtol=1e-6)
  np.testing.assert_allclose(alone["ndcg@4"], 1.0, rtol=1e-6)


def test_alternating_least_squares(table):
  """A user's factors solve its own regression; eight workers are one; the fit gets better."""
  task = als.movielens_als(table, factors=2, l2=0.05)
  method = "data_parallel(sgd(1.0), mean())"
  one, eight = run(task, method, 3, 1), run(task, method, 3, 8)
  assert distance(eight.params(), one.params()) < 1e-4
  z, train = one.params()["entities"], movielens.load(table)[0]
  own = train.take(train.user == 7)  # the third step was the users'
  x = np.hstack([z[USERS + own.item, :2], np.ones((len(own.item), 1))])
  target = own.stars - train.stars.mean() - z[USERS + own.item, 2]
  ridge = 0.05 * len(target) * np.eye(3)
  np.testing.assert_allclose(z[7], np.linalg.solve(x.T @ x + ridge, x.T @ target), atol=2e-4)
  rmse = jax.jit(lambda params: task.measure(params)["rmse"])
  assert rmse(eight.rounds(*[3] * 7).params()) < 0.75 * rmse(task.init(KEY))


@pytest.mark.slow
def test_users_keep_their_factors(table):
  """Only items are sent; their gradient is that of the objective with the users solved for."""
  ridge = 0.1
  task = als.movielens_federated(table, factors=2, l2=0.0, own_l2=ridge)
  params = task.init(KEY)
  assert set(params) == {"item", "item_bias"}
  batch = {name: leaf[:5] for name, leaf in task.train.items()}
  scale = USERS / task.train["count"].sum()

  def objective(params):
    total = 0.0
    for n, other, stars in zip(batch["count"], batch["other"], batch["stars"], strict=True):
      x = jnp.hstack([params["item"][other[:n]], jnp.ones((n, 1))])
      target = stars[:n] - params["item_bias"][other[:n]]
      z = jnp.linalg.solve(x.T @ x + ridge * n * jnp.eye(3), x.T @ target)
      total += jnp.sum((target - x @ z) ** 2) + ridge * n * jnp.sum(z**2)
    return scale * total / 2 / 5

  want = jax.jit(jax.grad(objective))(params)
  got = jax.jit(jax.grad(task.loss))(params, batch, KEY)
  assert distance(jax.device_get(got), jax.device_get(want)) < 1e-4
  method = "fed_avg(sgd(1.0), mean(), period=3)"
  found = run(task, method, 60, 4).params()
  rmse = jax.jit(lambda params: task.measure(params)["rmse"])
  assert rmse(found) < rmse(params) - 0.1


def test_a_power_of_zero_is_plain_ridge_regression(table):
  """The loss of all ratings, with penalties that do not depend on the number of ratings."""
  task = recommend.movielens(table, factors=2, l2=3.0, power=0.0, bias=0.5)
  train = movielens.load(table)[0]
  params = jax.tree.map(lambda p: np.asarray(p) + 0.1, task.init(KEY))
  p, q = params["user"], params["item"]
  b, c = params["user_bias"], params["item_bias"]
  of = train.user, train.item
  stars = train.stars.mean() + b[of[0]] + c[of[1]] + np.sum(p[of[0]] * q[of[1]], 1)
  squares = np.sum(p[:USERS] ** 2) + np.sum(q[np.unique(train.item)] ** 2)
  squares += 0.5 * (np.sum(b[:USERS] ** 2) + np.sum(c[np.unique(train.item)] ** 2))
  want = (np.sum((stars - train.stars) ** 2) + 3.0 * squares) / 2 / len(train.stars)
  np.testing.assert_allclose(jax.jit(task.loss)(params, task.train, KEY), want, rtol=1e-5)


def test_validation_ratings_are_training_ratings(table):
  """They are a tenth of them, and the test ratings are in neither part."""
  pairs = lambda ratings: {*zip(ratings.user.tolist(), ratings.item.tolist(), strict=True)}
  train, test = map(pairs, movielens.load(table))
  fitted, validation = map(pairs, movielens.load(table, part="validation"))
  assert fitted | validation == train
  assert len(validation) == len(train) // 10 == len(train) - len(fitted)
  assert not (fitted | validation) & test
  with pytest.raises(ValueError, match="part='train' is unknown"):
    movielens.load(table, part="train")


def solved(other, positives, l2, alpha):
  """An entity's minimum given the other side, by numpy."""
  confidence = 1 + alpha * positives
  normal = (other.T * confidence) @ other + l2 * np.eye(other.shape[1])
  return np.linalg.solve(normal, other.T @ (confidence * positives))


def liked(table) -> np.ndarray:
  """The matrix of positives [U, I]."""
  train = movielens.load(table)[0]
  matrix = np.zeros((USERS, ITEMS))
  good = train.stars >= 4
  matrix[train.user[good], train.item[good]] = 1
  return matrix


def test_implicit_least_squares(table):
  """Two steps against numpy, the loss against its definition; two workers' mean is one worker's."""
  task = implicit.movielens_implicit(table, factors=3, l2=0.5, alpha=2.0)
  assert task.grads
  positives, grads = liked(table), jax.jit(task.grads)
  params = task.init(KEY)
  for turn in range(2):
    value, residual = grads(params, task.train, KEY)
    halves = [jax.tree.map(lambda a, h=h: a[h::2], task.train) for h in range(2)]
    _, two = zip(*(grads(params, half, KEY) for half in halves), strict=True)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *two)
    np.testing.assert_allclose(mean["entities"], residual["entities"], atol=1e-4)
    users, items = np.split(np.array(params["entities"]), [USERS])
    error = np.sum((1 + 2 * positives) * (positives - users @ items.T) ** 2)
    np.testing.assert_allclose(value, error / 2 / positives.size, rtol=1e-4)
    if turn == 0:
      users = np.array([solved(items, row, 0.5, 2.0) for row in positives])
    else:
      items = np.array([solved(users, row, 0.5, 2.0) for row in positives.T])
    params = jax.tree.map(jnp.subtract, params, residual)
    np.testing.assert_allclose(params["entities"], np.concatenate([users, items]), atol=1e-4)


def test_implicit_users_keep_their_vectors(table):
  """Only films are sent; their gradient is that of the objective at the users' minimum."""
  l2, alpha = 0.5, 2.0
  task = implicit.movielens_implicit_federated(table, factors=3, l2=l2, alpha=alpha)
  item = np.array(task.init(KEY)["item"])
  positives = liked(table)
  users = np.array([solved(item, row, l2, alpha) for row in positives])
  errors = (1 + alpha * positives) * (users @ item.T - positives)
  want = (errors.T @ users + l2 * item) / USERS
  value, got = jax.jit(jax.value_and_grad(task.loss))({"item": jnp.asarray(item)}, task.train, KEY)
  assert set(got) == {"item"}
  np.testing.assert_allclose(got["item"], want, atol=1e-4)
  objective = np.sum((1 + alpha * positives) * (positives - users @ item.T) ** 2)
  objective += l2 * (np.sum(users**2) + np.sum(item**2))
  np.testing.assert_allclose(value, objective / 2 / USERS, rtol=1e-4)


@pytest.mark.slow
def test_pairs_are_ranked_better_with_training(table):
  """The mean loss over draws is that of all pairs; NDCG rises, with workers and one exchange in 3.

  The table's rows are rounded up, so that a mesh can shard them.
  """
  task = bpr.movielens_bpr(table, factors=2, l2=0.1)
  params = jax.tree.map(lambda p: p + 0.1, task.init(KEY))
  positives = liked(table)
  b, x, y = (np.asarray(params[name]) for name in ("item_bias", "user", "item"))
  b, x, y = b[:ITEMS], x[:USERS], y[:ITEMS]
  scores = b + x @ y.T
  users, items = np.nonzero(positives)
  margin = scores[users, items][:, None] - scores[users]
  squares = np.sum(x**2, 1)[users][:, None] + (np.sum(y**2, 1) + b**2)
  squares = squares + (np.sum(y**2, 1) + b**2)[items][:, None]
  pairs = (1 - positives[users]) * (np.log1p(np.exp(-margin)) + 0.05 * squares)
  mean = jax.jit(lambda keys: jax.vmap(lambda key: task.loss(params, task.train, key))(keys))
  draws = mean(jax.random.split(KEY, 2000))
  np.testing.assert_allclose(np.mean(draws), pairs.mean(), rtol=1e-2)
  ndcg = jax.jit(lambda params: task.measure(params)["ndcg@10"])
  found = run(task, "local_sgd(adam(0.05), mean(), period=3)", 50, 4, batch=16).params()
  assert ndcg(found) > ndcg(task.init(KEY)) + 0.05


def test_errors_of_implicit_tasks_are_one_line(table):
  with pytest.raises(ValueError, match=r"least=6: no rating has so many stars; the maximum is 5"):
    implicit.movielens_implicit(table, least=6.0)
  with pytest.raises(ValueError, match="alpha"):
    implicit.movielens_implicit(table, alpha=0.0)
  with pytest.raises(ValueError, match=r"power=2\.0"):
    als.movielens_als(table, power=2.0)


def test_features_make_pairs():
  """A factorization machine against its definition, on real features."""
  folder = os.environ.get("RESEARCH_DATA_DIR")
  if not folder or not list(Path(folder).rglob("u.item")):
    pytest.skip("$RESEARCH_DATA_DIR has no u.item")
  task = recommend.movielens("cold_items", 3, 0.1, "both", 0.5, data_dir=folder)
  train, test = movielens.load("cold_items", folder)
  assert not np.isin(test.item, train.item).any()
  features, params = movielens.features(folder), jax.device_get(task.init(KEY))
  error = []
  for user, item, stars in zip(train.user[:4], train.item[:4], train.stars[:4], strict=True):
    named = [("user", user), ("item", item)]
    own = [*features.users[user], *features.items[item]]
    named += [("feature", f) for f in own if f < features.size]
    vectors = [params[name][row] for name, row in named]
    pairs = sum(a @ b for i, a in enumerate(vectors) for b in vectors[:i])
    squares = sum(v @ v for v in vectors)
    error.append((train.stars.mean() + pairs - stars) ** 2 / 2 + 0.1 / 2 * squares)
  batch = {name: leaf[:4] for name, leaf in task.train.items()}
  assert jax.jit(task.loss)(params, batch, KEY) == pytest.approx(np.mean(error), rel=1e-4)
