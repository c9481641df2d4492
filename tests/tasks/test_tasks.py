"""Tasks: the order of examples, the losses against numpy, and the data sets."""

import bz2
import functools
import gzip
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from research.models import classic
from research.tasks import sampling
from research.tasks.convex import counterexamples, libsvm, synthetic
from research.tasks.supervised import supervised
from research.tasks.vision import vision

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def real_data():
  """The user's directory of data files, for what needs the published ones."""
  folder = os.environ.get("RESEARCH_DATA_DIR")
  if not folder:
    pytest.skip("RESEARCH_DATA_DIR is not set")

  def has(name):
    if not list(Path(folder).rglob(f"{name}*")):
      pytest.skip(f"$RESEARCH_DATA_DIR has no {name}")
    return folder

  return has


def loss_and_grad(task, params, data):
  """A task's loss and gradient, in one program."""
  return jax.jit(jax.value_and_grad(task.loss))(params, data, KEY)


def close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# --- The order in which examples are drawn


SAMPLE = jax.jit(sampling.epoch_sample, static_argnames="batch_size")


@functools.partial(jax.jit, static_argnums=3)
def draws(size, first, key, batch_size):
  """The batches of 100 consecutive steps."""
  draw = lambda step: sampling.epoch_sample(size, step, key, batch_size=batch_size)
  return jax.vmap(draw)(first + jnp.arange(100))


def epoch(size, batch_size, number, key=KEY):
  batches = max(1, size // batch_size)
  return np.asarray(draws(size, number * batches, key, batch_size))[:batches].ravel()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 40])
