"""Decentralized descent: its recursions in numpy, and what the papers prove of it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SIMULATED, Running, distance, regression
from side_by_side import regressions, side_by_side
from test_gossip import one_way

from research.aggregate.choco import choco
from research.aggregate.gossip import gossip, push_sum
from research.aggregate.mean import mean
from research.comm import topology
from research.comm.mixing import mixing
from research.comm.topology import Topology
from research.compress.quantize import int8
from research.core.method import Method
from research.core.task import Task
from research.methods.consensus import admm, extra, gradient_tracking
from research.methods.data_parallel import data_parallel
from research.methods.decentralized import d_psgd, dgd, sgp
from research.methods.local import local_sgd
from research.parallel import inference, traffic
from research.parallel import layout as layouts
from research.parallel.job import Job

SGD, MOMENTUM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.5)

one_peer = topology.one_peer_exponential
GRAPHS = ("ring", "star", "exponential", "one_peer_exponential")
# name -> method, given W
METHODS: dict[str, Callable[[int], Method]] = {
  "d_psgd": lambda count: d_psgd(SGD, gossip(topology.star())),
  "choco_sgd": lambda count: d_psgd(SGD, choco(int8(), topology.torus(), gamma=0.5)),
  "sgp": lambda count: sgp(MOMENTUM, one_way(count) if count > 1 else one_peer()),
  "dgd": lambda count: dgd(0.1, gossip(topology.exponential())),
  "tracking": lambda count: gradient_tracking(0.1, gossip(one_peer())),
  "extra": lambda count: extra(0.1, gossip(topology.ring())),
  "admm": lambda count: admm(0.1, gossip(topology.ring()), penalty=2.0),
}
SIZES = (30, 20, 40, 30, 10, 50, 30, 30)


def together(count: int) -> Method:
  return side_by_side({name: make(count) for name, make in METHODS.items()})


def running(executor: str, axes: dict[str, int], sizes: tuple[int, ...] = SIZES) -> Running:
  """All methods in one program."""
  task, found = regressions(tuple(METHODS)), layout_of(tuple(axes.items()), sizes)
  with pytest.MonkeyPatch.context() as patch:  # it is the same for every executor, and takes time
    patch.setattr(inference, "layout_of", lambda job: found)
    return Running(together(len(sizes)), executor, axes, sizes, None, task=task)


@functools.cache
def layout_of(axes: tuple[tuple[str, int], ...], sizes: tuple[int, ...]) -> layouts.Layout:
  method, task = together(len(sizes)), regressions(tuple(METHODS))
  return inference.layout_of(Job(method, task, dict(axes), np.asarray(sizes), None))


@functools.cache
def simulated() -> Running:
  return running("simulate", SIMULATED).rounds(5)


@pytest.mark.slow
def test_executions_agree():
  got, want = running("pmap", SIMULATED).rounds(5), simulated().params()
  for name in METHODS:
    assert distance(got.params()[name], want[name]) <= 1e-5, name
  assert bool(got.metrics["finite"])


@pytest.mark.slow
def test_a_mesh_that_cuts_a_worker_agrees():
  axes = {"data": 4, "fsdp": 2}
  got, want = (running(e, axes, (60,) * 4).rounds(5).params() for e in ("spmd", "simulate"))
  for name in METHODS:
    assert distance(got[name], want[name]) <= 1e-5, name


@pytest.mark.slow
def test_one_worker_is_the_inner_optimizer():
  run = running("simulate", {"data": 1}, (240,)).rounds(5)
  task = regression()
  for name in METHODS:
    momentum = 0.5 if name == "sgp" else 0.0
    params = regression().init(jax.random.split(jax.random.key(0))[0])
    velocity = jax.tree.map(jnp.zeros_like, params)
    for _ in range(5):
      grads = jax.grad(task.loss)(params, task.train, None)
      velocity = jax.tree.map(lambda v, g, m=momentum: m * v + g, velocity, grads)
      params = jax.tree.map(lambda x, v: x - 0.1 * v, params, velocity)
    assert distance(run.params()[name], params) <= 1e-6, name


def models(run: Running) -> dict[str, np.ndarray]:
  """Every worker's model [W, 21], by method: the bias first, then the weights."""
  in_axes = (layouts.lead(run.layout.state),)
  count = run.job.workers
  found = jax.vmap(run.job.method.params, in_axes, axis_size=count)(run.state.method)
  flat = lambda tree: np.concatenate([np.reshape(tree[k], (count, -1)) for k in "bw"], 1)
  return {name: flat(tree).astype(np.float64) for name, tree in found.items()}


