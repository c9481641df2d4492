"""DiLoCo: local steps, then an outer optimizer step whose gradient is the mean model change."""

from dataclasses import KW_ONLY
from typing import Any, ClassVar, NamedTuple

import optax

from research.aggregate.presence import kept
from research.core.base import EVERYONE, Aggregator, Params, State
from research.core.method import Period
from research.methods._steps import LocalStepping


class DiLoCoState(NamedTuple):
  params: Params  # theta_t
  inner: State  # state of this worker's optimizer
  outer: State  # state of the outer optimizer
  link: State  # state of the aggregator


class OuterStepping(LocalStepping):
  """Base class: the mean change of the workers' local steps is an outer optimizer's gradient."""

  outer: ClassVar[Any]  # an optax transformation

  def init(self, params):
    states = self.inner.init(params), self.outer.init(params), self.aggregator.init(params)
    return DiLoCoState(params, *states)

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    own = kept(presence.active, local.inner, state.inner)
    return optax.tree.sub(state.params, local.params), state._replace(inner=own)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    updates, optimizer = self.outer.update(value, state.outer, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), outer=optimizer)


class DiLoCo(OuterStepping, name="diloco"):
  """Distributed low-communication training (DiLoCo).

      theta_{t,0}^i = theta_t,   theta_{t,h+1}^i = theta_{t,h}^i + inner(grad f_i(theta_{t,h}^i))
      Delta_t = aggregate_i(weight_i (theta_t - theta_{t,H}^i))                  outer gradient
      theta_{t+1} = theta_t + outer(Delta_t)

  The paper's inner optimizer is AdamW, with private moments, and its outer optimizer is
  `sgd(0.7, momentum=0.9, nesterov=True)`. With the outer optimizer `sgd(1.0)`, the method is local
  SGD.

  Args:
    inner: each worker's optimizer.
    outer: the optimizer of the common model; its state is equal on all workers.
    aggregator: combines the workers' outer gradients.
    period: H, number of local steps per round, or a schedule [[first round, H], ...].

  Raises:
    ValueError: if period < 1, the period's schedule does not start at round 0 and increase, or the
      aggregator's value differs between workers.

  Reference: Douillard et al. 2023, arXiv 2311.08105, algorithm 1.
  """

  inner: optax.GradientTransformation
  outer: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 50


diloco = DiLoCo