def test_an_epoch_visits_each_example_at_most_once(batch_size):
  for size in (1, 2, 3, 7, 8, 33, 100):
    seen = np.bincount(epoch(size, batch_size, 5), minlength=size)
    assert len(seen) == size
    if batch_size <= size:
      assert seen.max() == 1
      assert seen.sum() == size // batch_size * batch_size
    else:
      assert set(seen) <= {batch_size // size, -(-batch_size // size)}


def test_orders_differ_by_epoch_and_key():
  other = jax.random.key(1)
  orders = [epoch(50, 5, 0), epoch(50, 5, 1), epoch(50, 5, 0, other), epoch(50, 5, 1, other)]
  assert len({tuple(order) for order in orders}) == 4


def test_what_an_epoch_leaves_out_changes():
  left_out = {tuple(set(range(10)) - set(epoch(10, 4, number))) for number in range(20)}
  assert len(left_out) > 5


def test_the_same_under_vmap_and_alone():
  sizes, steps = np.array([1, 3, 64, 1000], np.int32), np.arange(6)
  keys = jax.random.split(KEY, 4)
  draw = functools.partial(SAMPLE, batch_size=5)
  workers = jax.vmap(draw, (0, None, 0))
  mapped = jax.jit(jax.vmap(workers, (None, 0, None)))(sizes, steps, keys)
  assert (mapped.shape, mapped.dtype) == ((6, 4, 5), np.int32)
  for step in steps:
    for worker, size in enumerate(sizes):
      np.testing.assert_array_equal(mapped[step, worker], draw(size, step, keys[worker]))


@pytest.mark.parametrize("size", [2**31 - 1, 2**31 - 2, 2**30, 2**30 + 1, 65537])
def test_largest_sizes_and_steps(size):
  step = 2**31 - 1
  draw = np.asarray(SAMPLE(size, step, KEY, batch_size=4096))
  assert draw.min() >= 0
  assert draw.max() < size
  assert len(np.unique(draw)) == 4096
  assert abs(np.mean(draw / size) - 0.5) < 0.02
  assert abs(np.mean(draw % 2) - 0.5) < 0.04


def chi_square(counts):
  """The statistic against equal counts, in standard deviations from its mean."""
  expected, freedom = counts.mean(), counts.size - 1
  return (np.sum((counts - expected) ** 2) / expected - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_equally_likely(size):
  orders = permutations(size, 20000)
  counts = np.unique(orders @ size ** np.arange(size), return_counts=True)[1]
  assert counts.size == math.factorial(size)
  assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("size", [7, 16, 17, 60])
def test_positions_and_pairs_are_uniform(size):
  orders = permutations(size, 40000)
  for position in (0, size // 3, size - 1):
    assert abs(chi_square(np.bincount(orders[:, position], minlength=size))) < 4
  for first, second in ((0, 1), (1, size - 1), (2, size // 2)):
    pairs = np.bincount(orders[:, first] * size + orders[:, second], minlength=size**2)
    pairs = pairs.reshape(size, size)
    assert np.trace(pairs) == 0
    assert abs(chi_square(pairs[~np.eye(size, dtype=bool)])) < 4


def permutations(size, count):
  key = jax.random.key(3)
  one = lambda e: sampling.epoch_sample(size, e, key, batch_size=size)
  return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(count))).astype(np.int64)


def test_take_fetches_from_every_leaf():
  examples = {"x": {"index": np.arange(12).reshape(6, 2)}, "y": np.arange(6)}
  taken = sampling.take(examples, jnp.array([[5, 0]]))
  np.testing.assert_array_equal(taken["y"], [[5, 0]])
  np.testing.assert_array_equal(taken["x"]["index"], [[[10, 11], [0, 1]]])


# --- Losses against numpy


def softmax(z, y):
  p = np.exp(z - z.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  return -np.log(p[np.arange(len(y)), y]), p - np.eye(z.shape[1])[y], p.argmax(1) == y


def logistic(z, y):
  p = 1 / (1 + np.exp(-z))
  y = y[:, None]
  return -np.log(np.where(y == 1, p, 1 - p))[:, 0], p - y, (p > 0.5)[:, 0] == y[:, 0]


def squares(z, y):
  return (z[:, 0] - y) ** 2 / 2, z - y[:, None], None


# name -> (numpy's loss, dloss/dz and correctness by example, outputs, labels)
LOSSES = {
  "softmax": (softmax, 4, np.random.default_rng(1).integers(0, 4, 20).astype(np.int32)),
  "logistic": (logistic, 1, np.random.default_rng(2).integers(0, 2, 20).astype(np.int32)),
  "squares": (squares, 1, np.random.default_rng(3).standard_normal(20).astype(np.float32)),
}


def problem(loss, **options):
  _, outputs, y = LOSSES[loss]
  x = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
  task = supervised(classic.linear(bias=True)(outputs), {"x": x, "y": y}, loss=loss, **options)
  noise = np.random.default_rng(4)
  return task, jax.tree.map(
    lambda p: noise.standard_normal(p.shape).astype(np.float32), jax.eval_shape(task.init, KEY)
  )


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_their_transcription(loss, masked, l2):
  task, params = problem(loss, l2=l2)
  mask = np.random.default_rng(5).integers(0, 2, 20) if masked else np.ones(20)
  batch = {**task.train, "mask": mask} if masked else task.train
  x, y = task.train["x"].astype(np.float64), task.train["y"]
  values, dz, correct = LOSSES[loss][0](x @ params["kernel"] + params["bias"], y)
  norm = sum(np.sum(np.square(p, dtype=np.float64)) for p in params.values())
  dz = dz * mask[:, None] / mask.sum()

  value, gradient = jax.jit(jax.value_and_grad(task.loss))(params, batch, KEY)
  close(value, (values * mask).sum() / mask.sum() + l2 / 2 * norm)
  expected = {"kernel": x.T @ dz, "bias": dz.sum(0)}
  close(gradient, jax.tree.map(lambda g, p: g + l2 * p, expected, params))
  metrics = jax.jit(task.evaluate)(params, batch)
  close(metrics["loss"], value)
  if correct is None:
    assert "accuracy" not in metrics
  else:
    close(metrics["accuracy"], (correct * mask).sum() / mask.sum())


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_under_the_mask_changes_nothing(loss):
  task, params = problem(loss, l2=0.1)
  padded = jax.tree.map(lambda a: np.concatenate([a, np.zeros_like(a[:5])]), task.train)
  padded["mask"] = (np.arange(25) < 20).astype(np.float32)
  hidden = padded | {"mask": np.zeros(25, np.float32)}
  evaluate = lambda: (task.evaluate(params, padded), task.evaluate(params, task.train))
  found, want, none = jax.jit(lambda: (*evaluate(), task.loss(params, hidden, KEY)))()
  close(found, want)
  assert np.isfinite(none)


@pytest.mark.parametrize("loss", ["softmax", "logistic"])
def test_huge_logits_stay_finite(loss):
  task, params = problem(loss)
  params = jax.tree.map(lambda p: 1e5 * p, params)
  gradient = jax.jit(jax.grad(task.loss))(params, task.train, KEY)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_several_regression_targets():
  y = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
  task = supervised(
    classic.linear()(3), {"x": np.ones((20, 2), np.float32), "y": y}, loss="squares"
  )
  close(loss_and_grad(task, task.init(KEY), task.train)[0], np.mean(np.sum(y**2, 1)) / 2)


def test_bytes_stay_bytes_until_the_module_reads_them():
  x = np.random.default_rng(0).integers(0, 17, (20, 4, 4)).astype(np.uint8)
  y = LOSSES["softmax"][2]
  module = classic.mlp([5])(4)
  bytes_, floats = (
    supervised(module, {"x": x, "y": y}, scale=16.0),
    supervised(module, {"x": x.astype(np.float32) / 16, "y": y}),
  )

  def of(task, train):
    params = task.init(KEY)
    batch = task.batch(train, task.sample(20, 3, KEY, batch_size=8))
    types.append(batch["x"].dtype)
    return params, task.loss(params, batch, KEY), task.evaluate(params, train)

  types = []
  close(
    *jax.jit(lambda *train: (of(bytes_, train[0]), of(floats, train[1])))(
      bytes_.train, floats.train
    )
  )
  assert types == [np.uint8, np.float32]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"loss": "softmx"}, "'softmx' is none of softmax, logistic, squares; did you mean softmax"),
    ({"l2": -1.0}, "l2=-1.0 is negative"),
    ({"l2": math.nan}, "l2=nan is negative"),
    ({"y": np.full(20, 4, np.int32)}, r"labels from 4 to 4 are not integers in \[0, 4\)"),
    ({"y": np.zeros(20, np.float32)}, "labels from 0.0 to 0.0 are not integers"),
    ({"y": np.zeros(19, np.int32)}, r"lengths \[19, 20\]"),
    ({"loss": "logistic"}, "logistic loss does not go with a model of 4 outputs"),
    ({"loss": "squares"}, "labels have 1 entries each, and the model 4 outputs"),
    ({"module": classic.linear()(1)}, "softmax loss does not go with a model of 1 outputs"),
    ({"module": classic.cnn()(4)}, "cnn needs images"),
  ],
)
def test_what_does_not_fit_is_refused_when_built(change, message):
  module = change.pop("module", classic.linear()(4))
  y = change.pop("y", LOSSES["softmax"][2])
  with pytest.raises(ValueError, match=message) as caught:
    supervised(module, {"x": np.ones((20, 6), np.float32), "y": y}, **change)
  assert "\n" not in str(caught.value)


