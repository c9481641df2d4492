"""With which old model a worker computes: laws of staleness in rounds, and what has to be kept.

    x_{t - tau_i}    what worker i reads in round t

The laws draw tau_i anew for each round and keep the last models, as many as the longest delay
needs; before there are tau rounds to look back on, a worker reads the first model. `last_pull`
keeps instead, for each owner, the model that it received when it was last served.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core import checks
from research.core.base import Array, Key, Own, Params, State, Tree

_DELAYS = 0x64656C61

Law = Callable[[Key, tuple[int, ...]], Array]  # (key, shape) -> int32, never above the bound


class Reading(NamedTuple):
  params: Params  # x_{t - tau}, what a worker computes with
  staleness: Tree  # tau, int32: for each leaf a scalar, or one by coordinate


class Delays(NamedTuple):
  """How old the models are that workers compute with, as one worker sees it.

  `read` needs no worker axis in scope; what is random is drawn by `after`, from the key of the
  round's sync, for the round to come.
  """

  init: Callable[[Params], State]  # of x_0
  read: Callable[[State], Reading]  # in round t
  after: Callable[..., State]  # (state, x_{t+1}, *, key, active=True) -> state
  one_by_one: bool = False  # meant for workers that a server serves one at a time


def constant(rounds: int) -> Delays:
  """Every worker is `rounds` behind, in every round.

  Raises:
    ValueError: if rounds < 0.
  """
  checks.at_least("rounds", rounds, 0)
  return _recent(rounds, lambda key, shape: jnp.full(shape, rounds, jnp.int32))


def uniform(bound: int) -> Delays:
  """Every worker draws its delay from [0, bound), all equally likely, anew in every round.

  Raises:
    ValueError: if bound < 1.
  """
  return _recent(bound - 1, _uniform(bound))


def geometric(mean: float, *, bound: int | None = None) -> Delays:
  """P(tau) is proportional to (mean / (1 + mean))^tau on [0, bound], drawn anew in every round.

  Args:
    mean: rounds, of the law before it is cut; what is left of it has a smaller one.
    bound: rounds, the longest delay.

  Raises:
    ValueError: if mean <= 0, bound < 0, or there is no bound.
  """
  checks.above("mean", mean)
  if bound is None:
    raise ValueError(
      f"geometric({mean}) has no bound: every old model would be kept; give bound=, in rounds"
    )
  checks.at_least("bound", bound, 0)
  logits = jnp.log(mean / (1 + mean)) * jnp.arange(bound + 1)

  def law(key, shape):
    own = collectives.worker_key(key)
    return jax.random.categorical(own, logits, shape=shape).astype(jnp.int32)

  return _recent(bound, law)


def per_worker(rounds: Sequence[int]) -> Delays:
  """Worker i is always `rounds[i]` behind; the list repeats over the workers.

  Raises:
    ValueError: if the list is empty or has a negative number; when traced, if the number of workers
      is not a multiple of its length.
  """
  if not rounds or min(rounds) < 0:
    raise ValueError(f"rounds={list(rounds)} is not a list of whole numbers that are at least 0")

  def law(key, shape):
    del key
    count = collectives.worker_count()
    if count % len(rounds):
      raise ValueError(f"{len(rounds)} delays by worker do not repeat evenly over {count} workers")
    mine = jnp.asarray(rounds, jnp.int32)[collectives.worker_index() % len(rounds)]
    return jnp.broadcast_to(mine, shape)

  return _recent(max(rounds), law)


def by_coordinate(bound: int) -> Delays:
  """An inconsistent read: each coordinate of what a worker reads has a delay in [0, bound).

  All are equally likely and drawn anew in every round, apart from one another.

  Raises:
    ValueError: if bound < 1.
  """
  zeros = lambda params: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params)
  return _recent(bound - 1, _uniform(bound), zeros)


def _uniform(bound: int) -> Law:
  checks.at_least("bound", bound)
  return lambda key, shape: jax.random.randint(
    collectives.worker_key(key), shape, 0, bound, jnp.int32
  )


class Recent(NamedTuple):
  past: Params  # leaves [bound + 1, ...]: x_k in row k mod (bound + 1)
  staleness: Tree  # int32, what this worker's delay is in round t: one, or one by coordinate
  count: Array  # int32, t


def _recent(
  bound: int, law: Law, start: Callable[[Params], Tree] = lambda params: jnp.zeros((), jnp.int32)
) -> Delays:
  """The last bound + 1 models, of which workers read by a law.

  A client that a round leaves out keeps the delay that was drawn when it was last served.
  """
  rows = bound + 1

  def init(params):
    past = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), params)
    return Recent(past, start(params), jnp.zeros((), jnp.int32))

  def read(state):
    def at(past, staleness):
      row = (state.count - staleness) % rows
      return jnp.take_along_axis(past, row[None], 0)[0] if row.shape else past[row]

    staleness = jax.tree.broadcast(state.staleness, state.past)
    return Reading(jax.tree.map(at, state.past, staleness), staleness)

  def after(state, params, *, key, active=True):
    del active
    count = state.count + 1
    past = jax.tree.map(lambda kept, x: kept.at[count % rows].set(x), state.past, params)
    leaves, treedef = jax.tree.flatten(state.staleness)
    keys = jax.random.split(jax.random.fold_in(key, _DELAYS), len(leaves))
    drawn = [jnp.minimum(law(k, x.shape), count) for k, x in zip(keys, leaves, strict=True)]
    return Recent(past, treedef.unflatten(drawn), count)

  return Delays(init, read, after)


class Pulled(NamedTuple):
  params: Own  # the model that this owner last received
  version: Own  # int32, the round that made it
  count: Array  # int32, t


def last_pull() -> Delays:
  """Each owner computes with the model that it received at the end of its last round.

  It is as old as that round is long ago: with one worker that serves a population one by one, what
  happens between a server and its clients. One whose round is lost keeps what it had.
  """

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return Pulled(Own(params), Own(zero), zero)

  def read(state):
    params, staleness = state.params.part, state.count - state.version.part
    return Reading(params, jax.tree.broadcast(staleness, params))

  def after(state, params, *, key, active=True):
    del key
    count = state.count + 1
    pulled = lambda new, old: jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)
    model, version = pulled((params, count), (state.params.part, state.version.part))
    return Pulled(Own(model), Own(version), count)

  return Delays(init, read, after, one_by_one=True)
