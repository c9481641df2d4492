"""0/1 Adam: updates the variance rarely, and takes local steps between compressed exchanges."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Array, Params, State, Tree
from research.methods._exact_rounds import FrozenVariance, if_unseen
from research.methods._steps import GradientLocal, mixed, rate_at


class ZeroOneAdamState(NamedTuple):
  params: Params  # z_t, the model after the last synchronisation, decayed since
  momentum: Tree  # m_t of this worker
  buffer: Tree  # u_t of this worker
  rates: Array  # float32, r_t: sum of the decayed gamma_h since the last synchronisation
  variance: Tree  # v_t
  exact: State  # state of the mean
  link: State  # state of the aggregator
  count: Array  # int32, t


class ZeroOneAdam(FrozenVariance, name="zero_one_adam"):
  """Adam with local steps and compressed exchanges; the update is linear in the sent values.

      m_{t+1/2}^i = b1 m_t^i + (1 - b1) grad f_i(x_t^i)
      u_{t+1/2}^i = (1 - gamma_t lambda) u_t^i + gamma_t m_{t+1/2}^i
      r_{t+1/2} = (1 - gamma_t lambda) r_t + gamma_t,   z_{t+1/2} = (1 - gamma_t lambda) z_t
      v_{t+1} = b2 v_t + (1 - b2) (1/W sum_i weight_i grad f_i(x_t^i))^2    if t in T_v, else v_t
      t in T_u:   U = aggregate_i(weight_i u_{t+1/2}^i),   m_{t+1}^i = U / r_{t+1/2}
                  x_{t+1}^i = z_{t+1} = z_{t+1/2} - U / sqrt(v_{t+1} + eps),   u = r = 0
      otherwise:  x_{t+1}^i = z_{t+1/2} - u_{t+1/2}^i / sqrt(v_{t+1} + eps),   the rest from t + 1/2

  The paper has no weight decay lambda. With lambda = 0, z is the model after the last exchange and
  r is the sum of the step sizes since then. With lambda > 0, every worker takes AdamW's local steps
  x <- (1 - gamma lambda) x - gamma m / sqrt(v + eps): the decay of z is the same on all workers and
  is not sent, and u and r decay alike, so U / r remains a weighted mean of momenta.

  There is no bias correction, as in the paper. Unlike in the paper, the step of a round in T_v uses
  the updated variance: with v_0 = 0, the first step would otherwise be 1 / sqrt(eps) times too
  long. An element whose v is zero never had a nonzero gradient and is not updated, because sign
  compression cannot represent zero. If all of v is zero, the first nonzero exchange sets v.

  T_v is a subset of the first `warm_up` rounds; the interval after its j-th round is 2^floor(j /
  kappa). T_u contains all warm-up rounds. After the warm-up, the interval of T_u starts at 1 and
  doubles every `double_every` rounds; the variance is frozen, so x^i is a function of u^i and is
  not stored.

  Args:
    learning_rate: gamma, a constant or a schedule over rounds.
    aggregator: combines u; the paper's 1-bit AllReduce is `error_feedback(two_phase(sign()))`.
    warm_up: the number of rounds after which the variance is frozen and steps may be local; at
      least 1.
    variance_scale: kappa, the number of rounds in T_v before their interval doubles, at least 1.
    double_every: number of rounds between doublings of the interval of T_u; in the paper, the
      number of rounds in which the learning rate halves.
    longest: maximum interval of T_u, a power of two.
    b1: decay of the momentum, in [0, 1).
    b2: decay of the variance, in [0, 1).
    eps: number added to the variance under the root, above 0.
    weight_decay: lambda, at least 0.

  Raises:
    ValueError: if an argument is out of range, or the aggregator is incompatible.

  Reference: Lu, Li, Zhang, De Sa, He 2022, arXiv 2202.06009, algorithm 1 and its policies.
  """

  _: KW_ONLY
  variance_scale: int = 16
  double_every: int = 1000
  longest: int = 16

  def check(self):
    super().check()
    checks.at_least("variance_scale", self.variance_scale)
    checks.at_least("double_every", self.double_every)
    if self.longest < 1 or self.longest & (self.longest - 1):
      raise ValueError(f"longest={self.longest} is not a power of two")

  def init(self, params):
    zeros, *others = self.start(params)
    return ZeroOneAdamState(params, zeros, zeros, jnp.zeros(()), zeros, *others)

  def params(self, state):
    return self.descended(state, state.buffer)

  def descended(self, state: ZeroOneAdamState, buffer: Tree) -> Params:
    """Returns z - u / sqrt(v + eps); elements with v = 0 do not move away from z.

    Args:
      state: the state that contains z and v.
      buffer: the buffer u.
    """
    step = lambda x, u, v: x - jnp.where(v > 0, u / jnp.sqrt(v + self.eps), 0)
    return jax.tree.map(step, state.params, buffer, state.variance)

  def begin(self, state):
    return GradientLocal(self.params(state), optax.tree.zeros_like(state.params))

  def refreshes(self, t: Array) -> Array:
    """Returns whether t is in T_v: kappa rounds at interval 1, kappa at 2, kappa at 4, ..."""
    stage = 31 - lax.clz(t // self.variance_scale + 1)
    since = t - self.variance_scale * ((1 << stage) - 1)
    return (t < self.warm_up) & (since % (1 << stage) == 0)

  def synchronises(self, t: Array) -> Array:
    """Returns whether t is in T_u."""
    local = jnp.maximum(t - self.warm_up, 0)
    doublings = jnp.minimum(local // self.double_every, self.longest.bit_length() - 1)
    return (t - self.warm_up + 1) % (1 << doublings) == 0

  def sync(self, local, state, *, key, presence=EVERYONE):
    active = presence.active

    def refreshed(state):
      grads, _, link = self.exact.aggregate(local.grads, state.exact, key, presence)
      squares = jax.tree.map(jnp.square, grads)
      return state._replace(variance=mixed(self.b2, state.variance, squares), exact=link)

    def synchronised(state):
      total, _, link = self.aggregator.aggregate(state.buffer, state.link, key, presence)
      moving = state.rates > 0  # False while a schedule is still at zero: nothing was sent
      rates = jnp.where(moving, state.rates, 1)
      approximate = lambda u, m: jnp.where(moving, u / rates, m).astype(m.dtype)
      m = jax.tree.map(approximate, total, state.momentum)
      seen = lambda u: jnp.where(moving, u / (rates * (1 - self.b1)), 0) ** 2
      state = state._replace(variance=if_unseen(state.variance, jax.tree.map(seen, total)))
      x, u, rates = self.descended(state, total), optax.tree.zeros_like(total), 0 * rates
      m, u = kept(active, (m, u), (state.momentum, state.buffer))
      return state._replace(params=x, momentum=m, buffer=u, rates=rates, link=link)

    rate = rate_at(self.learning_rate, state.count)
    m = mixed(self.b1, state.momentum, local.grads)
    keep = 1 - rate * self.weight_decay
    decayed = lambda tree: jax.tree.map(lambda x: (keep * x).astype(x.dtype), tree)
    moves = jax.tree.map(lambda m: (rate * m).astype(m.dtype), m)
    u = optax.tree.add(decayed(state.buffer), moves)
    m, u = kept(active, (m, u), (state.momentum, state.buffer))
    same = lambda state: state
    after = lax.cond(self.refreshes(state.count), refreshed, same, state)
    z, r = decayed(state.params), keep * state.rates + rate
    after = after._replace(params=z, momentum=m, buffer=u, rates=r)
    after = lax.cond(self.synchronises(state.count), synchronised, same, after)
    return after._replace(count=state.count + 1)


zero_one_adam = ZeroOneAdam