# --- Least squares


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_known_optimum_is_one(noise, bias):
  task = synthetic.least_squares(200, 6, noise, 30.0, model=classic.linear(bias))
  assert task.optimum is not None
  assert jax.tree.map(np.shape, task.optimum) == jax.tree.map(np.shape, task.init(KEY))
  gradient = loss_and_grad(task, task.optimum, task.train)[1]
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-5
  distance = jax.jit(lambda params: task.evaluate(params, task.train)["distance"])
  assert distance(task.optimum) == 0
  assert distance(jax.tree.map(np.asarray, task.init(KEY))) == 1


@pytest.mark.parametrize("condition", [1.0, 10.0, 1000.0])
def test_the_spectrum_is_the_promised_one(condition):
  x = synthetic.least_squares(300, 5, 0.0, condition, model=classic.linear()).train["x"]
  eigenvalues = np.linalg.eigvalsh(x.T.astype(np.float64) @ x / len(x))[::-1]
  np.testing.assert_allclose(eigenvalues, np.geomspace(1, 1 / condition, 5), rtol=1e-4)


def test_gradient_descent_contracts_at_the_best_rate():
  task = synthetic.least_squares(condition=10.0, model=classic.linear())

  def step(_, params):
    gradient = jax.grad(task.loss)(params, task.train, KEY)
    return jax.tree.map(lambda p, g: p - 2 / 1.1 * g, params, gradient)

  params = jax.jit(lambda: jax.lax.fori_loop(0, 60, step, task.init(KEY)))()
  distance = jax.jit(task.evaluate)(params, task.train)["distance"]
  assert distance < 3 * (9 / 11) ** 60


