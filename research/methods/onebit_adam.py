"""1-bit Adam: Adam during a warm-up, then compressed momentum with a frozen variance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.core.base import EVERYONE, Array, Params, State, Tree
from research.methods._exact_rounds import FrozenVariance, if_unseen
from research.methods._steps import decayed, mixed, moved, rate_at


class OnebitAdamState(NamedTuple):
  params: Params  # x_t
  momentum: Tree  # m_t
  variance: Tree  # v_t
  exact: State  # state of the mean
  link: State  # state of the aggregator
  count: Array  # int32, t


class OnebitAdam(FrozenVariance, name="onebit_adam"):
  """Adam for T_w rounds, then aggregated momentum preconditioned by the frozen variance.

      t <= T_w:  g_t = 1/W sum_i weight_i grad f_i(x_{t-1})
                 m_t = b1 m_{t-1} + (1 - b1) g_t,   v_t = b2 v_{t-1} + (1 - b2) g_t^2
      t > T_w:   m_t = aggregate_i(weight_i (b1 m_{t-1} + (1 - b1) grad f_i(x_{t-1})))
                 v_t = v_{t-1}
      x_t = x_{t-1} - gamma_t (m_t' / (sqrt(v_t') + eps) + lambda x_{t-1})
      m_t' = m_t / (1 - b1^t),   v_t' = v_t / (1 - b2^min(t, T_w))

  The paper's Adam has no bias correction. Here, the warm-up is `optax.adam` with bias correction,
  and later rounds keep the correction, because without it the step would grow by a factor of (1 -
  b2^T_w)^(-1/2), about 3 for T_w = 100. An element whose v_{T_w} is zero never had a nonzero
  gradient and is not updated, because sign compression cannot represent zero. If all of v_{T_w} is
  zero, the first nonzero round after the warm-up sets the variance.

  Args:
    learning_rate: gamma, a constant or a schedule over rounds.
    aggregator: combines the momenta after the warm-up; the paper's choice is
      `error_feedback(two_phase(sign()))`, with a memory on each worker and a memory on the server.
    warm_up: T_w, number of rounds that average gradients exactly; at least 1.
    b1: decay of the momentum, in [0, 1).
    b2: decay of the variance, in [0, 1).
    eps: number added to the root of the variance, above 0.
    weight_decay: lambda, at least 0; each worker applies it to the common model, so it is not sent.

  Raises:
    ValueError: if an argument is out of range, or the aggregator is incompatible.

  Reference: Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He 2021, arXiv 2102.02888,
    algorithm 1.
  """

  def init(self, params):
    zeros, *others = self.start(params)
    return OnebitAdamState(params, zeros, zeros, *others)

  def sync(self, local, state, *, key, presence=EVERYONE):
    def warming(state):
      grads, _, link = self.exact.aggregate(local.grads, state.exact, key, presence)
      squares = jax.tree.map(jnp.square, grads)
      m, v = mixed(self.b1, state.momentum, grads), mixed(self.b2, state.variance, squares)
      return state._replace(momentum=m, variance=v, exact=link)

    def frozen(state):
      mine = mixed(self.b1, state.momentum, local.grads)
      m, _, link = self.aggregator.aggregate(mine, state.link, key, presence)
      seen = jax.tree.map(lambda m: m / (1 - self.b1), m)  # the mean gradient, if m was zero
      correction = 1 - self.b2 ** jnp.minimum(state.count + 1, self.warm_up)
      v = if_unseen(state.variance, jax.tree.map(lambda g: correction * g**2, seen))
      return state._replace(momentum=m, variance=v, link=link)

    after = lax.cond(state.count < self.warm_up, warming, frozen, state)
    count = state.count + 1
    m = optax.tree.bias_correction(after.momentum, self.b1, count)
    v = optax.tree.bias_correction(after.variance, self.b2, jnp.minimum(count, self.warm_up))
    scaled = lambda m, v: jnp.where(v > 0, m / (jnp.sqrt(v) + self.eps), 0)
    direction = decayed(jax.tree.map(scaled, m, v), self.weight_decay, state.params)
    params = moved(state.params, rate_at(self.learning_rate, state.count), direction)
    return after._replace(params=params, count=count)


onebit_adam = OnebitAdam
