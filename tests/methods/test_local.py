"""Methods with local steps: transcriptions, what equals what, bytes, ranges."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance, regression, split
from side_by_side import regressions, side_by_side
from subset import slow_except

from research.aggregate.compressed import two_phase
from research.aggregate.feedback import error_feedback
from research.aggregate.mean import mean
from research.compress.quantize import int8
from research.core.base import Presence
from research.core.method import Method
from research.methods.data_parallel import data_parallel
from research.methods.diloco import diloco
from research.methods.eager_diloco import eager_diloco
from research.methods.easgd import eamsgd, easgd
from research.methods.federated import fed_avg, fed_opt
from research.methods.hierarchical_local import hierarchical_local_sgd
from research.methods.late import late
from research.methods.local import local_sgd
from research.methods.overlap_local_sgd import overlap_local_sgd
from research.methods.post_local import post_local_sgd
from research.methods.restarted import restarted
from research.methods.slow_mo import slow_mo
from research.methods.streaming_diloco import streaming_diloco
from research.optim.transform import as_optax
from research.parallel import inference, traffic
from research.parallel.job import Job

SIZES = (10, 20, 30, 20)  # examples by worker: their weights differ
SHARES = np.asarray(SIZES) / np.mean(SIZES)
TASK = regression(sum(SIZES))
EVERYONE = range(4)
FLAT, SLICED = {"data": 4}, {"slice": 2, "data": 2}
ROUNDS = 5
RATE = optax.linear_schedule(0.2, 0.02, 12)
INNER = optax.sgd(RATE, momentum=0.5)
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
FAST, SLOW = mean(axis="data"), mean(axis="slice")

METHODS = {
  "local": local_sgd(INNER, mean(), period=3),
  "post_local": post_local_sgd(INNER, mean(), period=3, switch=2),
  "hierarchical": hierarchical_local_sgd(INNER, FAST, SLOW, inner_period=2, outer_period=2),
  "slow_mo": slow_mo(
    INNER, mean(), period=2, learning_rate=RATE, slow_learning_rate=0.8, slow_momentum=0.6
  ),
  "easgd": easgd(INNER, mean(), period=3, alpha=0.2),
  "eamsgd": eamsgd(0.1, mean(), momentum=0.8, period=3, alpha=0.2),
  "diloco": diloco(INNER, NESTEROV, mean(), period=3),
  "streaming": streaming_diloco(
    INNER, NESTEROV, mean(), period=6, fragments=2, delay=4, mixing=0.3
  ),
  "streaming_late": streaming_diloco(
    INNER, NESTEROV, mean(), period=4, fragments=2, delay=2, mixing=0.0
  ),
  "late": late(diloco(INNER, NESTEROV, mean(), period=3), 2),
  "later_than_a_round": late(diloco(INNER, NESTEROV, mean(), period=3), 4),
  "two_rounds_late": late(local_sgd(INNER, mean(), period=2), 4),
  "eager_diloco": eager_diloco(INNER, NESTEROV, mean(), period=3),
  "overlap_local_sgd": overlap_local_sgd(INNER, mean(), period=3, alpha=0.6, momentum=0.7),
}


def axes_of(name: str) -> dict[str, int]:
  return SLICED if name == "hierarchical" else FLAT


def running(method: Method, axes=FLAT, executor: str = "simulate", sizes=SIZES) -> Running:
  return Running(method, executor, axes, sizes, None, task=regression(sum(sizes)))


@functools.cache
def models(names: tuple[str, ...], executor: str = "simulate"):
  """The models of several methods after five rounds of one program."""
  method = side_by_side({name: METHODS[name].over(lambda inner: inner) for name in names})
  run = Running(method, executor, axes_of(names[0]), SIZES, None, task=regressions(names, TASK))
  return run.rounds(ROUNDS).params()


def alike(name: str) -> tuple[str, ...]:
  """The methods with rounds of as many steps, on the same axes."""
  of = lambda name: (METHODS[name].local_steps, axes_of(name))
  return tuple(other for other in METHODS if of(other) == of(name))


def simulated(name: str):
  return models(alike(name))[name]


def start():
  """Where every run begins."""
  return regression(sum(SIZES)).init(jax.random.split(jax.random.key(0))[0])


def rate(step: int) -> float:
  return float(np.asarray(RATE(step)))


class Transcribed:
  """Workers in numpy: parameters [7, 3], the bias last, and a momentum each."""

  def __init__(self):
    task, edges = regression(sum(SIZES)), np.cumsum([0, *SIZES])
    self.start = np.vstack([start()["w"], start()["b"]]).astype(np.float64)
    x, y = (np.asarray(task.train[name], np.float64) for name in "xy")
    x = np.hstack([x, np.ones((len(x), 1))])
    self.data = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    self.x = [self.start.copy() for _ in SIZES]
    self.momentum = [np.zeros_like(self.start) for _ in SIZES]
    self.steps = 0

  def gradient(self, worker: int, x: np.ndarray) -> np.ndarray:
    a, y = self.data[worker]
    return a.T @ (a @ x - y) / len(y)

  def step(self) -> None:
    """One step of heavy ball on every worker."""
    for i in range(4):
      self.momentum[i] = 0.5 * self.momentum[i] + self.gradient(i, self.x[i])
      self.x[i] = self.x[i] - rate(self.steps) * self.momentum[i]
    self.steps += 1

  def mean(self, which: Sequence[int] = EVERYONE) -> np.ndarray:
    return np.average([self.x[i] for i in which], 0, SHARES[list(which)])

  def everywhere(self, x: np.ndarray, which: Sequence[int] = EVERYONE) -> None:
    for i in which:
      self.x[i] = x


def local(ours: Transcribed) -> np.ndarray:
  for _ in range(ROUNDS):
    for _ in range(3):
      ours.step()
    ours.everywhere(ours.mean())
  return ours.x[0]


def post_local(ours: Transcribed) -> np.ndarray:
  for t in range(1, ROUNDS + 1):
    ours.step()
    if t in (1, 2, 5):
      ours.everywhere(ours.mean())
  return ours.x[0]


def hierarchical(ours: Transcribed) -> np.ndarray:
  for t in range(1, ROUNDS + 1):
    ours.step()
    ours.step()
    for of_slice in ((0, 1), (2, 3)):
      ours.everywhere(ours.mean(of_slice), of_slice)
    if t % 2 == 0:
      ours.everywhere(ours.mean())
  return np.mean(ours.x, 0)


def slow_mo_(ours: Transcribed) -> np.ndarray:
  x, u = ours.start, np.zeros_like(ours.start)
  for _ in range(ROUNDS):
    gamma = np.mean([rate(ours.steps + h) for h in range(2)])
    ours.step()
    ours.step()
    u = 0.6 * u + (x - ours.mean()) / gamma
    x = x - 0.8 * gamma * u
    ours.everywhere(x)
  return x


def elastic(ours: Transcribed) -> np.ndarray:
  """Synchronous EASGD, with an exchange at every third step."""
  z = ours.start
  for t in range(3 * ROUNDS):
    before = list(ours.x)
    ours.step()
    if t % 3 == 0:
      for i in range(4):
        ours.x[i] = ours.x[i] - 0.2 * (before[i] - z)
      z = z + sum(0.2 * SHARES[i] * (before[i] - z) for i in range(4))
  return z


def elastic_momentum(ours: Transcribed) -> np.ndarray:
  """Algorithm 2."""
  z, v = ours.start, ours.momentum
  for t in range(3 * ROUNDS):
    before, centre = list(ours.x), z
    for i in range(4):
      if t % 3 == 0:
        ours.x[i] = ours.x[i] - 0.2 * (before[i] - centre)
        z = z + 0.2 * SHARES[i] * (before[i] - centre)
      v[i] = 0.8 * v[i] - 0.1 * ours.gradient(i, before[i] + 0.8 * v[i])
      ours.x[i] = ours.x[i] + v[i]
  return z


class Nesterov:
  """The outer optimizer, of some rows of the parameters."""

  def __init__(self):
    self.trace = 0.0

  def step(self, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    self.trace = gradient + 0.9 * self.trace
    return theta - 0.7 * (gradient + 0.9 * self.trace)


def diloco_(ours: Transcribed) -> np.ndarray:
  theta, outer = ours.start, Nesterov()
  for _ in range(ROUNDS):
    for _ in range(3):
      ours.step()
    theta = outer.step(theta, theta - ours.mean())
    ours.everywhere(theta)
  return theta


def streaming(ours: Transcribed, period: int, delay: int, alpha: float) -> np.ndarray:
  """Algorithm 2, step by step; the first fragment is the bias and half of the matrix."""
  fragments = ([0, 1, 2, 6], [3, 4, 5])
  offsets, outers = (period // 2, period), (Nesterov(), Nesterov())
  theta, sent = ours.start.copy(), {}
  for t in range(1, ROUNDS * period // 2 + 1):
    ours.step()
    for rows, offset, outer in zip(fragments, offsets, outers, strict=True):
      if t >= offset and (t - offset) % period == 0:
        theta[rows] = outer.step(theta[rows], theta[rows] - ours.mean()[rows])
        sent[t + delay] = rows, theta[rows].copy()
    if t in sent:
      rows, new = sent[t]
      for i in range(4):
        ours.x[i][rows] = alpha * ours.x[i][rows] + (1 - alpha) * new
  return theta


def late_(ours: Transcribed, period: int, delay: int, outer) -> np.ndarray:
  """Steps go on from where a worker is; each value arrives `delay` steps after its round."""
  theta, air = ours.start, []  # (step at which it arrives, value, models when it was sent)

  def arrive(value: np.ndarray, sent: list[np.ndarray]) -> None:
    nonlocal theta
    theta = outer(theta, value)
    for i in range(4):
      shift = theta - sent[i]
      ours.x[i] = ours.x[i] + shift
      for _, _, later in air:
        later[i] = later[i] + shift

  base = [ours.start] * 4
  for t in range(1, ROUNDS * period + 1):
    ours.step()
    while air and air[0][0] == t:
      _, value, sent = air.pop(0)
      arrive(value, sent)
      base = air[-1][2] if air else [theta] * 4
    if t % period == 0:
      change = np.average([base[i] - ours.x[i] for i in range(4)], 0, SHARES)
      base = [x.copy() for x in ours.x]
      air.append((t + delay, change, base))
  while air:
    _, value, sent = air.pop(0)
    arrive(value, sent)
  return theta


def eager(ours: Transcribed) -> np.ndarray:
  theta, outers = [ours.start] * 4, [Nesterov() for _ in SIZES]
  average, own = np.zeros_like(ours.start), [np.zeros_like(ours.start)] * 4
  for _ in range(ROUNDS):
    for _ in range(3):
      ours.step()
    change = [SHARES[i] * (theta[i] - ours.x[i]) for i in range(4)]
    gradients = [average + (change[i] - own[i]) / 4 for i in range(4)]
    theta = [outer.step(x, g) for outer, x, g in zip(outers, theta, gradients, strict=True)]
    average, own = np.mean(change, 0), change
    ours.x = list(theta)
  return np.mean(theta, 0)


def overlap(ours: Transcribed) -> np.ndarray:
  z, v = ours.start, np.zeros_like(ours.start)
  for _ in range(ROUNDS):
    for _ in range(3):
      ours.step()
    ours.x = [y - 0.6 * (y - z) for y in ours.x]
    v = 0.7 * v + ours.mean() - z
    z = z + v
  return np.mean(ours.x, 0)


TRANSCRIPTIONS = {
  "local": local,
  "post_local": post_local,
  "hierarchical": hierarchical,
  "slow_mo": slow_mo_,
  "easgd": elastic,
  "eamsgd": elastic_momentum,
  "diloco": diloco_,
  "streaming": functools.partial(streaming, period=6, delay=4, alpha=0.3),
  "streaming_late": functools.partial(streaming, period=4, delay=2, alpha=0.0),
  "late": lambda ours: late_(ours, 3, 2, Nesterov().step),
  "later_than_a_round": lambda ours: late_(ours, 3, 4, Nesterov().step),
  "two_rounds_late": lambda ours: late_(ours, 2, 4, lambda theta, change: theta - change),
  "eager_diloco": eager,
  "overlap_local_sgd": overlap,
}


@pytest.mark.parametrize("name", METHODS)
def test_rounds_equal_numpy(name):
  """Five rounds of workers with unequal weights, a momentum each and a falling step size.

  And `over` keeps everything but the aggregator.
  """
  want = TRANSCRIPTIONS[name](Transcribed())
  assert distance(simulated(name), {"b": want[6], "w": want[:6]}) <= 2e-6


@pytest.mark.parametrize("name", slow_except(["hierarchical"], METHODS))
def test_executions_agree(name):
  assert distance(models(alike(name), "spmd")[name], simulated(name)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_optax_face_is_the_method(name):
  method, task = METHODS[name], regression(sum(SIZES))
  examples, sizes = split(task, SIZES)
  examples["mask"] = (np.arange(30) < np.asarray(sizes)[:, None]).astype(np.float32)
  optimizer = as_optax(method)
  begin = (start(), optimizer.init(start()))

  def run(batch, weight):
    def one(carry, _):
      grads = jax.grad(task.loss)(carry[0], batch, None)
      updates, state = optimizer.update(grads, carry[1], carry[0], weight=weight)
      return (optax.apply_updates(carry[0], updates), state), None

    count = ROUNDS * method.local_steps
    return cast(Any, jax.lax.scan(one, begin, None, count)[0])[1].state

  axes = axes_of(name)
  fold = lambda x: jnp.reshape(jnp.asarray(x), (*axes.values(), *np.shape(x)[1:]))
  for axis in reversed(axes):
    run = jax.vmap(run, axis_name=axis)
  state = jax.jit(run)(jax.tree.map(fold, examples), fold(SHARES.astype(np.float32)))
  params = method.params
  for _ in axes:
    params = jax.vmap(params)
  models = jax.tree.map(lambda x: x.reshape(4, *x.shape[len(axes) :]), params(state))
  assert distance(jax.tree.map(lambda x: jnp.mean(x, 0), models), simulated(name)) <= 1e-5


PLAIN = optax.sgd(0.1)
ONE = optax.sgd(1.0)
SAME = {
  "outer sgd": (diloco(INNER, ONE, mean(), period=3), "local", FLAT),
  "no slow momentum": (slow_mo(INNER, mean(), period=3, slow_momentum=0.0), "local", FLAT),
  "one fragment": (
    streaming_diloco(INNER, NESTEROV, mean(), period=3, fragments=1, delay=0, mixing=0.0),
    "diloco",
    FLAT,
  ),
  "local from the start": (post_local_sgd(INNER, mean(), period=3, switch=0), "local", FLAT),
  "always between slices": (
    hierarchical_local_sgd(INNER, FAST, SLOW, inner_period=3, outer_period=1),
    "local",
    SLICED,
  ),
  # a slice agrees by then: an average over all workers is one between slices
  "slow over all": (
    hierarchical_local_sgd(INNER, FAST, mean(), inner_period=2, outer_period=2),
    "hierarchical",
    SLICED,
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAME)
def test_special_cases_are_other_methods(case):
  method, name, axes = SAME[case]
  rounds = ROUNDS * METHODS[name].local_steps // method.local_steps
  got = running(method, axes).rounds(rounds).params()
  assert distance(got, simulated(name)) <= 2e-6


RESTARTED = {
  "local": (local_sgd(INNER, mean(), period=3), fed_avg(INNER, mean(), period=3)),
  "slow_mo": (
    slow_mo(INNER, mean(), period=3, slow_momentum=0.6),
    fed_opt(INNER, optax.sgd(1.0, momentum=0.6), mean(), period=3),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESTARTED)
def test_restarted_workers_are_clients_that_keep_nothing(name):
  method, federated = RESTARTED[name]
  run = running(restarted(method)).rounds(ROUNDS)
  assert not any(jax.tree.leaves(run.layout.state))
  assert distance(run.params(), running(federated).rounds(ROUNDS).params()) <= 2e-6


@pytest.mark.slow
def test_one_local_step_is_data_parallel():
  want = running(data_parallel(PLAIN, mean())).rounds(ROUNDS).params()
  one = local_sgd(PLAIN, mean(), period=1)
  early = post_local_sgd(PLAIN, mean(), period=3, switch=ROUNDS)
  for method in (one, early):
    assert distance(running(method).rounds(ROUNDS).params(), want) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "post_local"])
def test_one_worker_is_the_inner_optimizer(name):
  method, task = METHODS[name], regression(80)
  run = running(method, {"data": 1}, sizes=(80,))
  params = run.params()
  state = INNER.init(params)
  for _ in range(3 * method.local_steps):
    updates, state = INNER.update(jax.grad(task.loss)(params, task.train, None), state, params)
    params = optax.apply_updates(params, updates)
  assert distance(run.rounds(3).params(), params) <= 2e-6


def elastic_growth(method: Method, count: int, curvature: float) -> float:
  """|centre| after 300 rounds on h x^2 / 2 for all workers, which start apart from it."""
  optimizer = as_optax(method)

  def run(start):
    def one(carry, _):
      updates, state = optimizer.update(curvature * carry[0], carry[1], carry[0])
      return (carry[0] + updates, state), None

    begin = (start, optimizer.init(start))
    return cast(Any, jax.lax.scan(one, begin, None, 300)[0])[1].state.centre

  return float(jnp.abs(jax.vmap(run, axis_name="data")(jnp.ones(count)))[0])


@pytest.mark.parametrize(("workers_", "curvature"), [(1, 1.0), (4, 0.5), (4, 1.6)])
def test_easgd_is_stable_where_it_says(workers_, curvature):
  """Just inside and just outside of the region that the docstring gives."""
  edge = (4 - 2 * curvature) / (2 + workers_ * (2 - curvature))
  growth = lambda alpha: elastic_growth(
    easgd(ONE, mean(), period=1, alpha=alpha), workers_, curvature
  )
  assert growth(0.95 * edge) < 1e-2
  assert growth(1.05 * edge) > 1e2


def job_of(method: Method, axes=FLAT, sizes=SIZES) -> Job:
  return Job(method, regression(sum(sizes)), axes, np.asarray(sizes), None)


def test_what_is_private():
  """Inner optimizers and drifting models; the common model, centre and counters are kept once."""
  layout = lambda name: inference.layout_of(job_of(METHODS[name])).state
  every = lambda tree: frozenset(map(bool, jax.tree.leaves(tree)))
  for name in ("local", "diloco", "slow_mo"):
    assert every(layout(name).params) == {False}
    assert every(layout(name).inner[0].trace) == {True}
  assert every(layout("diloco").outer) == {False}
  for name, common in (("post_local", "common"), ("easgd", "centre"), ("streaming", "air")):
    assert every(getattr(layout(name), common)) == {False}
    assert every(layout(name).params) == {True}
  assert {*map(every, (one.params for one in layout("streaming").inner))} == {frozenset({False})}
  assert not layout("post_local").count


def traffic_of(method: Method, rounds: int, axes=FLAT, sizes=SIZES):
  job = job_of(method, axes, sizes)
  return traffic.of_method(job, inference.layout_of(job), rounds)


@pytest.mark.parametrize(
  "method",
  [
    local_sgd(INNER, mean(), period=8),
    post_local_sgd(INNER, mean(), period=8, switch=0),
    slow_mo(INNER, mean(), period=8),
    easgd(INNER, mean(), period=8),
    eamsgd(0.1, mean(), period=8),
    diloco(INNER, NESTEROV, mean(), period=8),
    streaming_diloco(INNER, NESTEROV, mean(), period=8, fragments=2),
  ],
)
def test_bytes_fall_with_the_period(method):
  """Sixteen steps against sixteen dense ones."""
  dense = traffic_of(data_parallel(PLAIN, mean()), 16).sent.sum()
  assert dense > 0
  assert 0.98 / 8 <= traffic_of(method, 16 // method.local_steps).sent.sum() / dense <= 1.02 / 8


def test_bytes_follow_the_round():
  """Of 21 numbers a fragment has 12; four workers send 6 bytes for each byte that they average."""
  sent = traffic_of(METHODS["streaming"], 4).sent
  np.testing.assert_allclose(sent, np.asarray([12, 9, 12, 9]) * 4 * 1.5)
  sent = traffic_of(METHODS["post_local"], 8).sent
  np.testing.assert_allclose(sent, np.asarray([1, 1, 0, 0, 1, 0, 0, 1]) * 21 * 4 * 1.5)
  by_axis = traffic_of(METHODS["hierarchical"], 4, SLICED, (20,) * 4).transfers
  numbers = {
    axis: sum(t.payload * t.times for t in by_axis if t.axes == (axis,)) for axis in SLICED
  }
  assert numbers == {"data": 4 * 21 * 4, "slice": 2 * 21 * 4}


@pytest.mark.slow
def test_compressed_outer_gradients():
  """Any aggregator: with a memory for each fragment, the executions agree."""
  aggregator = error_feedback(two_phase(int8()))
  method = streaming_diloco(INNER, NESTEROV, aggregator, period=6, fragments=2, delay=1)
  want = running(method).rounds(2)
  assert distance(running(method, executor="spmd").rounds(2).params(), want.params()) <= 1e-5


@pytest.mark.slow
def test_an_inactive_worker_is_left_out():
  """Whatever it holds; and the outer step goes the workers' way: a tenth of it with sgd(0.1)."""

  def met(method: Method, axes: dict[str, int]) -> np.ndarray:
    fold = lambda x: jnp.asarray(x).reshape(*axes.values())
    state = method.init({"w": jnp.zeros(())})

    def sync(x, weight, active):
      local = method.begin(state)._replace(params={"w": x})
      return method.sync(local, state, key=jax.random.key(0), presence=Presence(weight, active))

    for axis in reversed(axes):
      sync = jax.vmap(sync, axis_name=axis)
    after = sync(
      fold([1.0, 2.0, np.nan, 4.0]), fold([1.0, 1.0, 0.0, 2.0]), fold([True, True, False, True])
    )
    return np.asarray(method.params(after)["w"]).reshape(4)

  np.testing.assert_allclose(met(METHODS["local"], FLAT), [2.75] * 4, rtol=1e-6)
  np.testing.assert_allclose(met(METHODS["post_local"], FLAT), [2.75] * 4, rtol=1e-6)
  np.testing.assert_allclose(met(METHODS["hierarchical"], SLICED), [1.5, 1.5, 4, 4], rtol=1e-6)
  outer = diloco(PLAIN, optax.sgd(0.1), mean(), period=3)
  np.testing.assert_allclose(met(outer, FLAT), [0.275] * 4, rtol=1e-6)


