"""Federated methods and SPARTA: transcriptions, own numbers of steps, known properties, bytes."""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import FEATURES, Running, distance, regression
from subset import slow_except

from research.aggregate.compressed import sum_mean, two_phase
from research.aggregate.gather_mean import gather_mean
from research.aggregate.gossip import gossip
from research.aggregate.mean import mean
from research.aggregate.privacy.private import noisy
from research.aggregate.privacy.secure import secure_sum
from research.comm.collectives import round_keys
from research.comm.topology import ring
from research.compress.quantize import int8
from research.compress.sparsify import kept, random_k, support, top_k
from research.core import registry
from research.core.base import Aggregator, Presence
from research.core.method import Method
from research.methods.data_parallel import data_parallel
from research.methods.federated import fed_adagrad, fed_adam, fed_avg, fed_opt, fed_prox, fed_yogi
from research.methods.local import local_sgd
from research.methods.scaffold import scaffold
from research.methods.sparta import sparta
from research.optim.transform import as_optax
from research.parallel import inference, traffic
from research.parallel.cohorts import cohorts, draw
from research.parallel.job import Job, resolved
from research.tasks.convex import counterexamples

ROOT = Path(__file__).parents[2]
SIZES = (10, 20, 30, 20)  # examples by worker: their weights differ
SHARES = np.asarray(SIZES) / np.mean(SIZES)
CLIENTS = (10, 20, 30, 20, 10, 30, 20, 20)  # of whom each round serves four
AXES = {"data": 4}
BATCH, EPOCHS, ROUNDS, DROPOUT = 10, 2, 4, 0.25
RATE = optax.linear_schedule(0.2, 0.05, 6)
INNER = optax.sgd(RATE, momentum=0.5)
PLAIN = optax.sgd(0.1)
SERVER = {"learning_rate": 0.05, "tau": 0.01, "epochs": EPOCHS}

METHODS = {
  "fed_avg": fed_avg(INNER, mean(), epochs=EPOCHS, learning_rate=0.8),
  "fed_prox": fed_prox(INNER, mean(), mu=0.7, epochs=EPOCHS),
  "fed_opt": fed_opt(INNER, optax.sgd(0.7, momentum=0.6), mean(), epochs=EPOCHS),
  "fed_adam": fed_adam(INNER, mean(), b1=0.8, b2=0.95, **SERVER),
  "fed_yogi": fed_yogi(INNER, mean(), b1=0.8, b2=0.95, **SERVER),
  "fed_adagrad": fed_adagrad(INNER, mean(), b1=0.4, **SERVER),
  "scaffold": scaffold(0.1, mean(), server_learning_rate=0.9, epochs=EPOCHS),
}


def serving(method: Method, executor: str = "simulate") -> Running:
  """Four of eight clients per round, each of its own number of steps, a quarter drop out."""
  task = regression(sum(CLIENTS))
  return Running(method, executor, AXES, CLIENTS, BATCH, task=task, dropout=DROPOUT)


def running(method: Method, executor: str = "simulate", sizes=SIZES) -> Running:
  """Everybody in every round, with all examples in every step."""
  return Running(method, executor, {"data": len(sizes)}, sizes, None, task=regression(sum(sizes)))


@functools.cache
def served(name: str) -> Running:
  return serving(METHODS[name]).rounds(ROUNDS)


def start(samples: int):
  """Where every run begins."""
  return regression(samples).init(jax.random.split(jax.random.key(0))[0])


def rate(step: int) -> float:
  return float(np.asarray(RATE(step)))


def stacked(params: Any) -> np.ndarray:
  return np.vstack([params["w"], params["b"]]).astype(np.float64)


def unstacked(x: np.ndarray) -> dict[str, np.ndarray]:
  return {"b": x[FEATURES], "w": x[:FEATURES]}


class Lots(NamedTuple):
  owner: np.ndarray  # [T, W]
  present: np.ndarray  # [T, W]
  index: np.ndarray  # [T, W, H, b]


@functools.cache
def lots() -> Lots:
  """Whom the workers serve, who drops out, and the order of their examples."""
  run = served("fed_avg")

  @jax.jit
  def found(data, key):
    numbers = jnp.arange(ROUNDS, dtype=jnp.int32)
    one = lambda worker: draw(run.job, data, key, numbers, worker)
    drawn = jax.vmap(one, out_axes=1)(jnp.arange(4, dtype=jnp.int32))
    return drawn.owner, cohorts(run.job, key, numbers)[1], drawn.index

  return Lots(*map(np.asarray, found(run.data, run.state.key)))


