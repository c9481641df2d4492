"""Compares deep Q-learning on a parameter server with deep Q-learning in one process.

On the server, actors push gradients and do not wait for each other. The single process makes the
same number of decisions and of gradient steps. `bench.py` runs this application.
"""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.applications.fleets import needs_simulator
from experiments.applications.measured import Rows, row
from research.core.spec import calls
from research.server.actors import HeadProcess, Inherited, Sizes, Snapshot, inherited, settle
from research.server.events import Push
from research.server.messages import Rules, Spent
from research.tasks.driving import judging

ACTORS, SEEDS = 2, 2
EPISODES = 15  # held-out episodes per seed, for measuring the return
SCENARIO = "highway"
STEPS = 4000  # total number of decisions of all actors
PERIOD = 2  # number of decisions of an actor per gradient
BATCH = 64
KEPT = 4000  # number of transitions that an actor stores
TARGET = 100  # number of gradients between two updates of the target network
DISCOUNT = 0.9
RANDOM = (1.0, 0.05)  # fraction of random actions at the start, and after half of the steps
RATE = 1e-3
METHOD = str(calls.asgd(calls.adam(RATE), calls.mean()))
WIDTH = 64


class Memory:
  """The newest transitions of an actor, in arrays of fixed length."""

  def __init__(self, like: np.ndarray):
    self.x = np.zeros((KEPT, *like.shape), np.float32)
    self.after = np.zeros_like(self.x)
    self.action = np.zeros(KEPT, np.int32)
    self.reward, self.goes_on = (np.zeros(KEPT, np.float32) for _ in range(2))
    self.count = 0

  def add(self, x: np.ndarray, action: int, reward: float, after: np.ndarray, over: bool) -> None:
    place = self.count % KEPT
    self.x[place], self.after[place] = x, after
    self.action[place], self.reward[place], self.goes_on[place] = action, reward, not over
    self.count += 1

  def batch(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    chosen = rng.integers(0, min(self.count, KEPT), BATCH)
    columns = (self.x, self.action, self.reward, self.after, self.goes_on)
    return tuple(column[chosen] for column in columns)


class Learner(NamedTuple):
  """The compiled functions of double Q-learning with a target network."""

  init: Callable[[int], Any]  # seed -> parameters
  choose: Callable[[Any, np.ndarray], Any]  # (params, scene) -> action
  grads: Callable[..., tuple[Any, Any]]  # (params, target, *batch) -> (loss, gradient)


def learner() -> Learner:
  """Builds the functions for a network with attention over vehicles, and for the Huber loss.

  Reference: Mnih et al., 2015, Human-level control through deep reinforcement learning; van Hasselt
    et al., 2015, arXiv:1509.06461 (double Q-learning).
  """
  import jax
  import jax.numpy as jnp
  import optax

  from research.models.ego_attention import ego_attention
  from research.tasks.driving.experts import ACTIONS
  from research.tasks.driving.scene import FEATURES, NEIGHBOURS

  module: Any = ego_attention(WIDTH)(ACTIONS)
  value = lambda params, x: module.apply({"params": params}, x)
  like = np.zeros((1, 1 + NEIGHBOURS, FEATURES), np.float32)

  def loss(params, target, x, action, reward, after, goes_on):
    best = jnp.argmax(value(params, after), 1)
    later = jnp.take_along_axis(value(target, after), best[:, None], 1)[:, 0]
    wanted = jax.lax.stop_gradient(reward + DISCOUNT * goes_on * later)
    found = jnp.take_along_axis(value(params, x), action[:, None], 1)[:, 0]
    return jnp.mean(optax.huber_loss(found, wanted))

  return Learner(
    lambda seed: module.init(jax.random.key(seed), like)["params"],
    jax.jit(lambda params, x: jnp.argmax(value(params, x[None])[0])),
    jax.jit(jax.value_and_grad(loss)),
  )


class Road:
  """Drives one episode after another, and stores the transitions."""

  def __init__(self, learner: Learner, seed: int):
    from research.tasks.driving import scenarios

    self.environment, self.learner = scenarios.make(SCENARIO), learner
    self.rng, self.episode = np.random.default_rng(seed), seed * 10_000  # unlike `returns`
    self.x = self._start()
    self.memory = Memory(self.x)

  def _start(self) -> np.ndarray:
    from research.tasks.driving.scene import features, perceive

    self.environment.reset(seed=self.episode)
    self.episode += 1
    return features(perceive(self.environment.vehicle))

  def drive(self, params: Any, decisions: int, done: float) -> None:
    """Drives for a number of decisions.

    Args:
      params: the parameters of the Q function.
      decisions: the number of decisions.
      done: the completed fraction of the run, which determines the probability of a random action.
    """
    from research.tasks.driving.experts import ACTIONS
    from research.tasks.driving.scene import features, perceive

    share = RANDOM[0] + (RANDOM[1] - RANDOM[0]) * min(1.0, 2 * done)
    for _ in range(decisions):
      is_random = self.rng.random() < share
      action = self.rng.integers(ACTIONS) if is_random else self.learner.choose(params, self.x)
      _, reward, crashed, late, _ = self.environment.step(int(action))
      after = features(perceive(self.environment.vehicle))
      self.memory.add(self.x, int(action), float(reward), after, bool(crashed))
      self.x = self._start() if crashed or late else after


def alone(seed: int) -> tuple[Any, float]:
  """Trains in one process; returns the parameters, and the seconds since the first decision."""
  import optax

  functions = learner()
  road, params = Road(functions, 1 + seed), functions.init(seed)
  optimizer = optax.adam(RATE)
  state, target, batch = optimizer.init(params), params, None
  begun = time.perf_counter()
  for number in range(STEPS // PERIOD):
    road.drive(params, PERIOD, number * PERIOD / STEPS)
    batch = road.memory.batch(road.rng)
    _, grads = functions.grads(params, target, *batch)
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)
    if (number + 1) % TARGET == 0:
      target = params
  return params, time.perf_counter() - begun


class Actor:
  """Pulls the model, drives, and pushes gradients, in an actor's own process."""

  def __init__(self, number: int, seed: int, given: Inherited):
    settle("cpu", given)
    import jax

    self.number, self.functions = number, learner()
    like = self.functions.init(0)
    self.treedef = jax.tree.structure(like)
    self.road = Road(self.functions, 1 + seed + 100 * (number + 1))
    self.road.drive(like, 1, 0.0)
    jax.block_until_ready(self.functions.grads(like, like, *self.road.memory.batch(self.road.rng)))

  def ready(self) -> bool:
    """Returns True when all functions are compiled."""
    return True

  def run(self, head: Any, updates: int) -> int:
    """Drives and pushes until the server has made all updates; returns the number of decisions."""
    import jax
    import ray

    joined: Any = ray.get(head.join.remote(self.number, "", os.getpid()))
    pulled, decisions = joined.pulled, 0
    version, params = pulled.version, self.treedef.unflatten(pulled.leaves)
    target, copied = params, version // TARGET
    while True:
      self.road.drive(params, PERIOD, version / updates)
      decisions += PERIOD
      loss, grads = self.functions.grads(params, target, *self.road.memory.batch(self.road.rng))
      payloads = [np.asarray(x) for x in jax.tree.leaves(grads)]
      number = decisions // PERIOD - 1
      push = Push(self.number, joined.incarnation, number, number, 1, (version,))
      reply: Any = ray.get(head.push.remote(push, payloads, _spent(float(loss), payloads)))
      if reply.kind != "counted":
        return decisions
      version, params = reply.pulled.version, self.treedef.unflatten(reply.pulled.leaves)
      if version // TARGET > copied:
        target, copied = params, version // TARGET


def _spent(loss: float, payloads: list[np.ndarray]) -> Spent:
  sent = sum(x.nbytes for x in payloads)
  return Spent(loss, 0.0, 0.0, 0.0, 0.0, sent, sent)


def together(actors: int, seed: int) -> tuple[Any, float, dict[str, Any]]:
  """Trains on Ray; returns the parameters, the seconds since the first decision, and a report."""
  import jax

  from research.server import cluster, work
  from research.training.config import Config

  params = learner().init(seed)
  shapes = work.shapes_of(params)
  leaves = [(name, x.shape, str(x.dtype)) for name, x in shapes.items()]
  sizes = Sizes(leaves, [list(range(len(leaves)))])
  start = dict(zip(shapes, map(np.asarray, jax.tree.leaves(params)), strict=True))
  place = Snapshot(0, start, None, [[0, 0, 0] for _ in range(actors)])
  updates = STEPS // PERIOD
  rules = Rules("async", actors, updates, (1.0,) * actors)
  bytes_ = sum(x.nbytes for x in start.values())
  with cluster.running(Config(), actors + 1, bytes_) as ray:
    given = inherited()
    head = ray.remote(HeadProcess).remote(rules, METHOD, seed, sizes, place, [], given)
    make = ray.remote(Actor).options(num_cpus=1)
    workers = [make.remote(number, seed, given) for number in range(actors)]
    ray.get([worker.ready.remote() for worker in workers])
    begun = time.perf_counter()
    driven = ray.get([worker.run.remote(head, updates) for worker in workers])
    seconds = time.perf_counter() - begun
    report, (_, found, _), _, _ = ray.get(head.snapshot.remote())
  ages = [e.update - e.pushes[0].versions[0] for e in report["events"]]
  told = {"decisions": driven, "staleness": float(np.mean(ages)), "updates": report["version"]}
  tree = jax.tree.structure(params).unflatten([found[name] for name in shapes])
  return tree, seconds, told


def returns(params: Any, episodes: int, first: int) -> np.ndarray:
  """Returns the sum of the simulator's rewards in each held-out episode, for the greedy driver."""
  from research.tasks.driving import recorded, scenarios
  from research.tasks.driving.scene import features, perceive

  functions, environment, found = learner(), scenarios.make(SCENARIO), []
  for seed in range(recorded.HELD_OUT + first, recorded.HELD_OUT + first + episodes):
    environment.reset(seed=seed)
    total, over = 0.0, False
    while not over:
      scene = features(perceive(environment.vehicle))
      action = int(functions.choose(params, scene))
      _, reward, crashed, late, _ = environment.step(action)
      total, over = total + float(reward), crashed or late
    found.append(total)
  return np.array(found)


def dqn(figure: Any) -> Rows:
  """Compares two actors with one process by return and time, for the same number of steps."""
  needs_simulator()
  found: dict[str, list[tuple[np.ndarray, float]]] = {"one process": [], "two actors": []}
  ages = []
  for seed in range(SEEDS):
    params, seconds = alone(seed)
    found["one process"].append((returns(params, EPISODES, seed * EPISODES), seconds))
    params, seconds, told = together(ACTORS, seed)
    print(told, flush=True)
    ages.append(told["staleness"])
    found["two actors"].append((returns(params, EPISODES, seed * EPISODES), seconds))
  mean = {name: float(np.mean([r.mean() for r, _ in runs])) for name, runs in found.items()}
  took = {name: float(np.mean([s for _, s in runs])) for name, runs in found.items()}
  one = "one process"
  rows = [
    row(
      f"DQN, {name}, {STEPS} decisions: return, mean of {SEEDS} seeds",
      mean[name],
      one,
      mean[one],
      by_seed=[float(r.mean()) for r, _ in runs],
      interval=judging.bootstrapped(np.concatenate([r for r, _ in runs]), _ones(runs))[1:],
    )
    for name, runs in found.items()
  ]
  rows += [
    row(
      f"DQN, {name}: seconds of {STEPS} decisions, mean of {SEEDS} seeds",
      took[name],
      one,
      took[one],
      by_seed=[s for _, s in runs],
    )
    for name, runs in found.items()
  ]
  rows.append(row("DQN, two actors: mean staleness, updates", float(np.mean(ages))))
  for axis, values, title in zip(
    figure.subplots(1, 2), (mean, took), ("return", "seconds"), strict=True
  ):
    axis.barh([*values], [*values.values()])
    axis.set(title=f"DQN on the {SCENARIO}: {title}")
  return rows


def _ones(runs: list[tuple[np.ndarray, float]]) -> np.ndarray:
  return np.ones(sum(len(r) for r, _ in runs))