# The recursions as the papers write them: rows are workers, g(X) their weighted gradients.
def numpy_d_psgd(x, w, g):
  while True:
    x = w @ (x - 0.1 * g(x))
    yield x


def numpy_sgp(x, p, g):
  z, y, v = x, np.ones((len(x), 1)), np.zeros_like(x)
  while True:
    v = 0.5 * v + g(z)
    x, y = p @ (x - 0.1 * v), p @ y
    z = x / y
    yield z


def numpy_dgd(x, w, g):
  while True:
    x = w @ x - 0.1 * g(x)
    yield x


def numpy_tracking(x, matrices, g):
  y = g(x)
  while True:
    for w in matrices:
      x, last = w @ x - 0.1 * y, x
      y = w @ y + g(x) - g(last)
      yield x


def numpy_extra(x, w, g):
  half = (np.eye(len(w)) + w) / 2
  last, x = x, w @ x - 0.1 * g(x)
  while True:
    yield x
    x, last = x + w @ x - half @ last - 0.1 * (g(x) - g(last)), x


def numpy_admm(x, w, g):
  laplacian, dual = 2.0 * (np.eye(len(w)) - w), np.zeros_like(x)
  proximal = 1 / 0.1 - 2 * 2.0
  while True:
    x = x - (g(x) + laplacian @ x + dual) / (2 * 2.0 + proximal)
    dual = dual + laplacian @ x
    yield x


def test_three_steps_equal_numpy():
  """Four workers with unequal weights, every worker's model in each round."""
  sizes, task = (20, 40, 100, 80), regression()
  run = running("simulate", {"data": 4}, sizes)
  x, y = (task.train[k].astype(np.float64) for k in "xy")
  x = np.hstack([np.ones((240, 1)), x])  # the bias first, as in the tree's order
  parts = np.split(np.arange(240), np.cumsum(sizes)[:-1])

  def g(models):
    each = zip(models.reshape(4, 7, 3), parts, strict=True)
    grads = [x[rows].T @ (x[rows] @ m - y[rows]) / 60 for m, rows in each]
    return np.stack(grads).reshape(4, 21)

  begin = models(run)["dgd"]
  w = {name: mixing(getattr(topology, name)(), 4) for name in GRAPHS}
  recursions = {
    "d_psgd": numpy_d_psgd(begin, w["star"][0], g),
    "sgp": numpy_sgp(begin, mixing(one_way(4), 4)[0], g),
    "dgd": numpy_dgd(begin, w["exponential"][0], g),
    "tracking": numpy_tracking(begin, w["one_peer_exponential"], g),
    "extra": numpy_extra(begin, w["ring"][0], g),
    "admm": numpy_admm(begin, w["ring"][0], g),
  }
  for _ in range(3):
    before = models(run)
    found = models(run.rounds(1))
    for name, recursion in recursions.items():
      np.testing.assert_allclose(found[name], next(recursion), atol=2e-6, err_msg=name)
    for name in ("d_psgd", "dgd"):  # the mean model moves by the mean gradient alone
      moved = before[name].mean(0) - 0.1 * g(before[name]).mean(0)
      np.testing.assert_allclose(found[name].mean(0), moved, atol=1e-6)


