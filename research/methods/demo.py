"""DeMo: momenta that stay on their workers, but for the fast part of them that is sent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of, unweighted, weighted
from research.core.base import Aggregator, Array, Params, State, Tree
from research.core.method import Method
from research.methods.decentralized import gradient_at, kept_gradient
from research.methods.local import minus
from research.methods.signum import check_decay, check_rate, moved, rate_at


class DeMoState(NamedTuple):
  params: Params  # theta_t
  momentum: Tree  # m_t of this worker
  link: State  # of the aggregator
  count: Array  # int32, t


def demo(
  learning_rate: float | optax.Schedule, aggregator: Aggregator, *, decay: float = 0.999
) -> Method:
  """Decoupled momentum: each worker sends the largest components of its momentum and drops them.

      m_{t+1/2}^i = beta m_t^i + weight_i grad f_i(theta_t)
      q_t^i = what of m_{t+1/2}^i is sent,   m_{t+1}^i = m_{t+1/2}^i - q_t^i
      theta_{t+1} = theta_t - eta_t sign(1/W sum_i q_t^i),   sign(0) = 0

  Which components those are is the aggregator's: `gather_mean(dct_top_k(64, 8))` sends the largest
  coefficients of a cosine transform of each block. The mean is over all workers, as the paper says;
  the authors' program divides each coefficient by the number of workers that sent it.

  Args:
    learning_rate: eta, constant or a schedule by rounds; what every parameter moves by.
    aggregator: what is sent of the momenta, and their mean.
    decay: beta, in [0, 1).

  Raises:
    ValueError: for arguments out of range, or an aggregator in `composition.REFUSED`.

  Reference: Peng, Quesnelle, Kingma 2024, arXiv 2411.19870, algorithm 1, in its variant with
    signs.
  """
  check_rate(learning_rate)
  check_decay(decay=decay)
  refuse("demo", aggregator)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return DeMoState(params, zeros, aggregator.init(params), jnp.zeros((), jnp.int32))

  def sync(local, state, *, key, weight=1.0, active=True):
    presence = presence_of(weight, active)
    grads = weighted(local.grads, presence)
    momentum = jax.tree.map(lambda m, g: decay * m + g, state.momentum, grads)
    value, sent, link = aggregator.aggregate(momentum, state.link, key, unweighted(presence))
    own = kept(active, minus(momentum, sent), state.momentum)
    signs = jax.tree.map(jnp.sign, value)
    params = moved(state.params, rate_at(learning_rate, state.count), signs)
    return DeMoState(params, own, link, state.count + 1)

  over = lambda wrap: demo(learning_rate, wrap(aggregator), decay=decay)
  return Method(init, gradient_at, kept_gradient, sync, lambda state: state.params, 1, over)