def test_other_models_have_no_known_optimum():
  task = synthetic.least_squares(model=classic.mlp([4]))
  assert task.optimum is None
  assert set(jax.eval_shape(lambda: task.evaluate(task.init(KEY), task.train))) == {"loss"}


def test_least_squares_is_a_function_of_its_seed():
  one, same, other = (synthetic.least_squares(seed=s, model=classic.linear()) for s in (0, 0, 1))
  np.testing.assert_array_equal(one.train["y"], same.train["y"])
  assert np.any(one.train["y"] != other.train["y"])


@pytest.mark.parametrize(
  "wrong", [{"samples": 5}, {"features": 0}, {"noise": -1.0}, {"condition": 0.5}]
)
def test_least_squares_refuses(wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=f"{name}={wrong[name]}.*need"):
    synthetic.least_squares(**wrong, model=classic.linear())


def test_mean_estimation_is_solved_by_one_step_of_size_one():
  """On all vectors the step ends at their mean, on one at the vector."""
  task = synthetic.mean_estimation(6, 4, seed=1)
  assert task.optimum is not None
  zeros, whole = task.init(KEY), task.train
  for batch, want in (
    (whole, task.optimum["x"]),
    ({"x": whole["x"][[2]]}, whole["x"][2]),
  ):
    grads = loss_and_grad(task, zeros, batch)[1]
    close(np.asarray(zeros["x"]) - grads["x"], want)
  masked = {**whole, "mask": np.eye(6, dtype=np.float32)[2]}
  close(loss_and_grad(task, zeros, masked)[0], np.sum(whole["x"][2] ** 2) / 2)
  other = synthetic.mean_estimation(6, 4, seed=2)
  assert not np.array_equal(whole["x"], other.train["x"])


# --- Counterexamples


@pytest.mark.parametrize("dissimilarity", [1.0, 100.0])
def test_clients_that_drift_have_gradients_that_cancel_at_the_minimum(dissimilarity):
  task = counterexamples.client_drift(dissimilarity, start=3.0)
  params, at = task.init(KEY), {"x": np.float32(0)}
  one = lambda i: jax.tree.map(lambda x: x[[i]], task.train)
  grads = [loss_and_grad(task, at, one(i))[1]["x"] for i in range(2)]
  assert [float(g) for g in grads] == [dissimilarity, -dissimilarity]
  close(loss_and_grad(task, params, task.train)[1]["x"], 3.0)


def test_a_rare_large_gradient_has_a_mean_of_another_sign_than_most():
  task = counterexamples.rare_large_gradient()
  draw = jax.vmap(lambda t: task.sample(4, t, KEY, batch_size=1))
  index = np.asarray(jax.jit(draw)(np.arange(4000)))[:, 0]
  drawn = np.asarray(task.train["gradient"])[index]
  assert abs(drawn.mean() - 0.25) <= 0.15
  assert abs(np.sign(drawn).mean() + 0.5) <= 0.06
  assert task.project is not None
  assert [float(task.project({"x": jnp.float32(x)})["x"]) for x in (-3, 0.5, 2)] == [-1, 0.5, 1]


def test_signs_of_the_valleys_subgradients_keep_the_sum():
  task = counterexamples.narrow_valley(0.3)
  points = np.array([[1.0, 1.0], [0.9, 1.2], [3.0, -1.0]], np.float32)
  grad = lambda x: jax.grad(task.loss)({"x": x}, task.train, KEY)["x"]
  signs = np.sign(jax.jit(jax.vmap(grad))(points))
  assert signs.sum(1).tolist() == [0, 0, 0]
  close(loss_and_grad(task, task.init(KEY), task.train)[0], 0.6)


