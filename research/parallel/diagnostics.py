"""Diagnostics of a round: what its exchanges miss, and how far the workers' models are apart.

They are computed from what a round has anyway (messages as the others saw them, models before and
after), for the rounds that a row of the metrics falls into. A method knows nothing of them: its
aggregators are wrapped while such a round is exchanged, and its state stays what it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
  Tree,
)
from research.core.method import Local
from research.core.part import hidden
from research.parallel.job import Job

# Squared norms of one worker in one round; see `columns`.
NAMES = ("missed", "asked", "memory", "spread", "update")


class Recorded(NamedTuple):
  """The state of an aggregator, and what this round's exchanges have missed so far."""

  state: State
  missed: Array  # sum of ||tree - sent||^2
  asked: Array  # sum of ||tree||^2


class Recording(Aggregator):
  """An aggregator that notes how much of a worker's message the others did not see."""

  inner: Aggregator
  due: Any = hidden(True)  # a traced bool: whether this round is measured

  def init(self, params: Params) -> Recorded:
    zero = jnp.zeros((), jnp.float32)
    return Recorded(self.inner.init(params), zero, zero)

  def aggregate(
    self, tree: Tree, state: Recorded, key: Key, presence: Presence = EVERYONE
  ) -> Aggregate:
    value, sent, inner = self.inner.aggregate(tree, state.state, key, presence)

    def norms(tree: Tree, sent: Tree) -> tuple[Array, Array]:
      return squared(jax.tree.map(jnp.subtract, tree, sent)), squared(tree)

    missed, asked = _if(self.due, norms, tree, sent)
    if presence.active is not True:
      missed, asked = (jnp.where(presence.active, x, 0) for x in (missed, asked))
    return Aggregate(value, sent, Recorded(inner, state.missed + missed, state.asked + asked))


def squared(tree: Tree) -> Array:
  """The squared norm of a tree's floating-point leaves, summed in float32."""
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  wide = [jnp.ravel(x).astype(jnp.float32) for x in floats]
  return sum((jnp.sum(x * x) for x in wide), jnp.zeros((), jnp.float32))


def recorded(
  job: Job, sync: Any, due: Array, local: Local, state: State, *args: Any
) -> tuple[State, dict[str, Array]]:
  """The exchange of a round, and the squared norms of NAMES of this worker; 0 where not `due`.

  Args:
    job: whose method is resolved.
    sync: `workers.sync`.
    due: a bool, equal on all workers.
    local: of the round's last step.
    state: of its start.
    *args: further arguments of `sync`.
  """
  method = job.method.over(lambda inner: Recording(inner).replace(due=due))
  shapes = jax.eval_shape(method.init, jax.eval_shape(job.method.params, state))
  zero = jnp.zeros((), jnp.float32)
  lift = lambda like, part: Recorded(part, zero, zero) if _is_recorded(like) else part
  lifted = jax.tree.map(lift, shapes, state, is_leaf=_is_recorded)
  after = sync(job._replace(method=method), local, lifted, *args)
  notes = [x for x in jax.tree.leaves(after, is_leaf=_is_recorded) if _is_recorded(x)]
  plain = jax.tree.map(lambda x: x.state if _is_recorded(x) else x, after, is_leaf=_is_recorded)
  apart = lambda a, b: squared(jax.tree.map(jnp.subtract, a, b))

  def norms(memories: list[State], model: Params, after: Params, before: Params) -> dict:
    return {
      "memory": squared(memories),
      "spread": apart(model, collectives.mean(model)),
      "update": apart(after, before),
    }

  models = job.method.params(plain), job.method.params(state)
  found = _if(due, norms, [note.state for note in notes], local.params, *models)
  return plain, found | {
    "missed": sum((note.missed for note in notes), zero),
    "asked": sum((note.asked for note in notes), zero),
  }


def _if(due: Array, measure: Callable[..., Any], *args: Any) -> Any:
  """What is measured in a round that is due, zeros in another; the arrays are not copied."""
  shapes = jax.eval_shape(measure, *args)
  nothing = lambda *args: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return lax.cond(due, measure, nothing, *args)


def due(job: Job, numbers: Array) -> Array:
  """Which steps [K, H] of a dispatch's rounds have a row of the metrics; its last one always."""
  period = job.method.local_steps
  first = job.first_step + (numbers - job.first_round) * period
  steps = first[:, None] + jnp.arange(1, period + 1)
  return (steps % job.diagnostics == 0).at[-1, -1].set(True)


def _is_recorded(x: Any) -> bool:
  return isinstance(x, Recorded)


def columns(means: dict[str, float], gradient: float) -> dict[str, float]:
  """The diagnostics of a round.

  "compression_error" is ||tree - sent||^2 / ||tree||^2 over all exchanges of all workers;
  "memory_norm" is that of what the aggregators keep, "model_spread" that of a worker's model at the
  end of the local phase less the mean of all, "update_norm" that of what the round changed in the
  model, "gradient_norm" that of a worker's mini-batch gradient: root mean squares over the workers.

  Args:
    means: squared norms by NAMES, means over the workers.
    gradient: the squared norm of the last step's gradient, a mean over the workers.
  """
  error = {"compression_error": means["missed"] / means["asked"]} if means["asked"] else {}
  roots = {"memory_norm": "memory", "model_spread": "spread", "update_norm": "update"}
  found = {name: means[of] ** 0.5 for name, of in roots.items()}
  return error | found | {"gradient_norm": gradient**0.5}
