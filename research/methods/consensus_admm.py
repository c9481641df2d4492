"""Consensus ADMM: workers minimize their own objectives; multipliers enforce a common model."""

from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import jax
import optax

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Params, State, Tree
from research.core.method import Method
from research.core.part import hidden


class ConsensusState(NamedTuple):
  params: Params  # z_t
  own: Params  # x_t^i
  dual: Tree  # u_t^i
  link: State


class ConsensusLocal(NamedTuple):
  params: Params  # x^i on its way from x_t^i to x_{t+1}^i


class ConsensusADMM(Method, name="consensus_admm"):
  """Alternating direction method of multipliers in its global consensus form.

      x_{t+1}^i = argmin f_i(x) + rho/2 ||x - z_t + u_t^i||^2
      z_{t+1} = P(mean_i weight_i (x_{t+1}^i + u_t^i))
      u_{t+1}^i = u_t^i + x_{t+1}^i - z_{t+1},     u_0 = 0

  The minimization is approximated by `period` gradient steps from x_t^i; as t grows, the error of
  this approximation vanishes. P projects onto the task's constraint set, if there is one. Each
  round sends one tree, the change of the mean. A worker that drops out of a round does not
  contribute to z.

  Args:
    learning_rate: step size of the gradient steps, at most 2 / (L + rho).
    aggregator: combines the workers' models and multipliers.
    penalty: rho, in units of the objective's curvature.
    period: number of gradient steps per round.

  Raises:
    ValueError: if learning_rate <= 0, penalty <= 0, period < 1, or the aggregator is incompatible.

  Reference: Boyd, Parikh, Chu, Peleato, Eckstein, 2011, Distributed optimization and statistical
    learning via the alternating direction method of multipliers, section 7.1.1.
  """

  learning_rate: float
  aggregator: Aggregator
  _: KW_ONLY
  penalty: float = 1.0
  period: int = 10
  project: Any = hidden(None)  # P, or None

  def check(self):
    checks.above("learning_rate", self.learning_rate)
    checks.above("penalty", self.penalty)

  def init(self, params):
    zeros = jax.tree.map(lambda x: 0 * x, params)
    return ConsensusState(params, params, zeros, self.aggregator.init(params))

  def begin(self, state):
    return ConsensusLocal(state.own)

  def step(self, grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    descend = lambda x, g, z, u: x - self.learning_rate * (g + self.penalty * (x - z + u))
    return ConsensusLocal(jax.tree.map(descend, local.params, grads, state.params, state.dual))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    change = optax.tree.sub(optax.tree.add(local.params, state.dual), state.params)
    return change, state._replace(own=kept(presence.active, local.params, state.own))

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key
    params = optax.tree.add(state.params, value)
    params = self.project(params) if self.project else params
    dual = optax.tree.add(state.dual, optax.tree.sub(state.own, params))
    return state._replace(params=params, dual=kept(presence.active, dual, state.dual))

  def onto(self, project):
    return self.replace(project=project)


consensus_admm = ConsensusADMM