class Clients:
  """The clients in numpy: each passes over its own examples and says where it got."""

  def __init__(self):
    task = regression(sum(CLIENTS))
    x, y = (np.asarray(task.train[name], np.float64) for name in "xy")
    x = np.hstack([x, np.ones((len(x), 1))])
    edges = np.cumsum(CLIENTS)[:-1]
    self.x, self.y = np.split(x, edges), np.split(y, edges)

  def steps(self, owner: int, index: np.ndarray, step) -> int:
    """K_i gradients, given to `step`, which says where the next one is."""
    count = EPOCHS * CLIENTS[owner] // BATCH
    where = step(None, 0)
    for k in range(count):
      a, y = self.x[owner][index[k]], self.y[owner][index[k]]
      where = step(a.T @ (a @ where - y) / BATCH, k)
    return count

  def momentum(self, owner: int, index: np.ndarray, x: np.ndarray, mu: float = 0.0) -> np.ndarray:
    """Heavy ball with a falling step size, from rest, held to x."""
    y, v = x.copy(), np.zeros_like(x)

    def step(grad, k):
      nonlocal y, v
      if grad is not None:
        v = 0.5 * v + grad + mu * (y - x)
        y = y - rate(k) * v
      return y

    self.steps(owner, index, step)
    return y


def changes(x: np.ndarray, t: int, mu: float = 0.0) -> np.ndarray:
  """The mean of the clients' changes by their examples, of those who did not drop out."""
  clients, (owner, present, index) = Clients(), lots()
  who = [w for w in range(4) if present[t, w]]
  moved = [clients.momentum(owner[t, w], index[t, w], x, mu) - x for w in who]
  return np.average(moved, 0, [CLIENTS[owner[t, w]] for w in who])


def averaging(x: np.ndarray, rate: float = 1.0, mu: float = 0.0) -> np.ndarray:
  for t in range(ROUNDS):
    x = x + rate * changes(x, t, mu)
  return x


def with_momentum(x: np.ndarray) -> np.ndarray:
  u = np.zeros_like(x)
  for t in range(ROUNDS):
    u = 0.6 * u - changes(x, t)
    x = x - 0.7 * u
  return x


def adaptive(x: np.ndarray, b1: float, squares) -> np.ndarray:
  """Algorithm 2."""
  m, v = np.zeros_like(x), np.full_like(x, 0.01**2)
  for t in range(ROUNDS):
    delta = changes(x, t)
    m = b1 * m + (1 - b1) * delta
    v = squares(v, delta)
    x = x + 0.05 * m / (np.sqrt(v) + 0.01)
  return x


def controlled(x: np.ndarray) -> np.ndarray:
  """Algorithm 1 of SCAFFOLD, option II, clients weighted by their examples."""
  clients, (owner, present, index) = Clients(), lots()
  c, own = np.zeros_like(x), [np.zeros_like(x) for _ in CLIENTS]
  for t in range(ROUNDS):
    moves, turns, sizes = [], [], []
    for w in np.flatnonzero(present[t]):
      i, y = owner[t, w], x.copy()

      def step(grad, k, i=i, c=c):
        nonlocal y
        del k
        y = y if grad is None else y - 0.1 * (grad - own[i] + c)
        return y

      count = clients.steps(i, index[t, w], step)
      new = own[i] - c + (x - y) / (count * 0.1)
      moves, turns, sizes = [*moves, y - x], [*turns, new - own[i]], [*sizes, CLIENTS[i]]
      own[i] = new
    x = x + 0.9 * np.average(moves, 0, sizes)
    c = c + np.sum(turns, 0) / len(CLIENTS)
  return x


TRANSCRIPTIONS = {
  "fed_avg": functools.partial(averaging, rate=0.8),
  "fed_prox": functools.partial(averaging, mu=0.7),
  "fed_opt": with_momentum,
  "fed_adam": functools.partial(
    adaptive, b1=0.8, squares=lambda v, d: 0.95 * v + (1 - 0.95) * d**2
  ),
  "fed_yogi": functools.partial(
    adaptive, b1=0.8, squares=lambda v, d: v - (1 - 0.95) * d**2 * np.sign(v - d**2)
  ),
  "fed_adagrad": functools.partial(adaptive, b1=0.4, squares=lambda v, d: v + d**2),
  "scaffold": controlled,
}


