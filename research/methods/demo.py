"""DeMo: workers keep their momenta private and send only the largest components."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate import composition
from research.aggregate.presence import kept, unweighted, weighted
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State, Tree
from research.core.method import COMMON_MODEL
from research.methods._steps import OneGradient, check_rate, decayed, moved, rate_at


class DeMoState(NamedTuple):
  params: Params  # theta_t
  momentum: Tree  # m_t of this worker
  link: State  # state of the aggregator
  count: Array  # int32, t


class DeMo(OneGradient, name="demo"):
  """Decoupled momentum: each worker sends its momentum's largest components and subtracts them.

      m_{t+1/2}^i = beta m_t^i + weight_i grad f_i(theta_t)
      q_t^i = sent part of m_{t+1/2}^i,   m_{t+1}^i = m_{t+1/2}^i - q_t^i
      theta_{t+1} = theta_t - eta_t (sign(1/W sum_i q_t^i) + lambda theta_t),   sign(0) = 0

  The aggregator chooses the components: `gather_mean(dct_top_k(64, 8))` sends the largest cosine
  coefficients of each block. The mean is over all workers, as in the paper; the authors' code
  divides each coefficient by the number of workers that sent it.

  Args:
    learning_rate: eta, a constant or a schedule over rounds; without weight decay, each parameter
      changes by eta or not at all.
    aggregator: selects the components to send, and averages the selected components.
    decay: beta, decay of the momentum, in [0, 1).
    weight_decay: lambda, at least 0; the authors' code has it, the paper's algorithm does not.

  Raises:
    ValueError: if an argument is out of range, or the aggregator is incompatible.

  Reference: Peng, Quesnelle, Kingma 2024, arXiv 2411.19870, algorithm 1, the variant with signs.
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  _: KW_ONLY
  decay: float = 0.999
  weight_decay: float = 0.0

  refuses = COMMON_MODEL | composition.MEMORY | composition.BOUNDED

  def check(self):
    check_rate(self.learning_rate)
    checks.in_range("decay", self.decay, "[0, 1)")
    checks.at_least("weight_decay", self.weight_decay, 0)

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return DeMoState(params, zeros, self.aggregator.init(params), jnp.zeros((), jnp.int32))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    grads = weighted(local.grads, presence)
    momentum = jax.tree.map(lambda m, g: self.decay * m + g, state.momentum, grads)
    own = kept(presence.active, momentum, state.momentum)
    return momentum, state._replace(momentum=own)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del key
    left = optax.tree.sub(state.momentum, sent)
    own = kept(presence.active, left, state.momentum)
    direction = decayed(jax.tree.map(jnp.sign, value), self.weight_decay, state.params)
    params = moved(state.params, rate_at(self.learning_rate, state.count), direction)
    return state._replace(params=params, momentum=own, count=state.count + 1)

  def counted(self, presence):
    return unweighted(presence)


demo = DeMo