def apart(shares: np.ndarray | None = None) -> tuple[Task, dict[str, np.ndarray]]:
  """A regression in which each of 8 workers has a truth of its own, and what solves all of them.

  With `shares` [8] the solution is that of an objective in which the workers count so.
  """
  task = regression()
  x, y = task.train["x"], task.train["y"]
  truths = np.random.default_rng(5).normal(size=(8, x.shape[1], y.shape[1]))
  y = y + np.einsum("wnf,wfo->wno", x.reshape(8, -1, x.shape[1]), truths).reshape(y.shape)
  root = np.repeat(np.ones(8) if shares is None else np.sqrt(shares), len(x) // 8)[:, None]
  solved = np.linalg.lstsq(root * np.hstack([x, np.ones((len(x), 1))]), root * y)[0]
  train = {"x": x, "y": y.astype(np.float32)}
  return task._replace(train=train), {"b": solved[-1], "w": solved[:-1]}


@pytest.mark.slow
def test_who_reaches_the_exact_optimum():
  """With a constant step size, every worker's model, where the workers' objectives differ."""
  exact = {
    "tracking": gradient_tracking(0.05, gossip(topology.ring())),
    "varying": gradient_tracking(0.05, gossip(one_peer())),
    "extra": extra(0.1, gossip(topology.ring())),
    "admm": admm(0.1, gossip(topology.ring()), penalty=4.0),
  }
  biased = {
    "dgd": dgd(0.1, gossip(topology.ring())),
    "dgd_half": dgd(0.05, gossip(topology.ring())),
    "d_psgd": d_psgd(SGD, gossip(topology.ring())),
  }
  one, solution = apart()
  task = regressions((*exact, *biased), one)
  run = Running(side_by_side(exact | biased), "simulate", SIMULATED, batch_size=None, task=task)
  run.rounds(600)
  optimum = np.concatenate([np.ravel(solution[k]) for k in "bw"])
  errors = {n: np.abs(m - optimum).max() / np.abs(optimum).max() for n, m in models(run).items()}
  assert all(errors[name] <= 1e-5 for name in exact), errors
  assert all(errors[name] >= 0.01 for name in biased), errors
  assert 1.5 <= errors["dgd"] / errors["dgd_half"] <= 2.5, errors  # proportional to the step


def test_stochastic_gradient_push_weighs_all_workers_alike():
  """With falling steps it nears the optimum of all; by weights of the graph it would not."""
  task, solution = apart()
  favoured = np.linalg.matrix_power(mixing(one_way(8), 8)[0], 200)[:, 0]
  assert distance(apart(favoured)[1], solution) >= 0.05
  rate = lambda count: 0.2 / (1 + count / 20)
  run = Running(sgp(optax.sgd(rate), one_way(8)), "simulate", SIMULATED, (30,) * 8, None, task=task)
  assert distance(run.rounds(3000).params(), solution) <= 0.01


@pytest.mark.slow
def test_the_complete_graph_is_parallel_and_local_sgd():
  everybody = gossip(topology.complete())
  pairs = {
    "parallel": (d_psgd(SGD, everybody), data_parallel(SGD, mean())),
    "local": (d_psgd(SGD, everybody, period=3), local_sgd(SGD, mean(), period=3)),
  }
  for name, pair in pairs.items():
    got, want = (Running(m, "simulate", SIMULATED, SIZES).rounds(4).params() for m in pair)
    assert distance(got, want) <= 1e-6, name


@pytest.mark.parametrize("count", [8, 64])
def test_bytes_follow_the_degree(count):
  """84 bytes of parameters per link on a ring, two links; sgp sends its weight too."""
  ring, sizes = topology.ring(), (4,) * count
  for method, sent in (
    (d_psgd(SGD, gossip(ring)), 2 * 84),
    (dgd(0.1, gossip(ring)), 2 * 84),
    (extra(0.1, gossip(ring)), 2 * 84),
    (admm(0.1, gossip(ring)), 2 * 84),
    (gradient_tracking(0.1, gossip(ring)), 2 * 2 * 84),
    (sgp(SGD, one_peer()), 84 + 4),
    (d_psgd(SGD, choco(int8(), ring, gamma=0.5)), 2 * (21 + 2 * 4)),
  ):
    task = regression(4 * count)
    job = Job(method, task, {"data": count}, np.asarray(sizes), None)
    found = traffic.of_method(job, inference.layout_of(job), 3)
    np.testing.assert_allclose(found.sent, [sent] * 3)


def test_a_varying_graph_is_followed_round_by_round():
  """Two links in even rounds, seven in odd ones."""

  class Both(Topology):
    varying = True

    def rounds(self, count):
      return topology.ring().rounds(count) + topology.complete().rounds(count)

  method = d_psgd(SGD, gossip(Both()))
  run = Running(method, "simulate", SIMULATED, batch_size=None)
  sent = traffic.of_method(run.job, run.layout, 5).sent
  np.testing.assert_allclose(sent, [2 * 84, 7 * 84, 2 * 84, 7 * 84, 2 * 84])


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: d_psgd(SGD, gossip(topology.ring()), period=0), "period=0"),
    (lambda: d_psgd(SGD, push_sum(one_way(4))), "weighted.*sgp"),
    (lambda: gradient_tracking(0.1, push_sum(one_way(4))), "weighted.*sgp"),
    (lambda: extra(0.1, gossip(topology.exponential())), "symmetric"),
    (lambda: admm(0.1, gossip(one_peer())), "symmetric|same weights"),
    (lambda: dgd(0.0, gossip(topology.ring())), "learning_rate=0.0"),
    (lambda: admm(0.1, mean(), penalty=0.0), "penalty=0.0"),
    (lambda: admm(0.5, mean(), penalty=2.0), "above 1/.2 penalty. = 0.25"),
  ],
)
def test_what_makes_no_sense_is_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()
