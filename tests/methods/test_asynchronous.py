"""Methods on old models: their recursions in numpy, the laws of delay, events of a population."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance, regression, split
from side_by_side import regressions, side_by_side
from subset import slow_except

from research.aggregate.mean import mean
from research.core import registry
from research.core.method import Method
from research.methods.asynchronous import asgd, delayed, hogwild, staleness_aware
from research.methods.data_parallel import data_parallel
from research.methods.dc_asgd import dc_asgd, dc_asgd_constant
from research.methods.local import local_sgd
from research.optim.transform import as_optax
from research.parallel import inference, traffic
from research.parallel import layout as layouts
from research.parallel.job import Job
from research.sim.delays import (
  Delays,
  by_coordinate,
  constant,
  geometric,
  last_pull,
  per_worker,
  uniform,
)

SIZES = (10, 20, 30, 20)  # examples by worker: their weights differ
SHARES = np.asarray(SIZES) / np.mean(SIZES)
FLAT, SLICED = {"data": 4}, {"slice": 2, "data": 2}
ROUNDS = 6
SGD, MOMENTUM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.5)
PLAIN, HEAVY = data_parallel(SGD, mean()), data_parallel(MOMENTUM, mean())

METHODS = {
  "delayed": delayed(HEAVY, constant(2)),
  "random": delayed(PLAIN, uniform(4)),
  "local": delayed(local_sgd(MOMENTUM, mean(), period=1), geometric(2.0, bound=5)),
  "aware": staleness_aware(HEAVY, per_worker([0, 1, 4, 2])),
  "root": staleness_aware(PLAIN, by_coordinate(4), power=0.5),
  "dc": dc_asgd(0.1, mean(), uniform(5), lam=0.5, decay=0.8),
  "dc_constant": dc_asgd_constant(0.1, mean(), per_worker([1, 3]), lam=0.2),
  "hogwild": hogwild(0.02, mean(), bound=4),
  "asgd": asgd(MOMENTUM, mean()),
}
EVENTS = {
  "asgd": asgd(MOMENTUM, mean()),
  "aware": staleness_aware(PLAIN, last_pull()),
  "dc": dc_asgd(0.1, mean(), last_pull(), lam=0.5, decay=0.8),
}
ORDER = np.asarray([0, 1, 1, 3, 0, 2, 1, 3, 0], np.int32)


Axes = tuple[tuple[str, int], ...]
CUT = ("delayed", "root", "dc", "asgd")  # what differs to a mesh that cuts a worker's leaves


def running(
  executor: str, axes: dict[str, int], sizes: tuple[int, ...] = SIZES, names=tuple(METHODS)
) -> Running:
  """Methods of the table in one program."""
  found = layout_of(tuple(axes.items()), sizes, names)
  task = regressions(names, regression(80))
  with pytest.MonkeyPatch.context() as patch:  # it is the same for every executor, and takes time
    patch.setattr(inference, "layout_of", lambda job: found)
    return Running(together(names), executor, axes, sizes, None, task=task)


def together(names: tuple[str, ...]) -> Method:
  return side_by_side({name: METHODS[name] for name in names})


@functools.cache
def layout_of(axes: Axes, sizes: tuple[int, ...], names: tuple[str, ...]) -> layouts.Layout:
  task = regressions(names, regression(80))
  return inference.layout_of(Job(together(names), task, dict(axes), np.asarray(sizes), None))


@functools.cache
def simulated() -> tuple[list[Any], list[Any], layouts.Layout]:
  """The model and the staleness of all workers [W, ...] at the start of each round, by method."""
  run = running("simulate", FLAT)
  models, delays = [run.params()], []
  for _ in range(ROUNDS):
    delays.append({n: staleness(n, run.state.method[n].held) for n in METHODS})
    models.append(run.rounds(1).params())
  return models, delays, run.layout


def staleness(name: str, held: Any) -> np.ndarray:
  """[W, 7, 3] of every worker and coordinate, or what broadcasts to it; the bias is the last."""
  if name == "asgd":
    return np.zeros((4, 1, 1), int)
  if name == "root" or name == "hogwild":
    return flat(held.staleness)
  return np.broadcast_to(np.reshape(held.staleness, (-1, 1, 1)), (4, 1, 1))


def flat(tree: Any) -> np.ndarray:
  return np.concatenate([tree["w"], np.asarray(tree["b"])[..., None, :]], -2)


class Transcribed:
  """The history of a method in numpy: the models x_0 ... x_t [7, 3], and what it remembers."""

  def __init__(self, start: np.ndarray):
    self.x = [start.astype(np.float64)]
    self.velocity, self.square = np.zeros((7, 3)), np.zeros((7, 3))
    self.velocities = [np.zeros((7, 3))] * 4
    task = regression(80)
    self.rows = np.hstack([task.train["x"], np.ones((80, 1))]).astype(np.float64)
    self.y = task.train["y"].astype(np.float64)
    self.parts = np.split(np.arange(80), np.cumsum(SIZES)[:-1])

  def gradient(self, i: int, x: np.ndarray) -> np.ndarray:
    a = self.rows[self.parts[i]]
    return a.T @ (a @ x - self.y[self.parts[i]]) / len(a)

  def read(self, tau: np.ndarray) -> np.ndarray:
    """Each coordinate of the model that is tau rounds old."""
    past = np.stack(self.x[::-1])
    return np.take_along_axis(past, np.broadcast_to(tau, (1, 7, 3)), 0)[0]

  def moved(self, tau: np.ndarray) -> np.ndarray:
    return self.x[-1] - self.read(tau)

  def old_gradients(self, taus: np.ndarray) -> list[np.ndarray]:
    return [self.gradient(i, self.read(taus[i])) for i in range(4)]


average = lambda values: np.average(values, 0, SHARES)


def heavy_ball(ours: Transcribed, gradient: np.ndarray) -> np.ndarray:
  ours.velocity = 0.5 * ours.velocity + gradient
  return ours.x[-1] - 0.1 * ours.velocity


def delayed_(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  assert (taus == min(2, len(ours.x) - 1)).all()
  return heavy_ball(
    ours, average([ours.gradient(i, ours.x[max(0, len(ours.x) - 3)]) for i in range(4)])
  )


def random(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  return ours.x[-1] - 0.1 * average(ours.old_gradients(taus))


def local(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  """A momentum of each worker's own; what is averaged is the change of its model."""
  gradients = ours.old_gradients(taus)
  ours.velocities = [0.5 * v + g for v, g in zip(ours.velocities, gradients, strict=True)]
  return ours.x[-1] - 0.1 * average(ours.velocities)


