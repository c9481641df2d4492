"""Local SGD: every worker takes several optimizer steps alone, then the models are averaged."""

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
  inner: State  # of this worker's optimizer
  link: State  # of the aggregator


class LocalSGD(LocalStepping, name="local_sgd"):
  """Local SGD (parallel SGD with periodic averaging), with any inner optimizer.

      x_{t,0}^i = x_t,   x_{t,h+1}^i = x_{t,h}^i + inner(grad f_i(x_{t,h}^i))     h in [H]
      x_{t+1} = x_t + aggregate_i(weight_i (x_{t,H}^i - x_t))

  A momentum or second moment of the inner optimizer stays with its worker from round to round and
  is not averaged: one tree is sent per round.

  Args:
    inner: each worker's optimizer.
    aggregator: how the workers' changes of the model become one.
    period: H, local steps per round, or [[first round, H], ...] where it changes.

  Raises:
    ValueError: if period < 1, a schedule of it does not begin at round 0 and rise, or for an
      aggregator whose value differs between workers.

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