QUICK = ("fed_avg", "fed_adam", "scaffold")


@pytest.mark.parametrize("name", slow_except(QUICK, METHODS))
def test_rounds_equal_numpy(name):
  """Clients of uneven sizes and steps, of whom some are not asked and some drop out."""
  present = lots().present
  assert present.any(1).all()
  assert not present.all()
  want = TRANSCRIPTIONS[name](stacked(start(sum(CLIENTS))))
  assert distance(served(name).params(), unstacked(want)) <= 1e-5


@pytest.mark.parametrize("name", slow_except(["scaffold"], ("fed_prox", "fed_adam", "scaffold")))
def test_executions_agree_on_a_cohort(name):
  """And `over` keeps everything but the aggregator."""
  run = serving(METHODS[name].over(lambda inner: inner), "spmd").rounds(ROUNDS)
  assert distance(run.params(), served(name).params()) <= 1e-5


@pytest.mark.parametrize("name", slow_except(QUICK, METHODS))
def test_what_is_kept_by_client(name):
  """Nothing, but a control of its own; the mean of these is the server's."""
  private = served(name).layout.state
  if name != "scaffold":
    assert not any(jax.tree.leaves(private))
    return
  assert all(jax.tree.leaves(private.own_control))
  assert not any(jax.tree.leaves(private._replace(own_control=())))
  state = served(name).state.method
  mean_control = jax.tree.map(lambda x: np.mean(x, 0), jax.device_get(state.own_control))
  assert distance(jax.device_get(state.control), mean_control) <= 1e-5


FLAT = {
  "fed_adam": fed_adam(INNER, mean(), learning_rate=0.05, period=3),
  "scaffold": scaffold(0.1, mean(), period=3),
  "sparta": sparta(INNER, sum_mean(random_k(0.3))),
}


@functools.cache
def flat(name: str) -> Running:
  return running(FLAT[name]).rounds(ROUNDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAT)
def test_executions_agree_on_everybody(name):
  for executor in ("spmd", "pmap") if name == "sparta" else ("pmap",):
    got = running(FLAT[name], executor).rounds(ROUNDS)
    assert distance(got.state.method.params, flat(name).state.method.params) <= 1e-5, executor


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAT)
def test_the_optax_face_is_the_method(name):
  method, task = FLAT[name], regression(sum(SIZES))
  examples = jax.device_get(flat(name).data.examples)
  mask = (np.arange(max(SIZES)) < np.asarray(SIZES)[:, None]).astype(np.float32)
  optimizer, params = as_optax(method), start(sum(SIZES))
  begin = cast(Any, optimizer.init(params))
  begin = begin._replace(key=flat(name).state.key)  # the executor's randomness

  def run(batch, weight):
    def one(carry, _):
      grads = jax.grad(task.loss)(carry[0], batch, None)
      updates, state = optimizer.update(grads, carry[1], carry[0], weight=weight)
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(one, (params, begin), None, ROUNDS * method.local_steps)[0][0]

  weights = SHARES.astype(np.float32)
  got = jax.jit(jax.vmap(run, axis_name="data"))({**examples, "mask": mask}, weights)
  want = flat(name).state.method.params
  spread = want if name == "sparta" else jax.tree.map(lambda x: jnp.stack([x] * 4), want)
  assert distance(got, spread) <= 1e-5


class Quadratics(NamedTuple):
  """Clients with f_i(x) = h_i (x - b_i)^2 / 2, elementwise; the mean of f_i is least at `best`."""

  h: np.ndarray = np.asarray([[0.5, 2, 1], [2, 0.6, 1], [1, 1.5, 2], [1.2, 0.4, 0.7]] * 2)
  b: np.ndarray = np.random.default_rng(0).normal(size=(8, 3))

  @property
  def best(self) -> np.ndarray:
    return np.sum(self.h * self.b, 0) / np.sum(self.h, 0)


