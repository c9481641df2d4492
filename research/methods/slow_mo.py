"""SlowMo: local steps, then a slow momentum step of the common model."""

from dataclasses import KW_ONLY
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core import checks
from research.core.base import Aggregator, Array, Params
from research.core.method import Period
from research.methods._steps import Rate, check_rate, rate_at
from research.methods.diloco import OuterStepping


class SlowMomentumState(NamedTuple):
  momentum: Params  # u_t
  count: Array  # int32, t


class SlowMo(OuterStepping, name="slow_mo"):
  """Slow momentum: a momentum step of the common model after every H local steps.

      x_{t,tau} = x_{t,0} + aggregate_i(weight_i (x_{t,tau}^i - x_{t,0}))        tau = H inner steps
      u_{t+1} = beta u_t + (x_{t,0} - x_{t,tau}) / gamma_t
      x_{t+1,0} = x_{t,0} - alpha gamma_t u_{t+1}

  This is DiLoCo with slow momentum as the outer optimizer. The paper has three strategies for the
  inner optimizer's buffers at the end of a round. This method keeps the buffers on each worker;
  wrap the method in `restarted` to reset the buffers. With beta = 0 and alpha = 1, the method is
  local SGD.

  Args:
    inner: each worker's optimizer, the paper's base optimizer.
    aggregator: combines the workers' model changes.
    period: tau, number of local steps per round, or a schedule [[first round, tau], ...].
    learning_rate: gamma, the inner optimizer's learning rate: a constant, which cancels, or a
      schedule over local steps. gamma_t is the mean over the steps of round t; in the paper, gamma
      is constant within a round. A round with gamma_t = 0 adds nothing to the momentum.
    slow_learning_rate: alpha.
    slow_momentum: beta.

  Raises:
    ValueError: if period is out of range, slow_momentum is outside [0, 1), a learning rate is not
      above 0, or both the period and the learning rate have schedules.

  Reference: Wang, Tantia, Ballas, Rabbat 2020, arXiv 1910.00643, algorithm 1.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 8
  learning_rate: float | optax.Schedule = 1.0
  slow_learning_rate: float = 1.0
  slow_momentum: float = 0.7

  def check(self):
    super().check()
    checks.in_range("slow_momentum", self.slow_momentum, "[0, 1)")
    check_rate(self.learning_rate)
    check_rate(self.slow_learning_rate, "slow_learning_rate")
    if callable(self.learning_rate) and not isinstance(self.period, int):
      raise ValueError("a schedule of the learning rate requires a constant period")

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The slow momentum step, as an optimizer of the common model."""

    def init(params):
      return SlowMomentumState(optax.tree.zeros_like(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
      del params
      rate = _mean_rate(self.learning_rate, state.count, self.period)
      moving = rate > 0  # with a rate of zero the local steps changed nothing
      in_rates = lambda change: jnp.where(moving, change / jnp.where(moving, rate, 1), 0)
      accumulate = lambda u, change: (self.slow_momentum * u + in_rates(change)).astype(u.dtype)
      momentum = jax.tree.map(accumulate, state.momentum, updates)
      move = lambda u: (-self.slow_learning_rate * rate * u).astype(u.dtype)
      return jax.tree.map(move, momentum), SlowMomentumState(momentum, state.count + 1)

    return optax.GradientTransformation(init, update)


slow_mo = SlowMo


def _mean_rate(learning_rate: Rate, number: Array, period: Period) -> Array:
  """Returns gamma_t, the mean learning rate over the local steps of a round."""
  if not callable(learning_rate) or not isinstance(period, int):
    return rate_at(learning_rate, number)
  steps = number * period + jnp.arange(period)
  return jnp.mean(jax.vmap(lambda step: rate_at(learning_rate, step))(steps))
