"""Decentralized methods that reach the exact optimum with a constant step size.

All of them learn, besides a model per worker, how the workers' objectives differ. They move with
the whole gradient of each worker; with mini-batches they stay around the optimum as SGD does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.composition import refuse
from research.aggregate.presence import alike, kept, presence_of, weighted
from research.core.base import Aggregator, Params, State, Tree
from research.core.method import Method
from research.methods.decentralized import check_rate, descended, gradient_at, kept_gradient
from research.methods.local import minus, plus


class TrackingState(NamedTuple):
  params: Params  # x_k^i
  mixed: Tree  # sum_j w_ij y_{k-1}^j
  grads: Tree  # weight_i grad f_i(x_{k-1}^i)
  link: State


def gradient_tracking(learning_rate: float, aggregator: Aggregator) -> Method:
  """Every worker also keeps an estimate of the mean gradient, which it averages with neighbours.

      y_k^i = sum_j w_ij y_{k-1}^j + g_k^i - g_{k-1}^i,     g_k^i = weight_i grad f_i(x_k^i)
      x_{k+1}^i = sum_j w_ij x_k^j - alpha y_k^i

  with y_0 = g_0. The mean of y is the mean of g in every round. Sends two trees per link.

  Args:
    learning_rate: alpha, constant.
    aggregator: how models and estimates are averaged, such as `gossip(one_peer_exponential())`.

  Raises:
    ValueError: if learning_rate <= 0, or for an aggregator in `composition.REFUSED`.

  Reference: Nedic, Olshevsky, Shi 2017, arXiv 1607.03218 (DIGing), algorithm 1; Di Lorenzo, Scutari
    2016, arXiv 1602.00591 (NEXT).
  """
  check_rate(learning_rate)
  refuse("gradient_tracking", aggregator)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return TrackingState(params, zeros, zeros, aggregator.init((params, zeros)))

  def sync(local, state, *, key, weight=1.0, active=True):
    grads = weighted(local.grads, presence_of(weight, active))
    tracked = plus(state.mixed, minus(grads, state.grads))
    pair = state.params, tracked
    (params, mixed), _, link = aggregator.aggregate(pair, state.link, key, alike(active))
    after = TrackingState(descended(params, learning_rate, tracked), mixed, grads, link)
    return kept(active, after, state._replace(link=link))

  over = lambda wrap: gradient_tracking(learning_rate, wrap(aggregator))
  return Method(init, gradient_at, kept_gradient, sync, lambda state: state.params, 1, over)


class ExtraState(NamedTuple):
  params: Params  # x_k^i
  correction: Tree  # u_k^i
  link: State


def extra(learning_rate: float, aggregator: Aggregator) -> Method:
  """EXTRA: decentralized gradient descent, corrected by half of how far apart the models were.

      x_{k+1}^i = sum_j w_ij x_k^j - alpha weight_i grad f_i(x_k^i) + u_k^i
      u_{k+1}^i = u_k^i + 1/2 sum_j w_ij (x_k^j - x_k^i),     u_0 = 0

  which is the paper's own summed form of

      x_{k+2} = (I + W) x_{k+1} - (I + W)/2 x_k - alpha (g_{k+1} - g_k),   x_1 = W x_0 - alpha g_0

  and, other than that, does not add up roundings. Sends one tree per link.

  Args:
    learning_rate: alpha, constant; below 2 lambda_min((I + W) / 2) / L.
    aggregator: how the workers' models are averaged, with weights w_ij = w_ji that stay the same,
      such as `gossip(ring())`.

  Raises:
    ValueError: if learning_rate <= 0, or for an aggregator in `composition.REFUSED`.

  Reference: Shi, Ling, Wu, Yin 2015, arXiv 1404.6264, algorithm 1.
  """
  check_rate(learning_rate)
  refuse("extra", aggregator)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return ExtraState(params, zeros, aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    grads = weighted(local.grads, presence_of(weight, active))
    mixed, _, link = aggregator.aggregate(state.params, state.link, key, alike(active))
    params = descended(plus(mixed, state.correction), learning_rate, grads)
    half_way = lambda u, m, x: u + (m - x) / 2
    correction = jax.tree.map(half_way, state.correction, mixed, state.params)
    return kept(active, ExtraState(params, correction, link), state._replace(link=link))

  over = lambda wrap: extra(learning_rate, wrap(aggregator))
  return Method(init, gradient_at, kept_gradient, sync, lambda state: state.params, 1, over)


class ADMMState(NamedTuple):
  params: Params  # x_k^i
  apart: Tree  # c sum_j w_ij (x_k^i - x_k^j)
  dual: Tree  # phi_k^i
  link: State


def admm(learning_rate: float, aggregator: Aggregator, *, penalty: float = 1.0) -> Method:
  """Decentralized linearized ADMM: neighbours are held together by multipliers on their links.

      x_{k+1}^i = x_k^i - eta (weight_i grad f_i(x_k^i) + phi_k^i + c sum_j w_ij (x_k^i - x_k^j))
      phi_{k+1}^i = phi_k^i + c sum_j w_ij (x_{k+1}^i - x_{k+1}^j),     phi_0 = 0

  Each worker's minimization is replaced by one gradient step with a proximal term of strength
  rho = 1/eta - 2c: the linearized variant, not the exact one. Each link is penalized by its weight,
  c w_ij, where the paper's have c. Sends one tree per link.

  Args:
    learning_rate: eta, constant, at most 1 / (2c).
    aggregator: how the workers' models are averaged, with weights w_ij = w_ji that stay the same,
      such as `gossip(ring())`.
    penalty: c, of a disagreement; in the unit of the objective's curvature.

  Raises:
    ValueError: if learning_rate or penalty <= 0, rho < 0, or for an aggregator in
      `composition.REFUSED`.

  Reference: Ling, Shi, Wu, Ribeiro 2015, IEEE Trans. Signal Processing 63(15) (DLM); the exact
    one: Shi, Ling, Yuan, Wu, Yin 2014, arXiv 1307.5561.
  """
  check_rate(learning_rate)
  if not penalty > 0:
    raise ValueError(f"penalty={penalty} is not above 0")
  if 2 * penalty * learning_rate > 1:
    raise ValueError(f"learning_rate={learning_rate} is above 1/(2 penalty) = {0.5 / penalty:.6g}")
  refuse("admm", aggregator)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return ADMMState(params, zeros, zeros, aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    grads = weighted(local.grads, presence_of(weight, active))
    pull = plus(grads, plus(state.dual, state.apart))
    params = descended(state.params, learning_rate, pull)
    mixed, _, link = aggregator.aggregate(params, state.link, key, alike(active))
    apart = jax.tree.map(lambda x, m: penalty * (x - m), params, mixed)
    after = ADMMState(params, apart, plus(state.dual, apart), link)
    return kept(active, after, state._replace(link=link))

  over = lambda wrap: admm(learning_rate, wrap(aggregator), penalty=penalty)
  return Method(init, gradient_at, kept_gradient, sync, lambda state: state.params, 1, over)