@pytest.mark.parametrize(
  ("build", "words"),
  [
    (lambda: local_sgd(PLAIN, mean(), period=0), "period=0 is not at least 1"),
    (lambda: post_local_sgd(PLAIN, mean(), period=0), "period=0"),
    (lambda: post_local_sgd(PLAIN, mean(), switch=-1), "switch=-1 is not at least 0"),
    (lambda: hierarchical_local_sgd(PLAIN, FAST, SLOW, inner_period=0), "inner_period=0"),
    (lambda: hierarchical_local_sgd(PLAIN, FAST, SLOW, outer_period=0), "outer_period=0"),
    (lambda: slow_mo(PLAIN, mean(), period=0), "period=0"),
    (lambda: slow_mo(PLAIN, mean(), slow_momentum=1.0), r"slow_momentum=1.0 is not in \[0, 1\)"),
    (lambda: slow_mo(PLAIN, mean(), slow_learning_rate=0.0), "slow_learning_rate=0.0"),
    (lambda: easgd(PLAIN, mean(), period=0), "period=0"),
    (lambda: restarted(easgd(PLAIN, mean())), "restarted is for methods that carry"),
    (lambda: easgd(PLAIN, mean(), alpha=1.0), r"alpha=1.0 is not in \(0, 1\)"),
    (lambda: eamsgd(0.0, mean()), "learning_rate=0.0"),
    (lambda: eamsgd(0.1, mean(), momentum=1.0), "momentum=1.0"),
    (lambda: eamsgd(0.1, mean(), alpha=0.0), "alpha=0.0"),
    (lambda: diloco(PLAIN, ONE, mean(), period=0), "period=0"),
    (lambda: streaming_diloco(PLAIN, ONE, mean(), fragments=0), "fragments=0"),
    (lambda: streaming_diloco(PLAIN, ONE, mean(), period=5), "period=5 .* fragments=2"),
    (lambda: streaming_diloco(PLAIN, ONE, mean(), delay=100), r"delay=100 is not in \[0, 100\)"),
    (lambda: streaming_diloco(PLAIN, ONE, mean(), mixing=1.5), r"mixing=1.5 is not in \[0, 1\]"),
  ],
)
def test_ranges_are_checked_when_built(build, words):
  with pytest.raises(ValueError, match=words):
    build()


def test_what_a_model_or_a_mesh_refuses():
  with pytest.raises(ValueError, match=r"alpha=0.4 is not below .* W = 4"):
    traffic_of(easgd(PLAIN, mean(), alpha=0.4), 1)
  with pytest.raises(ValueError, match="fragments=20 of a model that can be cut into 9 parts"):
    traffic_of(streaming_diloco(PLAIN, ONE, mean(), fragments=20), 1)
  with pytest.raises(ValueError, match="the fast aggregator also uses 'slice'"):
    traffic_of(hierarchical_local_sgd(PLAIN, mean(), SLOW), 1, SLICED)
  with pytest.raises(ValueError, match="'slice'"):
    traffic_of(METHODS["hierarchical"], 1)
