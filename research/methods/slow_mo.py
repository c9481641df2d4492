"""SlowMo: local steps, and a slow momentum of the common model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.core.base import Aggregator, Array, Params
from research.core.method import Method
from research.methods.diloco import diloco
from research.methods.local import Period
from research.methods.signum import rate_at


class SlowMomentumState(NamedTuple):
  momentum: Params  # u_t
  count: Array  # int32, t


def slow_mo(
  inner: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  period: Period = 8,
  learning_rate: float | optax.Schedule = 1.0,
  slow_learning_rate: float = 1.0,
  slow_momentum: float = 0.7,
) -> Method:
  """Slow momentum: a momentum step of the common model after every H local steps.

      x_{t,tau} = x_{t,0} + aggregate_i(weight_i (x_{t,tau}^i - x_{t,0}))        tau = H inner steps
      u_{t+1} = beta u_t + (x_{t,0} - x_{t,tau}) / gamma_t
      x_{t+1,0} = x_{t,0} - alpha gamma_t u_{t+1}

  That is DiLoCo with this momentum as its outer optimizer. Of the paper's three ways with the inner
  optimizer's buffers at the end of a round this one keeps them, each worker its own; `restarted`
  around it resets them. beta = 0 and alpha = 1 is local SGD.

  Args:
    inner: each worker's optimizer, the paper's base optimizer.
    aggregator: how the workers' changes of the model become one.
    period: tau, local steps per round, or [[first round, tau], ...] where it changes.
    learning_rate: gamma, that of the inner optimizer: give its schedule, by local steps, if it has
      one. gamma_t is its mean over the steps of round t, where the paper's is constant in a round;
      a round without any adds nothing to the momentum. A constant one cancels.
    slow_learning_rate: alpha.
    slow_momentum: beta.

  Raises:
    ValueError: if period is out of its range, slow_momentum is outside [0, 1), a learning rate is
      not above 0, or both the period and the learning rate change.

  Reference: Wang, Tantia, Ballas, Rabbat 2020, arXiv 1910.00643, algorithm 1.
  """
  if not 0 <= slow_momentum < 1:
    raise ValueError(f"slow_momentum={slow_momentum} is not in [0, 1)")
  for name, rate in (("learning_rate", learning_rate), ("slow_learning_rate", slow_learning_rate)):
    if not callable(rate) and rate <= 0:
      raise ValueError(f"{name}={rate} is not above 0")
  if callable(learning_rate) and not isinstance(period, int):
    raise ValueError("a schedule of the learning rate goes with one period")
  refuse("slow_mo", aggregator)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return SlowMomentumState(zeros, jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    del params
    rate = _mean_rate(learning_rate, state.count, period)
    moving = rate > 0  # with a rate of zero the local steps changed nothing
    in_rates = lambda change: jnp.where(moving, change / jnp.where(moving, rate, 1), 0)
    accumulate = lambda u, change: (slow_momentum * u + in_rates(change)).astype(u.dtype)
    momentum = jax.tree.map(accumulate, state.momentum, updates)
    move = lambda u: (-slow_learning_rate * rate * u).astype(u.dtype)
    return jax.tree.map(move, momentum), SlowMomentumState(momentum, state.count + 1)

  outer = optax.GradientTransformation(init, update)
  return diloco(inner, outer, aggregator, period=period)


def _mean_rate(learning_rate: float | optax.Schedule, number: Array, period: Period) -> Array:
  """gamma_t, the mean learning rate over the local steps of a round."""
  if not callable(learning_rate) or not isinstance(period, int):
    return rate_at(learning_rate, number)
  steps = number * period + jnp.arange(period)
  return jnp.mean(jax.vmap(lambda step: rate_at(learning_rate, step))(steps))
