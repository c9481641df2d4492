"""Decentralized methods that reach the exact optimum with a constant step size.

Each method keeps a model per worker and an estimate of how the workers' objectives differ. Exact
convergence needs full local gradients; with mini-batches, the error equals the error of SGD.
"""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import optax

from research.aggregate.presence import alike, kept, weighted
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Params, State, Trait, Tree
from research.methods._steps import OneGradient, descended
from research.methods.decentralized import AMONG_NEIGHBOURS

_SYMMETRIC = AMONG_NEIGHBOURS | {
  Trait.DIRECTED: "the dual variables need symmetric weights",
  Trait.VARYING: "the dual variables need the same weights in each round",
}


class TrackingState(NamedTuple):
  params: Params  # x_k^i
  mixed: Tree  # sum_j w_ij y_{k-1}^j; y_k^i while an exchange is in flight
  grads: Tree  # weight_i grad f_i(x_{k-1}^i)
  link: State


class GradientTracking(OneGradient, name="gradient_tracking"):
  """Gradient tracking: averages models and estimates of the mean gradient with the neighbours.

      y_k^i = sum_j w_ij y_{k-1}^j + g_k^i - g_{k-1}^i,     g_k^i = weight_i grad f_i(x_k^i)
      x_{k+1}^i = sum_j w_ij x_k^j - alpha y_k^i

  with y_0 = g_0. The mean of y is the mean of g in every round. Each round sends two trees per
  link.

  Args:
    learning_rate: alpha, constant.
    aggregator: averages models and estimates, such as `gossip(one_peer_exponential())`.

  Raises:
    ValueError: if learning_rate <= 0, or the aggregator is incompatible.

  Reference: Nedic, Olshevsky, Shi 2017, arXiv 1607.03218 (DIGing), algorithm 1; Di Lorenzo, Scutari
    2016, arXiv 1602.00591 (NEXT).
  """

  learning_rate: float
  aggregator: Aggregator

  refuses = AMONG_NEIGHBOURS

  def check(self):
    checks.above("learning_rate", self.learning_rate)

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return TrackingState(params, zeros, zeros, self.aggregator.init((params, zeros)))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    grads = weighted(local.grads, presence)
    tracked = optax.tree.add(state.mixed, optax.tree.sub(grads, state.grads))
    own = kept(presence.active, (tracked, grads), (state.mixed, state.grads))
    return (state.params, tracked), state._replace(mixed=own[0], grads=own[1])

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key
    params, mixed = value
    after = descended(params, self.learning_rate, state.mixed), mixed
    params, mixed = kept(presence.active, after, (state.params, state.mixed))
    return state._replace(params=params, mixed=mixed)

  def counted(self, presence):
    return alike(presence.active)


gradient_tracking = GradientTracking


class ExtraState(NamedTuple):
  params: Params  # x_k^i
  correction: Tree  # u_k^i
  grads: Tree  # weight_i grad f_i(x_k^i), of the exchange in flight
  link: State


class Extra(OneGradient, name="extra"):
  """EXTRA: decentralized gradient descent, corrected by half the accumulated disagreement.

      x_{k+1}^i = sum_j w_ij x_k^j - alpha weight_i grad f_i(x_k^i) + u_k^i
      u_{k+1}^i = u_k^i + 1/2 sum_j w_ij (x_k^j - x_k^i),     u_0 = 0

  This is the paper's summed form of

      x_{k+2} = (I + W) x_{k+1} - (I + W)/2 x_k - alpha (g_{k+1} - g_k),   x_1 = W x_0 - alpha g_0

  The summed form does not accumulate rounding errors. Each round sends one tree per link.

  Args:
    learning_rate: alpha, a constant below 2 lambda_min((I + W) / 2) / L.
    aggregator: averages the workers' models, with constant symmetric weights w_ij = w_ji, such as
      `gossip(ring())`.

  Raises:
    ValueError: if learning_rate <= 0, or the aggregator is incompatible.

  Reference: Shi, Ling, Wu, Yin 2015, arXiv 1404.6264, algorithm 1.
  """

  learning_rate: float
  aggregator: Aggregator

  refuses = _SYMMETRIC

  def check(self):
    checks.above("learning_rate", self.learning_rate)

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return ExtraState(params, zeros, zeros, self.aggregator.init(params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    return state.params, state._replace(grads=weighted(local.grads, presence))

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key
    corrected = optax.tree.add(value, state.correction)
    params = descended(corrected, self.learning_rate, state.grads)
    half_way = lambda u, m, x: u + (m - x) / 2
    correction = jax.tree.map(half_way, state.correction, value, state.params)
    own = (params, correction), (state.params, state.correction)
    params, correction = kept(presence.active, *own)
    return ExtraState(params, correction, optax.tree.zeros_like(params), state.link)

  def counted(self, presence):
    return alike(presence.active)


extra = Extra


class ADMMState(NamedTuple):
  params: Params  # x_k^i
  apart: Tree  # c sum_j w_ij (x_k^i - x_k^j)
  dual: Tree  # phi_k^i
  link: State


class ADMM(OneGradient, name="admm"):
  """Decentralized linearized ADMM: multipliers on the links enforce consensus among neighbours.

      x_{k+1}^i = x_k^i - eta (weight_i grad f_i(x_k^i) + phi_k^i + c sum_j w_ij (x_k^i - x_k^j))
      phi_{k+1}^i = phi_k^i + c sum_j w_ij (x_{k+1}^i - x_{k+1}^j),     phi_0 = 0

  This is the linearized variant: one gradient step with a proximal term of strength
  rho = 1/eta - 2c replaces each worker's exact minimization. The penalty of a link is c w_ij; in
  the paper, the penalty is c. Each round sends one tree per link.

  Args:
    learning_rate: eta, constant, at most 1 / (2c).
    aggregator: averages the workers' models, with constant symmetric weights w_ij = w_ji, such as
      `gossip(ring())`.
    penalty: c, the penalty on disagreement, in units of the objective's curvature.

  Raises:
    ValueError: if learning_rate <= 0, penalty <= 0, rho < 0, or the aggregator is incompatible.

  Reference: Ling, Shi, Wu, Ribeiro 2015, IEEE Trans. Signal Processing 63(15) (DLM); with exact
    minimization: Shi, Ling, Yuan, Wu, Yin 2014, arXiv 1307.5561.
  """

  learning_rate: float
  aggregator: Aggregator
  _: KW_ONLY
  penalty: float = 1.0

  refuses = _SYMMETRIC

  def check(self):
    rate, penalty = self.learning_rate, self.penalty
    checks.above("learning_rate", rate)
    checks.above("penalty", penalty)
    if 2 * penalty * rate > 1:
      raise ValueError(f"learning_rate={rate} is above 1/(2 penalty) = {0.5 / penalty:.6g}")

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return ADMMState(params, zeros, zeros, self.aggregator.init(params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    grads = weighted(local.grads, presence)
    pull = optax.tree.add(grads, optax.tree.add(state.dual, state.apart))
    params = descended(state.params, self.learning_rate, pull)
    return params, state._replace(params=kept(presence.active, params, state.params))

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key
    apart = jax.tree.map(lambda x, m: self.penalty * (x - m), state.params, value)
    own = apart, optax.tree.add(state.dual, apart)
    apart, dual = kept(presence.active, own, (state.apart, state.dual))
    return state._replace(apart=apart, dual=dual)

  def counted(self, presence):
    return alike(presence.active)


admm = ADMM
