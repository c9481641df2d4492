"""Post-local SGD: averages at every step at first, then only once in a while."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.core.base import Aggregator, Array, Params, State
from research.core.method import Method
from research.methods.local import begin, check_steps, minus, plus, stepping


class PostLocalState(NamedTuple):
  params: Params  # x_t of this worker
  common: Params  # the model at the last average
  inner: State  # of this worker's optimizer
  link: State  # of the aggregator
  count: Array  # int32, t


def post_local_sgd(
  inner: optax.GradientTransformation, aggregator: Aggregator, *, period: int = 8, switch: int = 100
) -> Method:
  """Local SGD whose period is 1 until step `switch`, and H afterwards.

      y_{t+1}^i = x_t^i + inner(grad f_i(x_t^i))
      x_{t+1}^i = c + aggregate_i(weight_i (y_{t+1}^i - c))    if t+1 <= t' or H divides t+1 - t'
      x_{t+1}^i = y_{t+1}^i                                    otherwise

  where c is the model at the last average. A round is one step. The optimizers' state stays with
  its worker. Between averages the deployed model is the mean of the workers' models.

  Args:
    inner: each worker's optimizer.
    aggregator: how the workers' changes of the model become one.
    period: H, local steps per average after the switch.
    switch: t', steps of synchronous training; 0 is local SGD from the start.

  Raises:
    ValueError: if period < 1 or switch < 0.

  Reference: Lin, Stich, Patel, Jaggi 2020, arXiv 1808.07217 (post-local SGD).
  """
  check_steps("period", period)
  check_steps("switch", switch, at_least=0)
  refuse("post_local_sgd", aggregator)

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return PostLocalState(params, params, inner.init(params), aggregator.init(params), zero)

  def sync(local, state, *, key, weight=1.0, active=True):
    def average(link):
      change = minus(local.params, state.common)
      value, _, link = aggregator.aggregate(change, link, key, presence_of(weight, active))
      common = plus(state.common, value)
      return common, common, link

    count = state.count + 1
    due = (count <= switch) | ((count - switch) % period == 0)
    alone = lambda link: (kept(active, local.params, state.params), state.common, link)
    params, common, link = lax.cond(due, average, alone, state.link)
    return PostLocalState(params, common, kept(active, local.inner, state.inner), link, count)

  over = lambda wrap: post_local_sgd(inner, wrap(aggregator), period=period, switch=switch)
  return Method(init, begin, stepping(inner), sync, lambda state: state.params, 1, over)