def aware(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  assert (taus[:, 0, 0] == np.minimum([0, 1, 4, 2], len(ours.x) - 1)).all()
  return heavy_ball(ours, average(np.stack(ours.old_gradients(taus)) / np.maximum(taus, 1)))


def root(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  slower = np.stack(ours.old_gradients(taus)) / np.sqrt(np.maximum(taus, 1))
  return ours.x[-1] - 0.1 * average(slower)


def adaptive(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  squares = [0.8 * ours.square + 0.2 * g**2 for g in ours.old_gradients(taus)]
  compensated = [
    g + 0.5 / np.sqrt(s + 1e-7) * g * g * ours.moved(tau)
    for g, s, tau in zip(ours.old_gradients(taus), squares, taus, strict=True)
  ]
  ours.square = average(squares)
  return ours.x[-1] - 0.1 * average(compensated)


def compensated(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  assert (taus[:, 0, 0] == np.minimum([1, 3, 1, 3], len(ours.x) - 1)).all()
  gradients = zip(ours.old_gradients(taus), taus, strict=True)
  return ours.x[-1] - 0.1 * average([g + 0.2 * g * g * ours.moved(tau) for g, tau in gradients])


def added(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  gradients = zip(SHARES, ours.old_gradients(taus), strict=True)
  return ours.x[-1] - 0.02 * sum(share * g for share, g in gradients)


def synchronous(ours: Transcribed, taus: np.ndarray) -> np.ndarray:
  return heavy_ball(ours, average(ours.old_gradients(taus)))


TRANSCRIPTIONS: dict[str, Callable[[Transcribed, np.ndarray], np.ndarray]] = {
  "delayed": delayed_,
  "random": random,
  "local": local,
  "aware": aware,
  "root": root,
  "dc": adaptive,
  "dc_constant": compensated,
  "hogwild": added,
  "asgd": synchronous,
}


@pytest.mark.parametrize("name", METHODS)
def test_rounds_equal_numpy(name):
  """Six rounds of workers with unequal weights, with the delays that were drawn."""
  models, delays, _ = simulated()
  ours = Transcribed(flat(models[0][name]))
  for after, taus in zip(models[1:], delays, strict=True):
    assert taus[name].min() >= 0
    assert taus[name].max() < len(ours.x)
    ours.x.append(TRANSCRIPTIONS[name](ours, taus[name]))
    np.testing.assert_allclose(flat(after[name]), ours.x[-1], atol=2e-6)
  if name not in ("delayed", "aware", "dc_constant", "asgd"):
    assert len({int(x) for taus in delays for x in taus[name].ravel()}) >= 3


@pytest.mark.slow
def test_executions_agree():
  got, want = running("spmd", SLICED).rounds(ROUNDS).params(), simulated()[0][-1]
  for name in METHODS:
    assert distance(got[name], want[name]) <= 1e-5, name


@pytest.mark.slow
def test_a_mesh_that_cuts_a_worker_agrees():
  axes = {"data": 4, "fsdp": 2}
  run = lambda executor: running(executor, axes, (20,) * 4, CUT).rounds(ROUNDS).params()
  got, want = run("spmd"), run("simulate")
  for name in CUT:
    assert distance(got[name], want[name]) <= 1e-5, name


@pytest.mark.slow
def test_the_optax_face_is_the_method():
  """With the key of the run: the same delays."""
  names = tuple(METHODS)
  task = regressions(names, regression(80))
  method, (examples, sizes) = side_by_side(METHODS), split(regression(80), SIZES)
  examples["mask"] = (np.arange(30) < np.asarray(sizes)[:, None]).astype(np.float32)
  params_key, run_key = jax.random.split(jax.random.key(0))
  params, optimizer = task.init(params_key), as_optax(method)
  begin = (params, cast(Any, optimizer.init(params))._replace(key=run_key))

  def run(batch, weight):
    def one(carry, _):
      grads = jax.grad(task.loss)(carry[0], batch, None)
      updates, state = optimizer.update(grads, carry[1], carry[0], weight=weight)
      return (optax.apply_updates(carry[0], updates), state), None

    return cast(Any, jax.lax.scan(one, begin, None, ROUNDS)[0])[1].state

  shares = jnp.asarray(SHARES, jnp.float32)
  state = jax.jit(jax.vmap(run, axis_name="data"))(examples, shares)
  deployed = jax.tree.map(lambda x: x[2], method.params(state))
  for name in names:
    assert distance(deployed[name], simulated()[0][-1][name]) <= 1e-5, name


@pytest.mark.slow
def test_without_delays_it_is_the_inner_method():
  """Bit by bit; and hogwild adds what four workers have."""
  local_steps = local_sgd(MOMENTUM, mean(), period=1)
  pairs = {
    "delayed": (delayed(HEAVY, constant(0)), HEAVY),
    "drawn": (delayed(HEAVY, uniform(1)), HEAVY),
    "local": (delayed(local_steps, per_worker([0])), local_steps),
    "aware": (staleness_aware(HEAVY, geometric(1.0, bound=0)), HEAVY),
    "dc": (dc_asgd(0.1, mean(), constant(0)), PLAIN),
    "dc_constant": (dc_asgd_constant(0.1, mean(), constant(0)), PLAIN),
    "asgd": (asgd(MOMENTUM, mean()), HEAVY),
    "hogwild": (hogwild(0.025, mean(), bound=1), PLAIN),
  }
  both = {f"{name} {i}": pair[i] for name, pair in pairs.items() for i in (0, 1)}
  for axes, sizes in ((FLAT, SIZES), ({"data": 1}, (80,))):
    task = regressions(tuple(both), regression(80))
    got = Running(side_by_side(both), "simulate", axes, sizes, None, task=task).rounds(3).params()
    for name in pairs:
      if name != "hogwild":
        assert distance(got[f"{name} 0"], got[f"{name} 1"]) == 0, name
    if axes == FLAT:
      assert distance(got["hogwild 0"], got["hogwild 1"]) <= 1e-6


def test_one_worker_is_the_inner_optimizer():
  """Delays of one, with optax by hand."""
  task = regression(80)
  run = Running(delayed(HEAVY, constant(1)), "simulate", {"data": 1}, (80,), None, task=task)
  models = [run.params()]
  state = MOMENTUM.init(models[0])

  @jax.jit
  def step(before, state, last):
    updates, state = MOMENTUM.update(jax.grad(task.loss)(before, task.train, None), state, last)
    return optax.apply_updates(last, updates), state

  for t in range(4):
    model, state = step(models[max(0, t - 1)], state, models[-1])
    models.append(model)
  assert distance(run.rounds(4).params(), models[-1]) <= 1e-6


def test_several_local_steps_from_an_old_model():
  """What three steps from x_{t-1} change is added to x_t; other numbers of steps are kept."""
  method = delayed(local_sgd(SGD, mean(), period=[[0, 3], [2, 5]]), constant(1))
  assert method.later == ((2, 5),)
  assert method.in_rounds(5, 0.1).local_steps == 5
  run = Running(method.over(lambda a: a), "simulate", FLAT, SIZES, None, task=regression(80))
  ours = Transcribed(flat(run.params()))
  for _ in range(4):
    before = ours.x[max(0, len(ours.x) - 2)]
    changes = []
    for i in range(4):
      x = before
      for _ in range(3):
        x = x - 0.1 * ours.gradient(i, x)
      changes.append(x - before)
    ours.x.append(ours.x[-1] + average(changes))
  np.testing.assert_allclose(flat(run.rounds(4).params()), ours.x[-1], atol=2e-6)


def events(executor: str, order: np.ndarray) -> Running:
  task = regressions(tuple(EVENTS), regression(80))
  method = side_by_side(EVENTS)
  return Running(method, executor, {"data": 1}, SIZES, None, task=task, order=order)


def test_events_equal_numpy():
  """A server and four clients one by one: what each pulled, how old it is, one mean square."""
  run = events("simulate", ORDER)
  ours = {name: Transcribed(flat(tree)) for name, tree in run.params().items()}
  pulled = np.zeros(4, int)  # the version that each client has
  for t, i in enumerate(ORDER):
    tau = np.full((1, 1), t - pulled[i])
    for name, one in ours.items():
      g = one.gradient(i, one.x[pulled[i]])
      one.square = 0.8 * one.square + 0.2 * g**2
      lam = 0.5 / np.sqrt(one.square + 1e-7)
      one.x.append(
        {
          "asgd": lambda one=one, g=g: heavy_ball(one, g),
          "aware": lambda one=one, g=g, tau=tau: one.x[-1] - 0.1 * g / max(tau.item(), 1),
          "dc": lambda one=one, g=g, tau=tau, lam=lam: (
            one.x[-1] - 0.1 * (g + lam * g * g * one.moved(tau))
          ),
        }[name]()
      )
    pulled[i] = t + 1
    for name, params in run.rounds(1).params().items():
      np.testing.assert_allclose(flat(params), ours[name].x[-1], atol=2e-6, err_msg=name)
  for name in EVENTS:
    held = run.state.method[name].held
    assert np.asarray(held.version.part).tolist() == pulled.tolist()
    models = [ours[name].x[version] for version in pulled]
    np.testing.assert_allclose(flat(held.params.part), models, atol=2e-6)
    assert run.state.method[name].memory == () or name == "dc"
  at_once = events("spmd", ORDER).rounds(len(ORDER)).params()
  for name in EVENTS:
    assert distance(at_once[name], run.params()[name]) <= 1e-5


def test_who_loses_a_round_pulls_nothing():
  pulls = last_pull()

  def one(active):
    state = pulls.after(pulls.init(jnp.zeros(2)), jnp.ones(2), key=jax.random.key(0), active=active)
    return pulls.read(state)

  got = jax.vmap(one, axis_name="data")(jnp.asarray([True, False]))
  assert np.asarray(got.params).tolist() == [[1, 1], [0, 0]]
  assert np.asarray(got.staleness).tolist() == [0, 1]


def drawn(delays: Delays, rounds: int, seed: int = 0) -> np.ndarray:
  """[rounds, 4], what a law makes of the model t: how old is what each worker reads in round t."""

  def run(_):
    def one(state, t):
      read = delays.read(state).params
      key = jax.random.fold_in(jax.random.key(seed), t)
      return delays.after(state, jnp.float32(t + 1), key=key), t - read

    return jax.lax.scan(one, delays.init(jnp.float32(0)), jnp.arange(rounds))[1]

  found = jax.jit(jax.vmap(run, axis_name="data", out_axes=1))(jnp.zeros(4))
  return np.asarray(found).astype(int)


LAWS = {
  "constant": (constant(3), [0, 0, 0, 1]),
  "uniform": (uniform(4), [0.25] * 4),
  "geometric": (geometric(1.0, bound=3), np.asarray([8, 4, 2, 1]) / 15),
  "by_coordinate": (by_coordinate(4), [0.25] * 4),
  "per_worker": (per_worker([1, 0]), [0.5, 0.5]),
}


@pytest.mark.parametrize("name", slow_except(["uniform"], LAWS))
def test_laws_of_delay(name):
  """Never beyond the bound or the first model, in the right proportions, private, reproducible."""
  delays, law = LAWS[name]
  count = 4000
  found = drawn(delays, count)
  assert (found <= np.arange(count)[:, None]).all()
  frequencies = np.bincount(found[8:].ravel()) / found[8:].size
  assert len(frequencies) == len(law)
  np.testing.assert_allclose(frequencies, law, atol=5 * math.sqrt(0.25 / (4 * count)))
  assert (drawn(delays, 50) == found[:50]).all()
  if name in ("uniform", "geometric", "by_coordinate"):
    assert (drawn(delays, 50, seed=1) != found[:50]).any()
    centred = found[8:] - found[8:].mean(0)
    correlations = np.corrcoef(centred.T) - np.eye(4)
    assert np.abs(correlations).max() <= 5 / math.sqrt(count)


@pytest.mark.slow
def test_coordinates_have_delays_of_their_own():
  state = by_coordinate(4).init({"a": jnp.zeros((3, 50)), "b": jnp.zeros(50)})

  def run(_):
    found = state
    for t in range(6):
      params = jax.tree.map(lambda x, t=t: jnp.full_like(x, t + 1), by_coordinate(4).read(state)[0])
      found = by_coordinate(4).after(found, params, key=jax.random.key(t))
    return by_coordinate(4).read(found)

  got = jax.vmap(run, axis_name="data")(jnp.zeros(2))
  a, b = np.asarray(got.params["a"]), np.asarray(got.params["b"])
  assert (a == 6 - np.asarray(got.staleness["a"])).all()
  assert set(a.ravel()) == {3, 4, 5, 6}
  assert not (a[0, 0] == b[0]).all()
  assert not (a[0] == a[1]).all()


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("tau", [1, 4])
def test_constant_delays_are_stable_where_the_docstring_says(aware, tau):
  """And with a step size over tau for tau times as large a one."""
  edge = 2 * math.sin(math.pi / (4 * tau + 2)) * (tau if aware else 1)
  make = staleness_aware if aware else delayed

  def size(rate: float) -> float:
    optimizer = as_optax(make(data_parallel(optax.sgd(rate), mean()), constant(tau)))

    def run(start):
      def one(carry, _):
        updates, state = optimizer.update(carry[0], carry[1], carry[0])
        return (carry[0] + updates, state), None

      begin = (start, optimizer.init(start))
      return cast(Any, jax.lax.scan(one, begin, None, 1000)[0])[0]

    return float(jnp.abs(jax.vmap(run, axis_name="data")(jnp.ones(1)))[0])

  assert size(0.95 * edge) < 1e-2
  assert size(1.05 * edge) > 1e2


def test_sparse_updates_of_a_round_are_steps_one_after_the_other():
  """Four workers whose gradients do not meet: hogwild loses nothing of what each of them does."""
  curvature = jnp.arange(1.0, 9.0)
  optimizer = as_optax(hogwild(0.1, mean(), bound=1))

  def run(mask):
    def one(carry, _):
      updates, state = optimizer.update(mask * curvature * carry[0], carry[1], carry[0])
      return (carry[0] + updates, state), None

    begin = (jnp.ones(8), optimizer.init(jnp.ones(8)))
    return cast(Any, jax.lax.scan(one, begin, None, 3)[0])[0]

  masks = jnp.repeat(jnp.eye(4), 2, axis=1)
  got = jax.vmap(run, axis_name="data")(masks)
  np.testing.assert_allclose(got, np.tile((1 - 0.1 * curvature) ** 3, (4, 1)), rtol=1e-5)


def test_what_is_private():
  """Delays that differ; the models kept for them, where they are equal, are kept once."""
  layout = simulated()[2].state
  every = lambda tree: set(map(bool, jax.tree.leaves(tree)))
  for name in set(METHODS) - {"asgd"}:
    assert every(layout[name].held.past) == {False}
    assert every(layout[name].held.staleness) == {name != "delayed"}
    assert every(layout[name].held.count) == {False}
  assert every(layout["dc"].memory) == {False}
  assert every((layout["asgd"].held.params, layout["asgd"].held.version)) == {True}


def sent(method: Method) -> np.ndarray:
  job = Job(method, regression(80), FLAT, np.asarray(SIZES), None)
  return traffic.of_method(job, inference.layout_of(job), 3).sent


@pytest.mark.parametrize("name", METHODS)
def test_bytes(name):
  """Those of the inner method; the adaptive compensation also averages its squares."""
  np.testing.assert_allclose(sent(METHODS[name]), (2 if name == "dc" else 1) * sent(PLAIN))


@pytest.mark.parametrize(
  ("kind", "spec", "words"),
  [
    ("delays", "constant(-1)", "rounds=-1 is not at least 0"),
    ("delays", "uniform(0)", "bound=0 is not at least 1"),
    ("delays", "geometric(3.0)", r"geometric\(3.0\) has no bound"),
    ("delays", "geometric(0.0, bound=3)", "mean=0.0 is not above 0"),
    ("delays", "geometric(1.0, bound=-1)", "bound=-1 is not at least 0"),
    ("delays", "per_worker([])", r"rounds=\[\]"),
    ("delays", "per_worker([1, -2])", r"rounds=\[1, -2\]"),
    (
      "method",
      "delayed(data_parallel(sgd(0.1), mean()), uniform(2.5))",
      "bound=2.5 is not a whole",
    ),
    ("method", "hogwild(0.1, mean())", "hogwild needs bound"),
    ("method", "hogwild(0.1, mean(), bound=0)", "bound=0"),
    ("method", "hogwild(0.0, mean(), bound=2)", "learning_rate=0.0"),
    ("method", "dc_asgd(0.1, mean(), constant(1), lam=-1.0)", "lam=-1.0 is not at least 0"),
    ("method", "dc_asgd(0.1, mean(), constant(1), decay=1.0)", r"decay=1.0 is not in \[0, 1\)"),
    ("method", "dc_asgd(0.1, mean(), constant(1), eps=0.0)", "eps=0.0 is not above 0"),
    ("method", "asgd(sgd(0.1), gossip(ring()))", "use d_psgd"),
    (
      "method",
      "staleness_aware(data_parallel(sgd(0.1), mean()), constant(1), power=-1.0)",
      "power=-1.0 is not at least 0",
    ),
  ],
)
def test_ranges_are_checked_when_built(kind, spec, words):
  with pytest.raises(ValueError, match=words):
    registry.build(kind, spec)


def test_delays_by_worker_fit_the_workers():
  with pytest.raises(ValueError, match="3 delays by worker do not repeat evenly over 4 workers"):
    sent(delayed(PLAIN, per_worker([0, 1, 2])))
