"""DiLoCo: local steps, and an outer optimizer that takes the mean change for a gradient."""

from typing import NamedTuple

import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.core.base import Aggregator, Params, State
from research.core.method import Method
from research.methods.local import Period, begin, minus, periods, served, stepping


class DiLoCoState(NamedTuple):
  params: Params  # theta_t
  inner: State  # of this worker's optimizer
  outer: State  # of the outer optimizer
  link: State  # of the aggregator


def diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  period: Period = 50,
) -> Method:
  """Distributed low-communication training.

      theta_{t,0}^i = theta_t,   theta_{t,h+1}^i = theta_{t,h}^i + inner(grad f_i(theta_{t,h}^i))
      Delta_t = aggregate_i(weight_i (theta_t - theta_{t,H}^i))                  outer gradient
      theta_{t+1} = theta_t + outer(Delta_t)

  The paper's inner optimizer is AdamW, whose moments stay with their worker, and its outer one
  `sgd(0.7, momentum=0.9, nesterov=True)`. Plain outer `sgd(1.0)` is local SGD.

  Args:
    inner: each worker's optimizer.
    outer: the optimizer of the common model, the same on all workers.
    aggregator: how the workers' outer gradients become one.
    period: H, local steps per round, or [[first round, H], ...] where it changes.

  Raises:
    ValueError: if period < 1, or a schedule of it does not begin at round 0 and rise.

  Reference: Douillard et al. 2023, arXiv 2311.08105, algorithm 1.
  """
  first, later = periods(period)
  refuse("diloco", aggregator)

  def init(params):
    return DiLoCoState(params, inner.init(params), outer.init(params), aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    gradient = minus(state.params, local.params)
    value, _, link = aggregator.aggregate(gradient, state.link, key, presence_of(weight, active))
    updates, optimizer = outer.update(value, state.outer, state.params)
    own = kept(active, local.inner, state.inner)
    return DiLoCoState(optax.apply_updates(state.params, updates), own, optimizer, link)

  over = lambda wrap: diloco(inner, outer, wrap(aggregator), period=period)
  of_rounds = lambda period, _: diloco(inner, outer, aggregator, period=period)
  params = lambda state: state.params
  step, way = stepping(inner), served(inner, outer, aggregator)
  return Method(init, begin, step, sync, params, first, over, of_rounds, later, served=way)
