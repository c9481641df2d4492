"""Signum: steps along the sign of the workers' momenta."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State, Tree
from research.methods._steps import OneGradient, check_rate, mixed, moved, rate_at


class SignumState(NamedTuple):
  params: Params  # x_k
  momentum: Tree  # v_k of this worker
  link: State  # state of the aggregator
  count: Array  # int32, k


class Signum(OneGradient, name="signum"):
  """SignSGD with momentum, by majority vote or any other aggregate of the workers' momenta.

      v_{k+1}^i = beta v_k^i + (1 - beta) grad f_i(x_k)
      x_{k+1} = x_k - eta_k (sign(aggregate_i(weight_i v_{k+1}^i)) + lambda x_k),   sign(0) = +1

  With `majority_vote()`, the signs of all active workers count equally. With `mean()`, the method
  is Signum on the mean gradient.

  Args:
    learning_rate: eta, a constant or a schedule over rounds; without weight decay, each parameter
      changes by eta.
    aggregator: combines the workers' momenta; the paper's choice is `majority_vote()`.
    momentum: beta, in [0, 1); 0 gives SignSGD.
    weight_decay: lambda, at least 0.

  Raises:
    ValueError: if an argument is out of range, or the aggregator is incompatible.

  Reference: Bernstein, Zhao, Azizzadenesheli, Anandkumar 2019, arXiv 1810.05291, algorithm 1;
    Bernstein, Wang, Azizzadenesheli, Anandkumar 2018, arXiv 1802.04434, algorithms 1 and 2.
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  _: KW_ONLY
  momentum: float = 0.9
  weight_decay: float = 0.0

  def check(self):
    check_rate(self.learning_rate)
    checks.in_range("momentum", self.momentum, "[0, 1)")
    checks.at_least("weight_decay", self.weight_decay, 0)

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return SignumState(params, zeros, self.aggregator.init(params), jnp.zeros((), jnp.int32))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    mine = mixed(self.momentum, state.momentum, local.grads)
    mine = kept(presence.active, mine, state.momentum)
    return mine, state._replace(momentum=mine)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    signed = lambda d, x: jnp.where(d >= 0, 1, -1).astype(x.dtype) + self.weight_decay * x
    direction = jax.tree.map(signed, value, state.params)
    params = moved(state.params, rate_at(self.learning_rate, state.count), direction)
    return state._replace(params=params, count=state.count + 1)


signum = Signum