def play(method: Method, cohort: int, dropout: float, shares: bool) -> tuple[Any, np.ndarray]:
  """Rounds of clients with 1 to 4 steps of their own: the last state, and private rows [8, ...].

  Every method here keeps what is private in `own_control`, or nothing. Clients weigh what they have
  steps, or alike.
  """
  problem, random, rounds = Quadratics(), np.random.default_rng(1), 600
  h, b = (jnp.asarray(x, jnp.float32) for x in problem)
  steps = jnp.asarray([1, 2, 3, 4, 4, 3, 2, 1])
  method = method.in_rounds(4, cohort / 8)

  def worker(state, rows, client, active):
    state = state._replace(own_control=rows[client]) if hasattr(state, "own_control") else state
    local, key = method.begin(state), jax.random.key(0)
    for k in range(method.local_steps):
      grads = h[client] * (local.params - b[client])
      after = method.step(grads, local, state, key=key)
      local = jax.tree.map(lambda x, y, k=k: jnp.where(k < steps[client], y, x), local, after)
    share = active * steps[client] if shares else active
    weight = share / jnp.maximum(jax.lax.pmean(share, "data"), 0.1)
    state = method.sync(local, state, key=key, presence=Presence(weight, active > 0))
    return state, getattr(state, "own_control", rows[client])

  @jax.jit
  def one(held, of_round):
    state, rows = held
    run = jax.vmap(worker, (None, None, 0, 0), axis_name="data")
    states, own = run(state, rows, *of_round)
    return (jax.tree.map(lambda x: x[0], states), rows.at[of_round[0]].set(own)), ()

  order = np.stack([random.permutation(8)[:cohort] for _ in range(rounds)])
  active = (random.uniform(size=order.shape) >= dropout).astype(np.float32)
  begin = method.init(jnp.zeros(3)), jnp.zeros((8, 3))
  (state, rows), _ = jax.lax.scan(one, begin, (jnp.asarray(order), jnp.asarray(active)))
  return state, np.asarray(rows)


@pytest.mark.parametrize(("cohort", "dropout"), [(8, 0.0), (3, 0.0), (3, 0.3)])
def test_scaffold_is_exact_with_a_constant_step(cohort, dropout):
  """On clients that differ: whoever takes part, whatever it weighs, however many its steps."""
  for shares in (False, True):
    state, rows = play(scaffold(0.1, mean()), cohort, dropout, shares)
    np.testing.assert_allclose(state.params, Quadratics().best, atol=2e-5)
    np.testing.assert_allclose(state.control, np.mean(rows, 0), atol=2e-5)
  biased, _ = play(fed_avg(PLAIN, mean()), cohort, dropout, shares=False)
  assert np.abs(np.asarray(biased.params) - Quadratics().best).max() > 0.01


@pytest.mark.slow
def test_a_warm_up_of_scaffold_sets_controls_to_the_first_gradients():
  """And moves nothing; the round after it does."""
  run, task = running(scaffold(0.1, mean(), period=3, warm_up=True)), regression(sum(SIZES))
  first = run.params()
  state = run.rounds(1).state.method
  assert distance(state.params, first) == 0
  edges = np.cumsum([0, *SIZES])
  for worker, (a, b) in enumerate(itertools.pairwise(edges)):
    grads = jax.grad(task.loss)(first, {n: x[a:b] for n, x in task.train.items()}, None)
    assert distance(jax.tree.map(lambda x, w=worker: x[w], state.own_control), grads) <= 1e-5
  assert distance(run.rounds(1).params(), first) > 0.01


@pytest.mark.slow
def test_scaffold_from_first_gradients_does_not_see_how_clients_differ():
  """FedAvg of the same step size ends the further off the more they do."""

  def ends(method: Method) -> list[float]:
    found = []
    for dissimilarity in (1.0, 10.0, 100.0):
      task = counterexamples.client_drift(dissimilarity)
      run = Running(method, "simulate", {"data": 2}, (1, 1), None, task=task).rounds(61)
      found.append(float(run.params()["x"]))
    return found

  # two local steps are about two of gradient descent: 10 (.9^120) = 3e-5
  np.testing.assert_allclose(ends(scaffold(0.1, mean(), period=2, warm_up=True)), 0, atol=1e-3)
  # x = eta G / (2 - 2 eta)
  want = [0.1 * g / 1.8 for g in (1, 10, 100)]
  np.testing.assert_allclose(ends(fed_avg(PLAIN, mean(), period=2)), want, rtol=0.01)


