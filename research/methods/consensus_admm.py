"""Consensus ADMM: every worker minimizes its own objective, held to one model by a multiplier."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.core.base import Aggregator, Params, State, Tree
from research.core.method import Method
from research.methods.decentralized import check_rate
from research.methods.local import check_steps, minus, plus


class ConsensusState(NamedTuple):
  params: Params  # z_t
  own: Params  # x_t^i
  dual: Tree  # u_t^i
  link: State


class ConsensusLocal(NamedTuple):
  params: Params  # x^i on its way from x_t^i to x_{t+1}^i


def consensus_admm(
  learning_rate: float, aggregator: Aggregator, *, penalty: float = 1.0, period: int = 10
) -> Method:
  """The alternating direction method of multipliers in its global consensus form.

      x_{t+1}^i = argmin f_i(x) + rho/2 ||x - z_t + u_t^i||^2
      z_{t+1} = P(mean_i weight_i (x_{t+1}^i + u_t^i))
      u_{t+1}^i = u_t^i + x_{t+1}^i - z_{t+1},     u_0 = 0

  The minimization is `period` gradient steps from x_t^i: inexact, and exact in the limit. P is the
  projection onto the task's constraints, or nothing. Sends one tree per round, the change of the
  mean. Whoever drops out of a round leaves z to the others.

  Args:
    learning_rate: of the gradient steps, at most 2 / (L + rho).
    aggregator: how the workers' models and multipliers become one.
    penalty: rho, in the unit of the objective's curvature.
    period: gradient steps per round.

  Raises:
    ValueError: if learning_rate or penalty <= 0, period < 1, or for an aggregator in
      `composition.REFUSED`.

  Reference: Boyd, Parikh, Chu, Peleato, Eckstein, 2011, Distributed optimization and statistical
    learning via the alternating direction method of multipliers, section 7.1.1.
  """
  return _consensus(lambda z: z, learning_rate, aggregator, penalty, period)


def _consensus(
  project: Callable[[Params], Params],
  learning_rate: float,
  aggregator: Aggregator,
  penalty: float,
  period: int,
) -> Method:
  check_rate(learning_rate)
  check_steps("period", period)
  if not penalty > 0:
    raise ValueError(f"penalty={penalty} is not above 0")
  refuse("consensus_admm", aggregator)

  def init(params):
    zeros = jax.tree.map(lambda x: 0 * x, params)
    return ConsensusState(params, params, zeros, aggregator.init(params))

  def step(grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    descend = lambda x, g, z, u: x - learning_rate * (g + penalty * (x - z + u))
    return ConsensusLocal(jax.tree.map(descend, local.params, grads, state.params, state.dual))

  def sync(local, state, *, key, weight=1.0, active=True):
    change = minus(plus(local.params, state.dual), state.params)
    value, _, link = aggregator.aggregate(change, state.link, key, presence_of(weight, active))
    params = project(plus(state.params, value))
    dual = plus(state.dual, minus(local.params, params))
    after = ConsensusState(params, local.params, dual, link)
    return kept(active, after, state._replace(params=params, link=link))

  over = lambda wrap: _consensus(project, learning_rate, wrap(aggregator), penalty, period)
  onto = lambda project: _consensus(project, learning_rate, aggregator, penalty, period)
  begin = lambda state: ConsensusLocal(state.own)
  return Method(init, begin, step, sync, lambda state: state.params, period, over, onto=onto)