def test_skewed_noise_has_mean_zero_and_the_stated_deviation():
  task = counterexamples.skewed_noise(2.0, start=0.5)
  noise = np.asarray(task.train["noise"])
  close(noise.mean(0), np.zeros(2))
  close(np.sum(noise**2, 1).mean(), 4.0)
  params = task.init(KEY)
  close(loss_and_grad(task, params, task.train)[1]["x"], [0, -0.5])
  one = jax.tree.map(lambda x: x[[2]], task.train)
  want = 2 * np.sqrt(0.3) * np.array([-2, -1]) + [0, -0.5]
  close(loss_and_grad(task, params, one)[1]["x"], want)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: counterexamples.client_drift(1.0, start=0.0), "start=0"),
    (lambda: counterexamples.rare_large_gradient(2.0), "start=2.0"),
    (lambda: counterexamples.narrow_valley(1.0), "epsilon=1.0"),
    (lambda: counterexamples.skewed_noise(0.0), "deviation=0.0"),
    (lambda: synthetic.mean_estimation(0), "vectors=0"),
  ],
)
def test_made_up_problems_refuse(make, words):
  with pytest.raises(ValueError, match=words):
    make()


# --- LIBSVM files

BINARY = "-1 1:0.5 3:-2\n+1 2:1\n-1 \n+1 1:3 2:1e-1 5:4\n"
CLASSES = "3 1:1\n-7 2:1\n5 1:2 2:2\n3 1:1\n"


@pytest.fixture
def libsvm_task(tmp_path, monkeypatch):
  """Builds a task from the text of a file; files that the test wrote have no recorded sha256."""
  monkeypatch.setattr(libsvm, "SHA256", {})
  monkeypatch.setattr(libsvm, "URL", "http://127.0.0.1:9/")

  def build(text, name="set", model=None, **options):
    content = text.encode()
    content = {".bz2": bz2.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)(content)
    (tmp_path / name).write_bytes(content)
    model = model or classic.logistic()
    return libsvm.libsvm(name, model=model, data_dir=str(tmp_path), **options)

  return build


@pytest.mark.parametrize("name", ["set", "set.bz2", "set.gz"])
def test_libsvm_reads_text(libsvm_task, name):
  task = libsvm_task(BINARY, name)
  dense = [[0.5, 0, -2, 0, 0], [0, 1, 0, 0, 0], [0] * 5, [3, 0.1, 0, 0, 4]]
  np.testing.assert_array_equal(task.train["x"], np.array(dense, np.float32))
  np.testing.assert_array_equal(task.train["y"], [0, 1, 0, 1])
  assert (task.train["x"].dtype, task.train["y"].dtype) == (np.float32, np.int32)
  close(loss_and_grad(task, task.init(KEY), task.train)[0], math.log(2))


@pytest.mark.slow
def test_libsvm_sparse_equals_dense(libsvm_task, tmp_path):
  (tmp_path / "set.t").write_text("+1 2:2\n-1 1:1 4:1\n")
  dense, sparse = (libsvm_task(BINARY, test="set.t", l2=0.1, sparse=s) for s in (False, True))
  assert sparse.train["x"]["index"].shape == (4, 3)
  params = jax.tree.map(lambda p: p + np.float32(0.3), dense.init(KEY))
  assert jax.tree.map(np.shape, sparse.init(KEY)) == jax.tree.map(np.shape, params)
  for part in ("train", "test"):
    a, b = getattr(dense, part), getattr(sparse, part)
    close(jax.jit(dense.evaluate)(params, a), jax.jit(sparse.evaluate)(params, b))
    close(loss_and_grad(dense, params, a)[1], loss_and_grad(sparse, params, b)[1])


def test_libsvm_is_sparse_where_dense_takes_too_much(libsvm_task, monkeypatch):
  monkeypatch.setattr(libsvm, "DENSE_BYTES", 4 * 4 * 5)
  assert not isinstance(libsvm_task(BINARY).train["x"], dict)
  monkeypatch.setattr(libsvm, "DENSE_BYTES", 4 * 4 * 5 - 1)
  assert isinstance(libsvm_task(BINARY).train["x"], dict)


def test_libsvm_of_several_classes_is_softmax(libsvm_task):
  task = libsvm_task(CLASSES)
  np.testing.assert_array_equal(task.train["y"], [1, 0, 2, 1])
  params = task.init(KEY)
  assert params["kernel"].shape == (2, 3)
  close(loss_and_grad(task, params, task.train)[0], math.log(3))


