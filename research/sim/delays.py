"""Implements staleness models, which choose the past model that each worker reads.

    x_{t - tau_i}    the model that worker i reads in round t

Delays are in rounds. Most staleness models draw tau_i independently in each round, and store as
many past models as the longest delay needs. A worker whose delay exceeds the number of rounds so
far reads the initial model. `last_pull` instead stores, for each owner, the model that this owner
received at the end of its last round.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core import checks
from research.core.base import Array, Key, Own, Params, State, Tree
from research.core.part import Part, required

_DELAYS = 0x64656C61


class Reading(NamedTuple):
  params: Params  # x_{t - tau}, the model that a worker reads
  staleness: Tree  # tau, int32; for each leaf, a scalar or one value per coordinate


class Delays(Part):
  """A staleness model, from the point of view of one worker.

  `read` needs no worker axis in scope. `after` draws all randomness of the next round from the key
  of the sync.
  """

  one_by_one = False  # True for a server that serves one worker at a time

  @required
  def init(self, params: Params) -> State:
    """Returns the initial state for the initial model x_0."""
    ...

  @required
  def read(self, state: State) -> Reading:
    """Returns the model that this worker reads in round t, and its staleness.

    Args:
      state: the state of round t.
    """
    ...

  @required
  def after(self, state: State, params: Params, *, key: Key, active: bool | Array = True) -> State:
    """Returns the state after a round.

    Args:
      state: the state of round t.
      params: the new model x_{t+1}.
      key: the typed key of the sync, equal on all workers.
      active: whether this worker took part in the round.
    """
    ...


class Recent(NamedTuple):
  past: Params  # leaves [longest + 1, ...]; row k mod (longest + 1) contains x_k
  staleness: Tree  # int32, this worker's delay in round t: a scalar, or one per coordinate
  count: Array  # int32, t


class RecentModels(Delays):
  """Stores the last `longest` + 1 models; a worker's delay determines which one it reads.

  A client that is not sampled in a round keeps the delay that it drew last.
  """

  @property
  @required
  def longest(self) -> int:
    """The maximum delay, in rounds."""
    ...

  @required
  def law(self, key: Key, shape: tuple[int, ...]) -> Array:
    """Draws this worker's delays for the next round.

    Args:
      key: a typed key, equal on all workers.
      shape: the shape of the delays.

    Returns:
      The delays, int32 in [0, longest].
    """
    ...

  def start(self, params: Params) -> Tree:
    """Returns the delays of round 0, which are zero; later rounds have the same shapes."""
    del params
    return jnp.zeros((), jnp.int32)

  def init(self, params):
    rows = self.longest + 1
    past = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), params)
    return Recent(past, self.start(params), jnp.zeros((), jnp.int32))

  def read(self, state):
    def at(past, staleness):
      row = (state.count - staleness) % (self.longest + 1)
      return jnp.take_along_axis(past, row[None], 0)[0] if row.shape else past[row]

    staleness = jax.tree.broadcast(state.staleness, state.past)
    return Reading(jax.tree.map(at, state.past, staleness), staleness)

  def after(self, state, params, *, key, active=True):
    del active
    count, rows = state.count + 1, self.longest + 1
    past = jax.tree.map(lambda kept, x: kept.at[count % rows].set(x), state.past, params)
    leaves, treedef = jax.tree.flatten(state.staleness)
    keys = jax.random.split(jax.random.fold_in(key, _DELAYS), len(leaves))
    drawn = [jnp.minimum(self.law(k, x.shape), count) for k, x in zip(keys, leaves, strict=True)]
    return Recent(past, treedef.unflatten(drawn), count)


class Constant(RecentModels, name="constant"):
  """A constant delay of `rounds` rounds for every worker.

  Args:
    rounds: the delay in rounds, at least 0.

  Raises:
    ValueError: if rounds is negative.
  """

  rounds: int

  def check(self):
    checks.at_least("rounds", self.rounds, 0)

  @property
  def longest(self):
    return self.rounds

  def law(self, key, shape):
    del key
    return jnp.full(shape, self.rounds, jnp.int32)


constant = Constant


class Uniform(RecentModels, name="uniform"):
  """Delays that are uniform on [0, bound) and independent for every worker and round.

  Args:
    bound: the exclusive upper bound of the delays in rounds, at least 1.

  Raises:
    ValueError: if bound is below 1.
  """

  bound: int

  def check(self):
    checks.at_least("bound", self.bound)

  @property
  def longest(self):
    return self.bound - 1

  def law(self, key, shape):
    return jax.random.randint(collectives.worker_key(key), shape, 0, self.bound, jnp.int32)


uniform = Uniform


class Geometric(RecentModels, name="geometric"):
  """Delays on [0, bound] with P(tau) proportional to (mean / (1 + mean))^tau, drawn every round.

  Args:
    mean: the mean delay in rounds before truncation at `bound`; the mean after truncation is
      smaller.
    bound: the maximum delay in rounds.

  Raises:
    ValueError: if mean is not above 0, or bound is negative or missing.
  """

  mean: float
  _: KW_ONLY
  bound: int | None = None

  def check(self):
    checks.above("mean", self.mean)
    if self.bound is None:
      raise ValueError(
        f"geometric({self.mean}) has no bound: every old model would be kept; give bound=, in "
        "rounds"
      )
    checks.at_least("bound", self.bound, 0)

  @property
  def longest(self):
    assert self.bound is not None
    return self.bound

  def law(self, key, shape):
    with jax.ensure_compile_time_eval():
      logits = jnp.log(self.mean / (1 + self.mean)) * jnp.arange(self.longest + 1)
    own = collectives.worker_key(key)
    return jax.random.categorical(own, logits, shape=shape).astype(jnp.int32)


geometric = Geometric


class PerWorker(RecentModels, name="per_worker"):
  """A constant delay of `rounds[i]` rounds for worker i; a shorter list repeats over the workers.

  Args:
    rounds: the delays in rounds, at least 0.

  Raises:
    ValueError: if the list is empty or contains a negative number; or, at trace time, if the number
      of workers is not a multiple of the list's length.
  """

  rounds: Sequence[int]

  def check(self):
    if not self.rounds or min(self.rounds) < 0:
      raise ValueError(
        f"rounds={list(self.rounds)} is not a list of whole numbers that are at least 0"
      )

  @property
  def longest(self):
    return max(self.rounds)

  def law(self, key, shape):
    del key
    count, length = collectives.worker_count(), len(self.rounds)
    if count % length:
      raise ValueError(f"{length} delays by worker do not repeat evenly over {count} workers")
    mine = jnp.asarray(self.rounds, jnp.int32)[collectives.worker_index() % length]
    return jnp.broadcast_to(mine, shape)


per_worker = PerWorker


class ByCoordinate(Uniform, name="by_coordinate"):
  """Delays of inconsistent reads: each coordinate of a worker's model has its own delay.

  The delays are uniform on [0, bound), and independent for every coordinate and round.

  Args:
    bound: the exclusive upper bound of the delays in rounds, at least 1.

  Raises:
    ValueError: if bound is below 1.
  """

  def start(self, params):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params)


by_coordinate = ByCoordinate


class Pulled(NamedTuple):
  params: Own  # the model that this owner last received
  version: Own  # int32, the round that produced this model
  count: Array  # int32, t


class LastPull(Delays, name="last_pull"):
  """A staleness model in which each owner reads the model that it received last.

  An owner receives a model at the end of each of its rounds; the staleness is the number of rounds
  since then. With one worker that serves one client of a population at a time, this class models a
  server with asynchronous clients. An owner that drops out of a round keeps its model.
  """

  one_by_one = True

  def init(self, params):
    zero = jnp.zeros((), jnp.int32)
    return Pulled(Own(params), Own(zero), zero)

  def read(self, state):
    params, staleness = state.params.part, state.count - state.version.part
    return Reading(params, jax.tree.broadcast(staleness, params))

  def after(self, state, params, *, key, active=True):
    del key
    count = state.count + 1
    pulled = lambda new, old: jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)
    model, version = pulled((params, count), (state.params.part, state.version.part))
    return Pulled(Own(model), Own(version), count)


last_pull = LastPull
