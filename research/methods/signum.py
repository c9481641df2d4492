"""Signum: signs of a momentum that every worker keeps.

What a method needs of a learning rate that may be a schedule stands here too: `check_rate` and
`rate_at`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.core.base import Aggregator, Array, Params, State, Tree
from research.core.method import Method
from research.methods import decentralized
from research.methods.decentralized import gradient_at, kept_gradient


def check_rate(learning_rate: float | optax.Schedule) -> None:
  """Refuses constant step sizes that are not above zero.

  Raises:
    ValueError: with the value.
  """
  if not callable(learning_rate):
    decentralized.check_rate(learning_rate)


def check_decay(**values: float) -> None:
  """Refuses factors of a moving average that are not in [0, 1).

  Raises:
    ValueError: with the name and the value.
  """
  for name, value in values.items():
    if not 0 <= value < 1:
      raise ValueError(f"{name}={value} is not in [0, 1)")


def rate_at(learning_rate: float | optax.Schedule, count: Array) -> Array:
  """The step size in a round."""
  return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)


def moved(params: Params, rate: Array, direction: Tree) -> Params:
  """x - rate d, in the dtypes of x."""
  return optax.apply_updates(params, jax.tree.map(lambda d: -rate * d, direction))


class SignumState(NamedTuple):
  params: Params  # x_k
  momentum: Tree  # v_k of this worker
  link: State  # of the aggregator
  count: Array  # int32, k


def signum(
  learning_rate: float | optax.Schedule,
  aggregator: Aggregator,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
) -> Method:
  """SignSGD with momentum, by majority vote or any other aggregate of the workers' momenta.

      v_{k+1}^i = beta v_k^i + (1 - beta) grad f_i(x_k)
      x_{k+1} = x_k - eta_k (sign(aggregate_i(weight_i v_{k+1}^i)) + lambda x_k),   sign(0) = +1

  With `majority_vote()` the signs of all workers present count alike. With `mean()` it is Signum of
  the mean gradient.

  Args:
    learning_rate: eta, constant or a schedule by rounds; what every parameter moves by.
    aggregator: how the workers' momenta become one; meant is `majority_vote()`.
    momentum: beta, in [0, 1); 0 is SignSGD.
    weight_decay: lambda, at least 0.

  Raises:
    ValueError: for arguments out of range, or an aggregator in `composition.REFUSED`.

  Reference: Bernstein, Zhao, Azizzadenesheli, Anandkumar 2019, arXiv 1810.05291, algorithm 1;
    Bernstein, Wang, Azizzadenesheli, Anandkumar 2018, arXiv 1802.04434, algorithms 1 and 2.
  """
  check_rate(learning_rate)
  check_decay(momentum=momentum)
  if not weight_decay >= 0:
    raise ValueError(f"weight_decay={weight_decay} is not at least 0")
  refuse("signum", aggregator)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return SignumState(params, zeros, aggregator.init(params), jnp.zeros((), jnp.int32))

  def sync(local, state, *, key, weight=1.0, active=True):
    mix = lambda v, g: momentum * v + (1 - momentum) * g
    mine = kept(active, jax.tree.map(mix, state.momentum, local.grads), state.momentum)
    value, _, link = aggregator.aggregate(mine, state.link, key, presence_of(weight, active))
    signed = lambda d, x: jnp.where(d >= 0, 1, -1).astype(x.dtype) + weight_decay * x
    direction = jax.tree.map(signed, value, state.params)
    params = moved(state.params, rate_at(learning_rate, state.count), direction)
    return SignumState(params, mine, link, state.count + 1)

  over = lambda wrap: signum(
    learning_rate, wrap(aggregator), momentum=momentum, weight_decay=weight_decay
  )
  return Method(init, gradient_at, kept_gradient, sync, lambda state: state.params, 1, over)