@pytest.mark.slow
def test_one_worker_is_the_inner_optimizer():
  """FedAvg's begins anew in every round, SCAFFOLD's is SGD."""
  adam = optax.adam(0.05)

  def descended(inner: optax.GradientTransformation, anew: int) -> Any:
    task, params = regression(80), start(80)
    state = inner.init(params)
    for step in range(6):
      state = inner.init(params) if step % anew == 0 else state
      grads = jax.grad(task.loss)(params, task.train, None)
      updates, state = inner.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  alone = lambda method, rounds: running(method, sizes=(80,)).rounds(rounds).params()
  assert distance(alone(fed_avg(adam, mean(), period=3), 2), descended(adam, 3)) <= 1e-5
  assert distance(alone(scaffold(0.1, mean(), period=3), 2), descended(PLAIN, 6)) <= 1e-5
  assert distance(alone(sparta(INNER, mean()), 6), descended(INNER, 6)) <= 1e-5


@pytest.mark.slow
def test_one_step_of_every_client_is_parallel_sgd():
  """FedSGD; and SPARTA that sends everything is local SGD with a period of one."""
  want = running(data_parallel(PLAIN, mean())).rounds(ROUNDS).params()
  assert distance(running(fed_avg(PLAIN, mean())).rounds(ROUNDS).params(), want) <= 2e-6
  want = running(local_sgd(INNER, mean(), period=1)).rounds(ROUNDS).params()
  got = running(sparta(INNER, sum_mean(random_k(1.0)))).rounds(ROUNDS).state.method.params
  for worker in range(4):
    assert distance(jax.tree.map(lambda x, w=worker: x[w], got), want) <= 1e-5


def test_sparta_equals_numpy():
  """Four models that differ, of which a part is averaged; their mean moves by the steps alone."""
  run, task = flat("sparta"), regression(sum(SIZES))
  x, y = (np.asarray(task.train[name], np.float64) for name in "xy")
  x = np.hstack([x, np.ones((len(x), 1))])
  data = list(zip(*(np.split(z, np.cumsum(SIZES)[:-1]) for z in (x, y)), strict=True))
  begin = stacked(start(sum(SIZES)))
  models, velocity = np.stack([begin] * 4), np.zeros((4, *begin.shape))
  by_leaf = (np.s_[FEATURES:], np.s_[:FEATURES])  # the bias is the first leaf

  @jax.jit
  def chosen(number):
    key = round_keys(run.state.key, number)[0]
    of = lambda leaf, size: support(jax.random.fold_in(key, leaf), size, kept(0.3, size))
    return [of(leaf, begin[rows].size) for leaf, rows in enumerate(by_leaf)]

  for t in range(ROUNDS):
    for i, (a, b) in enumerate(data):
      velocity[i] = 0.5 * velocity[i] + a.T @ (a @ models[i] - b) / len(b)
      models[i] -= SHARES[i] * rate(t) * velocity[i]
    before = models.mean(0)
    for rows, places in zip(by_leaf, map(np.asarray, chosen(jnp.int32(t))), strict=True):
      part = models[:, rows].reshape(4, -1)
      part[:, places] = part[:, places].mean(0)
      models[:, rows] = part.reshape(models[:, rows].shape)
    np.testing.assert_allclose(models.mean(0), before, atol=1e-12)
  assert np.ptp(models, 0).max() > 0.01
  got = jax.device_get(run.state.method.params)
  for i in range(4):
    assert distance(jax.tree.map(lambda x, i=i: x[i], got), unstacked(models[i])) <= 1e-5
  assert distance(run.params(), unstacked(models.mean(0))) <= 1e-5


def test_bytes():
  """One tree per round, of SCAFFOLD two; of SPARTA a part: of 21 numbers one and five."""

  def sent(method: Method, rounds: int) -> float:
    job = resolved(Job(method, regression(sum(SIZES)), AXES, np.asarray(SIZES), None))
    return traffic.of_method(job, inference.layout_of(job), rounds).sent.sum()

  dense = sent(data_parallel(PLAIN, mean()), 16)
  for method, trees in (
    (fed_avg(PLAIN, mean(), period=8), 1),
    (fed_adam(PLAIN, mean(), epochs=8), 1),
    (scaffold(0.1, mean(), epochs=8), 2),
  ):
    assert 0.98 * trees / 8 <= sent(method, 2) / dense <= 1.02 * trees / 8
  np.testing.assert_allclose(sent(FLAT["sparta"], 16) / dense, 6 / 21)