def test_libsvm_of_squares_takes_labels_for_numbers(libsvm_task):
  task = libsvm_task("-1.5 1:2\n3 2:1\n", loss="squares", l2=2.0, model=classic.linear())
  params = {"kernel": np.array([[1.0], [0.5]], np.float32)}
  close(loss_and_grad(task, params, task.train)[0], (3.5**2 + 2.5**2) / 4 + 1 + 0.25)


@pytest.mark.parametrize(
  ("text", "options", "message"),
  [
    ("0.5 1:1\n1 1:1\n", {}, "label 0.5 is not an integer"),
    (BINARY, {"loss": "hinge"}, "loss='hinge' is neither 'squares' nor empty"),
    ("1 1:1\n1 1:2\n", {}, r"all labels are \[1.0\]"),
    ("1 0:1\n2 1:2\n", {}, "not in the LIBSVM format .*index 0"),
    ("one two\n", {}, "not in the LIBSVM format"),
    (BINARY, {"test": "set.t"}, r"set.t: label 2 is not one of \[-1.0, 1.0\]"),
    (BINARY, {"test": "./gone.gz"}, "'./gone.gz' does not exist; give the path of a file"),
    (BINARY, {"test": "../"}, "'../' is a folder; give the path of a file"),
    (BINARY, {"sparse": "no"}, "sparse='no' is none of None, True, False"),
    (BINARY, {"sparse": True, "model": classic.mlp()}, "mlp takes dense rows"),
  ],
)
def test_libsvm_refuses(libsvm_task, tmp_path, text, options, message):
  (tmp_path / "set.t").write_text("2 1:1\n-1 1:1\n")
  with pytest.raises(ValueError, match=message) as caught:
    libsvm_task(text, **options)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_libsvm_takes_a_path(libsvm_task, tmp_path, monkeypatch, suffix):
  libsvm_task(BINARY, f"set{suffix}")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "inner").mkdir()
  for name in (f"./set{suffix}", f"inner/../set{suffix}", str(tmp_path / f"set{suffix}")):
    task = libsvm.libsvm(name, test=name, model=classic.logistic())
    np.testing.assert_array_equal(task.train["y"], [0, 1, 0, 1])


def test_libsvm_refuses_a_truncated_path(tmp_path):
  path = tmp_path / "set.gz"
  path.write_bytes(gzip.compress(BINARY.encode())[:-12])
  with pytest.raises(ValueError, match=r"set.gz is truncated or no .gz file") as caught:
    libsvm.libsvm(str(path), model=classic.logistic())
  assert "\n" not in str(caught.value)


def test_libsvm_offline(libsvm_task):
  with pytest.raises(FileNotFoundError, match=r"libsvm/gone is not in .*:9/gone"):
    libsvm_task(BINARY, test="gone")


@pytest.mark.parametrize("sparse", [False, True])
def test_a9a(real_data, sparse):
  task = libsvm.libsvm("a9a", model=classic.logistic(), data_dir=real_data("a9a"), sparse=sparse)
  assert len(task.train["y"]) == 32561
  assert task.train["y"].sum() == 7841
  params = task.init(KEY)
  assert params["kernel"].shape == (123, 1)
  _, gradient = loss_and_grad(task, params, task.train)
  close(gradient["bias"][0], 0.5 - 7841 / 32561)


# --- Images


def test_digits():
  task = vision.digits(model=classic.mlp())
  train, test = task.train, task.test
  assert (train["x"].shape, train["x"].dtype) == ((1440, 8, 8), np.uint8)
  assert test is not None
  assert test["x"].shape == (357, 8, 8)
  counts = np.bincount(train["y"]), np.bincount(test["y"])
  np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 357 / 1797, atol=0.01)
  images, labels = load_digits(return_X_y=True)
  parts = train_test_split(images, labels, test_size=357, stratify=labels, random_state=0)
  for mine, (x, y) in zip((train, test), (parts[::2], parts[1::2]), strict=True):
    np.testing.assert_array_equal(mine["x"].reshape(-1, 64), x)
    np.testing.assert_array_equal(mine["y"], y)
  metrics = jax.jit(lambda key: task.evaluate(task.init(key), test))(KEY)
  assert 1.5 < metrics["loss"] < 3.5


