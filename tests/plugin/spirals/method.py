"""Local steps of which a part is taken."""

from typing import Any, NamedTuple

import optax

import research as dx


class State(NamedTuple):
  params: Any  # x_t; of a worker in its round x_{t,h}^i
  link: Any  # of the aggregator


@dx.register("method")
class Relaxed(dx.Method, name="relaxed"):
  """x_{t+1} = x_t + relaxation aggregate_i(x_{t,H}^i - x_t), with gradient descent between."""

  learning_rate: float
  aggregator: dx.Aggregator
  period: int = 4
  relaxation: float = 0.5

  def init(self, params):
    return State(params, self.aggregator.init(params))

  def begin(self, state):
    return state

  def step(self, grads, local, state, *, key, grad_fn=None):
    return local._replace(params=optax.tree.add_scale(local.params, -self.learning_rate, grads))

  def message(self, local, state, *, key, presence=dx.EVERYONE):
    return optax.tree.sub(local.params, state.params), state

  def receive(self, value, sent, state, *, key, presence=dx.EVERYONE):
    return state._replace(params=optax.tree.add_scale(state.params, self.relaxation, value))