@pytest.mark.slow
def test_private_federated_learning():
  """Clipped, hidden by noise and by masks: one line."""
  spec = "fed_avg(sgd(0.1), {})"
  private = spec.format("noisy(secure_sum(clip=4.0), clip=1.0, noise=1.0)")
  run = running(registry.build("method", private))
  before = run.params()
  assert run.rounds(2).metrics["finite"]
  # 21 numbers of the mean of four, each with two rounds' noise of deviation 1 / 4
  assert 0.1 < np.std(stacked(run.params()) - stacked(before)) < 1
  for name in ("fed_avg(sgd(0.1), {})", "scaffold(0.1, {})"):
    with pytest.raises(ValueError, match="secure_sum needs clip"):
      registry.build("method", name.format("secure_sum()"))


BUILDERS = {
  "fed_avg": lambda **rest: fed_avg(PLAIN, mean(), **rest),
  "fed_prox": lambda **rest: fed_prox(PLAIN, mean(), **rest),
  "fed_opt": lambda **rest: fed_opt(PLAIN, PLAIN, mean(), **rest),
  "fed_adam": lambda **rest: fed_adam(PLAIN, mean(), **rest),
  "fed_yogi": lambda **rest: fed_yogi(PLAIN, mean(), **rest),
  "fed_adagrad": lambda **rest: fed_adagrad(PLAIN, mean(), **rest),
  "scaffold": lambda rate=0.1, **rest: scaffold(rate, mean(), **rest),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_rounds_are_checked_when_built(name):
  for rest, words in (
    ({"epochs": 0}, "epochs=0 is not at least 1"),
    ({"period": -1}, "period=-1 is not at least 0"),
    ({"epochs": 2, "period": 3}, "epochs=2 and period=3"),
  ):
    with pytest.raises(ValueError, match=words):
      BUILDERS[name](**rest)


@pytest.mark.parametrize(
  ("name", "rest", "words"),
  [
    ("fed_avg", {"learning_rate": 0.0}, "learning_rate=0.0 is not above 0"),
    ("fed_prox", {"mu": -1.0}, "mu=-1.0 is not at least 0"),
    ("fed_adam", {"learning_rate": 0.0}, "learning_rate=0.0 is not above 0"),
    ("fed_adam", {"b1": 1.0}, r"b1=1.0 is not in \[0, 1\)"),
    ("fed_adam", {"b2": 1.0}, r"b2=1.0 is not in \[0, 1\)"),
    ("fed_yogi", {"b2": -0.1}, r"b2=-0.1 is not in \[0, 1\)"),
    ("fed_adagrad", {"tau": 0.0}, "tau=0.0 is not above 0"),
    ("scaffold", {"rate": 0.0}, "learning_rate=0.0 is not above 0"),
    ("scaffold", {"server_learning_rate": 0.0}, "server_learning_rate=0.0 is not above 0"),
  ],
)
def test_ranges_are_checked_when_built(name, rest, words):
  with pytest.raises(ValueError, match=words):
    BUILDERS[name](**rest)


@pytest.mark.parametrize(
  ("aggregator", "trait"),
  [
    (gossip(ring()), "local"),
    (noisy(mean(), clip=1.0, noise=1.0), "noise"),
    (secure_sum(clip=1.0, dropout=0.1), "partial"),
    (sum_mean(random_k(0.3, unbiased=True)), "expansive"),
    (gather_mean(top_k(0.3)), "apart"),
    (two_phase(random_k(0.3)), "apart"),
  ],
)
def test_sparta_averages_the_same_part_of_each_model(aggregator: Aggregator, trait: str):
  with pytest.raises(ValueError, match=rf"sparta .*\({trait}\)"):
    sparta(PLAIN, aggregator)
  sparta(PLAIN, gather_mean(int8()))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_server_has_one_model(name):
  build = registry.lookup(("method",), name)
  given = {"fed_opt": (PLAIN, PLAIN), "scaffold": (0.1,)}.get(name, (PLAIN,))
  with pytest.raises(ValueError, match=rf"{name} .*\(local\)"):
    build(*given, gossip(ring()))


def test_contributing_shows_the_file():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  block = text.split("```python\n")[1].split("```")[0]
  lines = [line.removeprefix("   ") for line in block.splitlines()]
  assert "\n".join(lines).strip() == (ROOT / "research/methods/sparta.py").read_text().strip()