@pytest.mark.parametrize(("count", "seed"), [(30, 1), (180, 2), (300, 3)])
def test_each_class_has_its_share_of_the_test_part(count, seed):
  """Some of the remainders are equal, and the draw decides."""
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), [100] * 4 + [37, 163]))
  rows = np.arange(len(labels))
  want = train_test_split(rows, test_size=count, stratify=labels, random_state=seed)
  for mine, one in zip(vision.stratified(labels, count, seed), want, strict=True):
    np.testing.assert_array_equal(mine, one)


def idx(array):
  header = [bytes([0, 0, 8, array.ndim])] + [n.to_bytes(4) for n in array.shape]
  return b"".join(header) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
  """IDX files of seven and three images, one of them compressed, none with a recorded sha256."""
  monkeypatch.setattr(vision, "MNIST_SHA256", dict.fromkeys(vision.MNIST_SHA256))
  arrays = {}
  for part, n in (("train", 7), ("t10k", 3)):
    rng = np.random.default_rng(n)
    arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28))
    arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n)
  for name, array in arrays.items():
    (tmp_path / name).write_bytes(idx(array))
  plain = tmp_path / "t10k-images-idx3-ubyte"
  plain.with_suffix(".gz").write_bytes(gzip.compress(plain.read_bytes()))
  plain.unlink()
  return tmp_path, arrays


def test_mnist_reads_idx(small_mnist):
  folder, arrays = small_mnist
  task = vision.mnist(model=classic.cnn(), data_dir=str(folder))
  assert task.test is not None
  for part, data in (("train", task.train), ("t10k", task.test)):
    np.testing.assert_array_equal(data["x"], arrays[f"{part}-images-idx3-ubyte"])
    np.testing.assert_array_equal(data["y"], arrays[f"{part}-labels-idx1-ubyte"])
  assert task.train["x"].dtype == np.uint8


def test_mnist_by_parity_tells_odd_from_even(small_mnist):
  folder, arrays = small_mnist
  task = vision.mnist(parity=True, model=classic.logistic(), data_dir=str(folder))
  np.testing.assert_array_equal(task.train["y"], arrays["train-labels-idx1-ubyte"] % 2)
  assert jax.eval_shape(task.init, KEY)["kernel"].shape == (784, 1)
  close(loss_and_grad(task, task.init(KEY), task.train)[0], math.log(2))


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("train-images-idx3-ubyte", idx(np.zeros((7, 784))), "starts with 0x00000802, not 0x00000803"),
    ("train-labels-idx1-ubyte", b"\0\0", "starts with 0x0000, not 0x00000801"),
    ("train-labels-idx1-ubyte", idx(np.zeros(7))[:-1], r"holds \[7\] = 7 bytes, and holds 6"),
    ("train-labels-idx1-ubyte", idx(np.zeros(6)), "has 7 images, and .* 6 labels"),
    ("train-labels-idx1-ubyte", idx(np.full(7, 10)), r"labels from 10 to 10 are not .* \[0, 10\)"),
  ],
)
def test_mnist_refuses_what_is_malformed(small_mnist, name, content, message):
  folder, _ = small_mnist
  (folder / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    vision.mnist(model=classic.mlp(), data_dir=str(folder))


def test_mnist_checks_what_was_published(small_mnist, monkeypatch):
  folder, _ = small_mnist
  monkeypatch.undo()
  with pytest.raises(ValueError, match="expected ba891046e650"):
    vision.mnist(model=classic.mlp(), data_dir=str(folder))


def test_mnist(real_data):
  folder = real_data("train-images-idx3-ubyte")
  task = vision.mnist(model=classic.logistic(), data_dir=folder)
  assert task.test is not None
  assert (task.train["x"].shape, task.test["x"].shape) == ((60000, 28, 28), (10000, 28, 28))
  assert np.bincount(task.train["y"])[:3].tolist() == [5923, 6742, 5958]
  assert abs(task.train["x"].mean() / 255 - 0.1307) < 1e-4
