"""Computes the diagnostics of a round: compression errors, spread of the models, and other norms.

Diagnostics are computed only in rounds that produce a row of the metrics. The computation uses
values that a round computes anyway: the messages as the other workers received them, and the models
before and after the round. Methods need no code for diagnostics: their aggregators are wrapped
during the exchange, which does not change the structure of the state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.presence import weighted
from research.comm import collectives
from research.core.base import (
  EVERYONE,
  Aggregate,
  Aggregator,
  Array,
  Key,
  Params,
  Presence,
  State,
  Trait,
  Tree,
)
from research.core.method import Local
from research.parallel.job import Job

# Squared norms of one worker in one round; see `columns`.
NAMES = ("missed", "asked", "memory", "spread", "update")
GRADIENT = "squared norm of the gradient"  # one value per step; see `local_phase`


class Recorded(NamedTuple):
  """The state of an aggregator, and the error of this round's exchanges so far."""

  state: State
  missed: Array  # sum of ||tree - sent||^2
  asked: Array  # sum of ||tree||^2


class Recording(Aggregator):
  """An aggregator that records how much of a worker's message the other workers did not receive."""

  inner: Aggregator

  def init(self, params: Params) -> Recorded:
    zero = jnp.zeros((), jnp.float32)
    return Recorded(self.inner.init(params), zero, zero)

  def aggregate(
    self, tree: Tree, state: Recorded, key: Key, presence: Presence = EVERYONE
  ) -> Aggregate:
    value, sent, inner = self.inner.aggregate(tree, state.state, key, presence)
    counted = self.inner.traits & (Trait.SELECTS | Trait.VOTE)  # each worker counts once
    own = tree if counted else weighted(tree, presence)
    missed, asked = squared(jax.tree.map(jnp.subtract, own, sent)), squared(own)
    if presence.active is not True:
      missed, asked = (jnp.where(presence.active, x, 0) for x in (missed, asked))
    return Aggregate(value, sent, Recorded(inner, state.missed + missed, state.asked + asked))


def squared(tree: Tree) -> Array:
  """Returns the squared norm of a tree's floating-point leaves, summed in float32.

  Args:
    tree: arrays.
  """
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  wide = [jnp.ravel(x).astype(jnp.float32) for x in floats]
  return sum((jnp.sum(x * x) for x in wide), jnp.zeros((), jnp.float32))


def recorded(
  job: Job, sync: Any, local: Local, state: State, *args: Any
) -> tuple[State, dict[str, Array]]:
  """Runs the exchange of a round, and measures this worker's squared norms, listed in NAMES.

  Args:
    job: a job with a resolved method.
    sync: `workers.sync`.
    local: the worker's Local after the last step of the round.
    state: the state at the round's start.
    *args: further arguments of `sync`.

  Returns:
    The new state, and the squared norms by name.
  """
  method = job.method.over(Recording)
  shapes = jax.eval_shape(method.init, jax.eval_shape(job.method.params, state))
  zero = jnp.zeros((), jnp.float32)
  lift = lambda like, part: Recorded(part, zero, zero) if _is_recorded(like) else part
  lifted = jax.tree.map(lift, shapes, state, is_leaf=_is_recorded)
  after = sync(job._replace(method=method), local, lifted, *args)
  notes = [x for x in jax.tree.leaves(after, is_leaf=_is_recorded) if _is_recorded(x)]
  plain = jax.tree.map(lambda x: x.state if _is_recorded(x) else x, after, is_leaf=_is_recorded)
  apart = lambda a, b: squared(jax.tree.map(jnp.subtract, a, b))
  return plain, {
    "missed": sum((note.missed for note in notes), zero),
    "asked": sum((note.asked for note in notes), zero),
    "memory": squared([note.state for note in notes]),
    "spread": apart(local.params, collectives.mean(local.params)),
    "update": apart(job.method.params(plain), job.method.params(state)),
  }


def nothing() -> dict[str, Array]:
  """Returns zeros in place of the norms of `recorded`, for rounds without a row."""
  return {name: jnp.zeros((), jnp.float32) for name in NAMES}


def scan(
  one: Callable[..., tuple[Tree, Tree]], held: Tree, rounds: Tree, due: Array
) -> tuple[Tree, Tree]:
  """Scans over the rounds of a dispatch, with diagnostics only in the rounds that are `due`.

  There are two programs, so that rounds without diagnostics have no additional cost.

  Args:
    one: (held, round, measures) -> (held, outputs). `measures` is static, and does not change the
      structure of the results.
    held: the carry of the scan.
    rounds: arrays [K, ...].
    due: bool [K], whether each round has diagnostics; True for the last round.
  """
  count = len(due)
  ends = jnp.nonzero(due, size=count, fill_value=count)[0]
  at = lambda number: jax.tree.map(lambda x: x[number], rounds)
  shapes = jax.eval_shape(partial(one, measures=True), held, at(0))[1]
  empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)

  def step(measures: bool, number: Array, carried: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    held, outputs = carried
    held, found = one(held, at(number), measures=measures)
    return held, jax.tree.map(lambda all_, x: all_.at[number].set(x), outputs, found)

  def until_row(row: Array, carried: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    first = jnp.where(row == 0, 0, ends[row - 1] + 1)
    carried = lax.fori_loop(first, ends[row], partial(step, False), carried)
    return step(True, ends[row], carried)

  return lax.fori_loop(0, jnp.sum(due), until_row, (held, empty))


def due(job: Job, numbers: Array) -> Array:
  """Returns whether each of K rounds produces a row of the metrics; the last round always does.

  Args:
    job: the resolved job.
    numbers: int32 [K], indices of the rounds.
  """
  period, every = job.method.local_steps, job.diagnostics
  first = job.first_step + (numbers - job.first_round) * period
  return ((first + period) // every > first // every).at[-1].set(True)


def _is_recorded(x: Any) -> bool:
  return isinstance(x, Recorded)


def columns(means: dict[str, float], gradient: float) -> dict[str, float]:
  """Converts squared norms to the diagnostics of a round.

  "compression_error" is ||tree - sent||^2 / ||tree||^2 over all exchanges of all workers. The other
  diagnostics are root mean squares over the workers: "memory_norm" is the norm of the aggregators'
  memories, "model_spread" is the norm of a worker's model minus the mean model at the end of the
  local phase, "update_norm" is the norm of the model's change in the round, and "gradient_norm" is
  the norm of a worker's mini-batch gradient.

  Args:
    means: the means over the workers of the squared norms, by name.
    gradient: the mean over the workers of the squared norm of the last step's gradient.
  """
  error = {"compression_error": means["missed"] / means["asked"]} if means["asked"] else {}
  roots = {"memory_norm": "memory", "model_spread": "spread", "update_norm": "update"}
  found = {name: means[of] ** 0.5 for name, of in roots.items()}
  return error | found | {"gradient_norm": gradient**0.5}
