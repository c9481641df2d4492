"""Adaptive and sign-based methods: transcriptions, what equals what, bytes, ranges."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from problems import SIMULATED, Running, distance, regression
from side_by_side import regressions, side_by_side
from test_decentralized import apart

from research.aggregate.compressed import majority_vote, sum_mean, two_phase
from research.aggregate.feedback import error_feedback
from research.aggregate.gather_mean import gather_mean
from research.aggregate.mean import mean
from research.aggregate.robust.attacks import sign_flip
from research.compress.cast import identity
from research.compress.dct import cosines, dct_top_k
from research.compress.quantize import qsgd
from research.compress.sign import sign
from research.compress.sparsify import random_k, top_k
from research.core.base import Aggregator, Presence
from research.core.method import Method
from research.core.task import Task
from research.methods.data_parallel import data_parallel
from research.methods.demo import demo
from research.methods.marina import coin, marina
from research.methods.onebit_adam import onebit_adam
from research.methods.signum import signum
from research.methods.zero_one_adam import zero_one_adam
from research.parallel import inference, traffic, workers

RATE = optax.linear_schedule(0.05, 0.01, 8)
RISING = optax.linear_schedule(0.0, 0.05, 4)  # begins with a step of zero
SEED = 3  # of the coin: whole gradients in rounds 0 and 3 of the first six
ROUNDS = 6


def one_bit() -> Aggregator:
  return error_feedback(two_phase(sign()))


METHODS = {
  "signum": signum(RATE, majority_vote(), momentum=0.8, weight_decay=0.1),
  "onebit_adam": onebit_adam(RATE, one_bit(), warm_up=2, b2=0.9, weight_decay=0.2),
  "zero_one_adam": zero_one_adam(
    RISING,
    one_bit(),
    warm_up=2,
    variance_scale=1,
    double_every=1,
    longest=2,
    b2=0.9,
    weight_decay=0.5,
  ),
  "demo": demo(0.01, gather_mean(dct_top_k(2, 2)), decay=0.9, weight_decay=0.3),
  "marina": marina(0.1, gather_mean(top_k(0.3)), probability=0.3, seed=SEED),
}


def running(
  methods: Mapping[str, Method],
  executor: str = "simulate",
  axes: Mapping[str, int] = SIMULATED,
  sizes: tuple[int, ...] = (30,) * 8,
  task: Task | None = None,
) -> Running:
  tasks = regressions(tuple(methods), task)
  return Running(side_by_side(methods), executor, axes, sizes, None, task=tasks)


@functools.cache
def simulated() -> Running:
  return running(METHODS).rounds(ROUNDS)


@pytest.mark.slow
def test_a_mesh_that_cuts_a_worker_agrees():
  axes = {"data": 4, "fsdp": 2}
  signs = gather_mean(sign())
  methods = {
    "onebit_adam": onebit_adam(RATE, signs, warm_up=2),
    "zero_one_adam": zero_one_adam(RATE, signs, warm_up=2, double_every=1, longest=2),
    "demo": demo(0.01, gather_mean(dct_top_k(2, 2))),
    "marina": marina(0.1, signs, probability=0.3, seed=SEED),
  }
  got, want = (
    running(methods, e, axes, (60,) * 4).rounds(ROUNDS).params() for e in ("spmd", "simulate")
  )
  for name in methods:
    assert distance(got[name], want[name]) <= 1e-5, name


def flat(tree: Any) -> np.ndarray:
  """The bias first, then the weights, row by row: float64 [..., 21]."""
  lead = np.asarray(tree["b"]).ndim - 1
  parts = [np.asarray(tree[k], np.float64) for k in "bw"]
  return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in parts], -1)


LEAVES = (slice(0, 3), slice(3, 21))


class Workers:
  """Four workers in numpy, with private data of unequal size."""

  sizes = (20, 40, 100, 80)
  shares = np.asarray(sizes)[:, None] / 60

  def __init__(self):
    x, y = (regression().train[k].astype(np.float64) for k in "xy")
    edges = np.cumsum([0, *self.sizes])
    self.data = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]

  def gradients(self, models: np.ndarray) -> np.ndarray:
    """Of every worker at its own model [4, 21], or at a common one [21]."""
    models = np.broadcast_to(models, (4, 21))
    return np.stack([self._one(*pair) for pair in zip(self.data, models, strict=True)])

  def _one(self, data, model):
    x, y = data
    error = x @ model[3:].reshape(6, 3) + model[:3] - y
    return np.concatenate([error.mean(0), (x.T @ error / len(x)).reshape(-1)])

  def mean(self, rows: np.ndarray) -> np.ndarray:
    return (self.shares * rows).mean(0)


class OneBit:
  """Scaled signs with a memory on each worker and one on the server, cut into four chunks."""

  def __init__(self):
    self.memory = np.zeros((4, 21))
    self.owed = [np.zeros((4, 1)), np.zeros((4, 5))]

  def __call__(self, rows: np.ndarray) -> np.ndarray:
    scaled = lambda x: np.abs(x).mean(-1, keepdims=True) * np.where(x >= 0, 1, -1)
    corrected, value = rows + self.memory, np.zeros(21)
    for leaf, (place, owed) in enumerate(zip(LEAVES, self.owed, strict=True)):
      size = place.stop - place.start
      chunks = np.hstack([corrected[:, place], np.zeros((4, -size % 4))]).reshape(4, 4, -1)
      sent = scaled(chunks)
      self.memory[:, place] = corrected[:, place] - sent.reshape(4, -1)[:, :size]
      owed = owed + sent.mean(0)
      answer = scaled(owed)
      self.owed[leaf] = owed - answer
      value[place] = answer.reshape(-1)[:size]
    return value


Course = Iterator[np.ndarray]


def numpy_signum(ours: Workers, x: np.ndarray) -> Course:
  v = np.zeros((4, 21))
  for k in itertools.count():
    v = 0.8 * v + 0.2 * ours.gradients(x)
    ayes = (v >= 0).sum(0)
    x = x - rate(RATE, k) * (np.where(2 * ayes >= 4, 1, -1) + 0.1 * x)
    yield x


def numpy_onebit_adam(ours: Workers, x: np.ndarray) -> Course:
  m, v, send = np.zeros(21), np.zeros(21), OneBit()
  for t in itertools.count(1):
    if t <= 2:
      g = ours.mean(ours.gradients(x))
      m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g**2
    else:
      m = send(ours.shares * (0.9 * m + 0.1 * ours.gradients(x)))
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.9 ** min(t, 2))
    x = x - rate(RATE, t - 1) * (m_hat / (np.sqrt(v_hat) + 1e-8) + 0.2 * x)
    yield x


def numpy_zero_one_adam(ours: Workers, x: np.ndarray) -> Course:
  m, u, v, send = np.zeros((4, 21)), np.zeros((4, 21)), np.zeros(21), OneBit()
  models, total = np.tile(x, (4, 1)), 0.0
  for t in itertools.count():
    g, gamma = ours.gradients(models), rate(RISING, t)
    kept = 1 - 0.5 * gamma
    v = 0.9 * v + 0.1 * ours.mean(g) ** 2 if t in (0, 1) else v
    m = 0.9 * m + 0.1 * g
    models = kept * models - gamma * m / np.sqrt(v + 1e-8)  # AdamW on each worker
    u, x, total = kept * u + gamma * m, kept * x, kept * total + gamma
    if t in (0, 1, 2, 3, 5):
      mean_u = send(ours.shares * u)
      x = x - mean_u / np.sqrt(v + 1e-8)
      m = np.tile(mean_u / total, (4, 1)) if total > 0 else m
      models, u, total = np.tile(x, (4, 1)), np.zeros((4, 21)), 0.0
    yield models.mean(0)


def numpy_demo(ours: Workers, x: np.ndarray) -> Course:
  m = np.zeros((4, 21))
  for _ in itertools.count():
    m = 0.9 * m + ours.shares * ours.gradients(x)
    q = np.stack([np.concatenate([fast(row[:3], (1, 2)), fast(row[3:], (2, 2))]) for row in m])
    m = m - q
    x = x - 0.01 * (np.sign(q.mean(0)) + 0.3 * x)
    yield x


def fast(leaf: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
  """The two largest cosine coefficients of each block."""
  rows = leaf.reshape(-1, 3)
  rows = np.hstack([rows, np.zeros((len(rows), 1))])  # four columns: two blocks
  found = np.zeros_like(rows)
  for i, j in itertools.product(range(0, len(rows), sides[0]), (0, 2)):
    block = np.s_[i : i + sides[0], j : j + 2]
    spectrum = np.array(scipy.fft.dctn(rows[block], norm="ortho"))
    smallest = np.argsort(np.abs(spectrum), axis=None)[:-2]
    spectrum.flat[smallest] = 0
    found[block] = np.array(scipy.fft.idctn(spectrum, norm="ortho"))
  return found[:, :3].reshape(-1)


def numpy_marina(ours: Workers, x: np.ndarray) -> Course:
  estimate, last = np.zeros(21), np.zeros((4, 21))
  for k in itertools.count():
    grads = ours.gradients(x)
    change = ours.shares * (grads - last)
    whole = k in (0, 3)
    estimate = ours.mean(grads) if whole else estimate + np.mean([*map(largest, change)], 0)
    x, last = x - 0.1 * estimate, grads
    yield x


def largest(row: np.ndarray) -> np.ndarray:
  """The largest element of the bias and the five largest of the weights."""
  found = np.zeros_like(row)
  for place, count in zip(LEAVES, (1, 5), strict=True):
    chosen = np.argsort(-np.abs(row[place]), kind="stable")[:count] + place.start
    found[chosen] = row[chosen]
  return found


def rate(schedule: optax.Schedule, step: int) -> float:
  return float(np.asarray(schedule(step)))


def test_rounds_equal_numpy():
  """Six rounds, so that each method goes through all of its phases."""
  ours, run = Workers(), running(METHODS, axes={"data": 4}, sizes=Workers.sizes)
  start = flat(run.params()["signum"])
  courses = {name: globals()[f"numpy_{name}"](ours, start) for name in METHODS}
  for _ in range(ROUNDS):
    found = run.rounds(1).params()
    for name, course in courses.items():
      np.testing.assert_allclose(flat(found[name]), next(course), atol=5e-6, err_msg=name)


ADAM = optax.adam(0.02)
# Adam without bias correction, as a schedule of Adam with it
PLAIN = optax.adam(lambda t: 0.02 * (1 - 0.9 ** (t + 1)) / jnp.sqrt(1 - 0.999 ** (t + 1)), eps=0.0)
# name -> method, and the optimizer that it is on the mean gradient
SAME: dict[str, tuple[Method, optax.GradientTransformation]] = {
  "signum": (signum(0.01, mean(), momentum=0.0), optax.sign_sgd(0.01)),
  "warming up": (onebit_adam(0.02, gather_mean(sign()), warm_up=5), ADAM),
  "decayed": (
    onebit_adam(0.02, gather_mean(sign()), warm_up=5, weight_decay=0.1),
    optax.adamw(0.02, weight_decay=0.1),
  ),
  "no local step": (zero_one_adam(0.02, mean(), variance_scale=5, eps=1e-16), PLAIN),
  "all is sent": (demo(0.01, gather_mean(identity())), optax.sign_sgd(0.01)),
  "no difference is lost": (marina(0.1, gather_mean(identity()), seed=SEED), optax.sgd(0.1)),
  "whole gradients": (marina(0.1, gather_mean(sign()), probability=1.0), optax.sgd(0.1)),
  "lion": (data_parallel(optax.lion(0.01), mean()), optax.lion(0.01)),
  "lamb": (data_parallel(optax.lamb(0.01), mean()), optax.lamb(0.01)),
  "lars": (data_parallel(optax.lars(0.1), mean()), optax.lars(0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 8}], ids=str)
def test_special_cases_are_plain_optimizers(axes):
  methods, task = {name: method for name, (method, _) in SAME.items()}, regression()
  sizes = {1: (240,), 8: (30, 20, 40, 30, 10, 50, 30, 30)}[axes["data"]]
  run = running(methods, axes=axes, sizes=sizes)
  start = run.params()["signum"]

  def optimized(optimizer):
    params, state = start, optimizer.init(start)
    for _ in range(5):
      grads = jax.grad(task.loss)(params, task.train, None)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  want = jax.jit(lambda: {name: optimized(optimizer) for name, (_, optimizer) in SAME.items()})()
  found = run.rounds(5).params()
  for name in SAME:
    assert distance(found[name], want[name]) <= 1e-5, name


def solution(task: Task) -> dict[str, np.ndarray]:
  x, y = (task.train[k].astype(np.float64) for k in "xy")
  solved = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y)[0]
  return {"b": solved[-1], "w": solved[:-1]}


@pytest.mark.slow
def test_all_of_them_train():
  """The vote in spite of three workers of eight that always vote against what they see."""
  fall = optax.exponential_decay(0.1, 40, 0.5)
  methods = {
    "signum": signum(fall, sign_flip(majority_vote(), faulty=3)),
    "onebit_adam": onebit_adam(fall, one_bit(), warm_up=20),
    "zero_one_adam": zero_one_adam(fall, one_bit(), warm_up=20, double_every=50, longest=4),
    "demo": demo(fall, gather_mean(dct_top_k(3, 2)), decay=0.9),
    "marina": marina(0.1, sum_mean(random_k(0.3, unbiased=True))),
  }
  run = running(methods).rounds(250)
  optimum = solution(regression())
  errors = {name: distance(params, optimum) for name, params in run.params().items()}
  assert max(errors.values()) <= 0.05, errors


@pytest.mark.slow
def test_marina_is_exact_where_compressed_descent_stalls():
  """The workers' objectives differ, so that their gradients do not vanish at the optimum."""
  task, optimum = apart()
  rough = gather_mean(qsgd(1))
  methods = {
    "marina": marina(0.05, rough, probability=0.2),
    "descent": data_parallel(optax.sgd(0.05), rough),
  }
  run = running(methods, task=task).rounds(500)
  errors = {name: distance(params, optimum) for name, params in run.params().items()}
  assert errors["marina"] <= 1e-5, errors
  assert errors["descent"] >= 0.01, errors


