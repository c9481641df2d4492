"""Local SGD: every worker takes several local optimizer steps, and then the models are averaged."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import optax

from research.aggregate.presence import kept
from research.core.base import EVERYONE, Aggregator, Params, State
from research.core.method import Period
from research.methods._steps import LocalStepping
from research.optim.projected import projected


class LocalSGDState(NamedTuple):
  params: Params  # x_t
  inner: State  # state of this worker's optimizer
  link: State  # state of the aggregator


class LocalSGD(LocalStepping, name="local_sgd"):
  """Local SGD (parallel SGD with periodic averaging) with any inner optimizer.

      x_{t,0}^i = x_t,   x_{t,h+1}^i = x_{t,h}^i + inner(grad f_i(x_{t,h}^i))     h in [H]
      x_{t+1} = x_t + aggregate_i(weight_i (x_{t,H}^i - x_t))

  The inner optimizer's momentum and second moment are private and persist from round to round.
  Only the model is averaged: each round sends one tree.

  Args:
    inner: each worker's optimizer.
    aggregator: combines the workers' model changes.
    period: H, number of local steps per round, or a schedule [[first round, H], ...].

  Raises:
    ValueError: if period < 1, the period's schedule does not start at round 0 and increase, or the
      aggregator's value differs between workers.

  Reference: Stich 2019, arXiv 1805.09767, algorithm 1.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 8

  def init(self, params):
    return LocalSGDState(params, self.inner.init(params), self.aggregator.init(params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    own = kept(presence.active, local.inner, state.inner)
    return optax.tree.sub(local.params, state.params), state._replace(inner=own)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    return state._replace(params=optax.tree.add(state.params, value))

  def onto(self, project):
    return self.replace(inner=projected(self.inner, project))


local_sgd = LocalSGD