@pytest.mark.slow
def test_what_never_had_a_gradient_stays_where_it_is():
  """A feature that is always zero: its variance is, and a sign is not."""
  task = regression()
  x = task.train["x"] * (np.arange(6) != 2)
  names = ("onebit_adam", "zero_one_adam")
  methods = {n: METHODS[n].replace(weight_decay=0.0) for n in names}
  run = running(methods, task=task._replace(train={**task.train, "x": x}))
  start = run.params()
  found = run.rounds(10).params()
  for name in names:
    moved = found[name]["w"] != start[name]["w"]
    assert moved.all(1).tolist() == [True, True, False, True, True, True]
    assert moved.any(1).tolist() == moved.all(1).tolist()


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40])
def test_the_coin_is_fair_and_does_not_repeat(seed):
  rounds = jnp.arange(10_000, dtype=jnp.int32)
  for p in (0.02, 0.5, 0.9):
    heads = np.asarray(jax.vmap(lambda k, p=p: coin(k, p, seed))(rounds))
    assert abs(heads.mean() - p) <= 3 * np.sqrt(p * (1 - p) / len(heads))
    centred = heads - heads.mean()
    spectrum = np.abs(np.fft.rfft(centred)) ** 2 / (len(heads) * p * (1 - p))
    assert spectrum.max() <= 3 * np.log(len(spectrum))  # of noise: about log of their number
    other = np.asarray(jax.vmap(lambda k, p=p: coin(k, p, seed + 1))(rounds))
    assert abs(np.corrcoef(heads, other)[0, 1]) <= 0.05
  assert bool(jnp.all(coin(rounds, 1.0, seed)))


def test_when_zero_one_adam_talks():
  """The j-th interval of T_v is 2^floor(j / 3); that of T_u doubles every 5 rounds up to 4."""
  policy = zero_one_adam(0.1, mean(), warm_up=40, variance_scale=3, double_every=5, longest=4)
  rounds = jnp.arange(80, dtype=jnp.int32)
  variance = list(itertools.accumulate((2 ** (j // 3) for j in range(20)), initial=0))
  found = np.flatnonzero(jax.vmap(policy.refreshes)(rounds))
  assert (
    found.tolist() == [t for t in variance if t < 40] == [0, 1, 2, 3, 5, 7, 9, 13, 17, 21, 29, 37]
  )
  found = np.flatnonzero(jax.vmap(policy.synchronises)(rounds))
  assert found.tolist() == [*range(45), 45, 47, 49, *range(51, 80, 4)]


@pytest.mark.slow
def test_what_is_private():
  """Momenta and what is kept of them; models, variances, estimates and counters are kept once."""
  private = {
    name: {
      jax.tree_util.keystr(path[:1], simple=True)
      for path, is_private in jax.tree_util.tree_leaves_with_path(state)
      if is_private
    }
    for name, state in simulated().layout.state.items()
  }
  assert private == {
    "signum": {"momentum"},
    "onebit_adam": {"link"},
    "zero_one_adam": {"momentum", "buffer", "link"},
    "demo": {"momentum"},
    "marina": set(),
  }


def sent(method: Method, rounds: int) -> np.ndarray:
  """Bytes by round of each of eight with 512 x 64 numbers, over those of a dense mean."""
  shapes = {"w": jnp.zeros((512, 64))}
  loss = lambda params, batch, key: jnp.sum(params["w"] ** 2) * jnp.mean(batch["x"])
  task = regression()._replace(init=lambda key: shapes, loss=loss)
  job = workers.Job(method, task, SIMULATED, np.full(8, 30), None)
  dense = 2 * 7 / 8 * 4 * 512 * 64
  return traffic.of_method(job, inference.layout_of(job), rounds).sent / dense


def test_bytes_are_known_round_by_round():
  """A sign is a 32nd of a number; signs and their scales, less than a 30th."""
  vote = sent(signum(0.1, majority_vote()), 4)
  np.testing.assert_allclose(vote, [1 / 32] * 4)
  bits = sent(onebit_adam(0.1, one_bit(), warm_up=3), 6)
  np.testing.assert_allclose(bits[:3], 1)
  assert (bits[3:] > 1 / 32).all()
  assert (bits[3:] < 1 / 30).all()
  method = zero_one_adam(0.1, one_bit(), warm_up=4, variance_scale=1, double_every=2, longest=4)
  signs = bits[-1]
  refreshed = np.asarray([1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
  synchronised = np.asarray([1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1])
  np.testing.assert_allclose(sent(method, 12), refreshed + signs * synchronised)
  blocks = sent(demo(0.1, gather_mean(dct_top_k(64, 8))), 2)  # eight blocks of 64 x 64
  np.testing.assert_allclose(blocks, 7 * 8 * 8 * (4 + 12 / 8) / (2 * 7 / 8 * 4 * 512 * 64))


def test_bytes_follow_the_coin():
  found = sent(marina(0.1, sum_mean(random_k(0.1)), probability=0.3, seed=SEED), 200)
  heads = np.asarray([k == 0 or bool(coin(jnp.int32(k), 0.3, SEED)) for k in range(200)])
  np.testing.assert_allclose(found, np.where(heads, 1, 3277 / (512 * 64)))
  assert np.flatnonzero(heads[:ROUNDS]).tolist() == [0, 3]


def test_an_inactive_worker_is_left_out_and_keeps_what_it_had():
  """Whatever its gradient; the others count as if they were alone."""
  grads = {"w": jnp.asarray([1.0, -2.0, np.nan, 4.0])}
  weight, active = jnp.asarray([1.0, 1.0, 0.0, 2.0]), jnp.asarray([True, True, False, True])

  def after(method: Method) -> Any:
    def sync(grads, weight, active):
      state = method.init({"w": jnp.zeros(())})
      local = method.begin(state)._replace(grads=grads)
      return method.sync(local, state, key=jax.random.key(0), presence=Presence(weight, active))

    return jax.jit(jax.vmap(sync, axis_name="data"))(grads, weight, active)

  momentum = after(signum(0.1, mean(), momentum=0.5))
  np.testing.assert_allclose(momentum.params["w"], -0.1)
  np.testing.assert_allclose(momentum.momentum["w"], [0.5, -1, 0, 2])
  adam = after(onebit_adam(0.1, mean(), warm_up=1))
  np.testing.assert_allclose(adam.momentum["w"], 0.1 * 7 / 4, rtol=1e-6)
  local = after(zero_one_adam(0.1, mean(), b1=0.5))
  mean_of_all = 0.5 * 7 / 4
  np.testing.assert_allclose(local.momentum["w"], [*[mean_of_all] * 2, 0, mean_of_all], rtol=1e-6)
  kept = after(demo(0.1, gather_mean(identity())))
  np.testing.assert_allclose(kept.params["w"], -0.1)
  np.testing.assert_allclose(kept.momentum["w"], 0)
  np.testing.assert_allclose(after(marina(0.1, mean())).estimate["w"], 7 / 4)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_cosine_transform_is_scipys(size):
  want = np.asarray(scipy.fft.dct(np.eye(size), norm="ortho", axis=0))
  np.testing.assert_allclose(cosines(size), want, atol=1e-12)


def test_cosine_coefficients_hold_what_is_smooth():
  """A wave of one frequency in each direction is one coefficient, however large the block."""
  wave = np.outer(cosines(64)[3], cosines(48)[5]).astype(np.float32)
  compressor, key = dct_top_k(64, 1), jax.random.key(0)
  payload = jax.jit(compressor.encode)(wave, key, key)
  assert sum(x.nbytes for x in jax.tree.leaves(payload)) == 4 + 2
  like = jax.ShapeDtypeStruct(wave.shape, jnp.float32)
  decoded = jax.jit(lambda payload: compressor.decode(payload, like, key))(payload)
  np.testing.assert_allclose(decoded, wave, atol=1e-6)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: signum(0.0, mean()), "learning_rate=0.0 is not above 0"),
    (lambda: signum(0.1, mean(), momentum=1.0), r"momentum=1.0 is not in \[0, 1\)"),
    (lambda: signum(0.1, mean(), weight_decay=-0.1), "weight_decay=-0.1 is not at least 0"),
    (lambda: onebit_adam(-1.0, mean()), "learning_rate=-1.0"),
    (lambda: onebit_adam(0.1, mean(), warm_up=0), "warm_up=0 is not at least 1"),
    (lambda: onebit_adam(0.1, mean(), b2=1.0), r"b2=1.0 is not in \[0, 1\)"),
    (lambda: onebit_adam(0.1, mean(), eps=0.0), "eps=0.0 is not above 0"),
    (lambda: zero_one_adam(0.1, mean(), weight_decay=-1.0), "weight_decay=-1.0 is not at least 0"),
    (lambda: demo(0.1, mean(), weight_decay=-1.0), "weight_decay=-1.0 is not at least 0"),
    (lambda: zero_one_adam(0.1, mean(), variance_scale=0), "variance_scale=0 is not at least 1"),
    (lambda: zero_one_adam(0.1, mean(), double_every=0), "double_every=0 is not at least 1"),
    (lambda: zero_one_adam(0.1, mean(), longest=6), "longest=6 is not a power of two"),
    (lambda: demo(0.1, mean(), decay=1.0), r"decay=1.0 is not in \[0, 1\)"),
    (lambda: marina(0.1, mean(), probability=0.0), r"probability=0.0 is not in \(0, 1\]"),
    (lambda: dct_top_k(chunk=0), "chunk=0 is not at least 1"),
    (lambda: dct_top_k(4, 17), r"k=17 is not in \[1, chunk\^2\] = \[1, 16\]"),
  ],
)
def test_ranges_are_checked_when_built(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_marina_asks_for_gradients_elsewhere():
  method = marina(0.1, mean())
  state = method.init({"w": jnp.zeros(2)})
  with pytest.raises(ValueError, match="pass grad_fn"):
    method.step({"w": jnp.ones(2)}, method.begin(state), state, key=jax.random.key(0))
