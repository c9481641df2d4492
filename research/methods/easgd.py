"""Elastic averaging: workers explore around a centre, which follows them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.comm import collectives
from research.core.base import Aggregator, Array, Params, State
from research.core.method import Method
from research.methods.local import Period, minus, periods, plus


class ElasticState(NamedTuple):
  params: Params  # x_t^i of this worker
  centre: Params  # z_t
  inner: State  # of this worker's optimizer; in EAMSGD its velocity v_t^i
  link: State  # of the aggregator


class ElasticLocal(NamedTuple):
  params: Params  # where the gradient is taken
  inner: State
  first: Array  # bool, whether the round's first step is still to come


def easgd(
  inner: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  period: Period = 10,
  alpha: float = 0.1,
) -> Method:
  """Synchronous elastic averaging SGD, with any inner optimizer; the centre is deployed.

      x_{t+1}^i = x_t^i + inner(grad f_i(x_t^i)) - [tau | t] alpha (x_t^i - z_t)
      z_{t+1} = z_t + [tau | t] beta aggregate_i(weight_i (x_t^i - z_t)),      beta = W alpha

  The workers' models are never replaced. The exchange at step t uses the models from before it, so
  it may take as long as the round does.

  On a quadratic of curvature h with SGD of step size eta and tau = 1, the mean model and the centre
  converge for 0 < eta h < 2 and 0 < alpha < (4 - 2 eta h) / (2 + W (2 - eta h)), which for one
  worker is (4 - 2 eta h) / (4 - eta h). Without gradients it is alpha < 2 / (1 + W): beyond, an
  exchange carries the centre and the mean further past each other than they were apart.

  Args:
    inner: each worker's optimizer.
    aggregator: how the workers' distances from the centre become one.
    period: tau, local steps per exchange, or [[first round, tau], ...] where it changes.
    alpha: the moving rate, that of each worker; the paper takes 0.9 / W.

  Raises:
    ValueError: if period or alpha is out of its range; when traced, if alpha >= 2 / (1 + W).

  Reference: Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, section 3 and algorithm 1.
  """
  _check(alpha)
  first, later = periods(period)
  refuse("easgd", aggregator)

  def init(params):
    return ElasticState(params, params, inner.init(params), aggregator.init(params))

  def begin(state):
    return ElasticLocal(state.params, state.inner, jnp.ones((), bool))

  def step(grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    updates, optimizer = inner.update(grads, local.inner, local.params)
    moved = optax.apply_updates(local.params, updates)
    return ElasticLocal(_pulled(moved, local, state, alpha), optimizer, jnp.zeros((), bool))

  over = lambda wrap: easgd(inner, wrap(aggregator), period=period, alpha=alpha)
  sync = _exchanging(aggregator, alpha, lambda local: local.params)
  of_rounds = lambda period, _: easgd(inner, aggregator, period=period, alpha=alpha)
  return Method(init, begin, step, sync, lambda state: state.centre, first, over, of_rounds, later)


def eamsgd(
  learning_rate: float,
  aggregator: Aggregator,
  *,
  momentum: float = 0.99,
  period: Period = 10,
  alpha: float = 0.1,
) -> Method:
  """Elastic averaging with Nesterov's momentum; the centre is deployed.

      v_{t+1}^i = delta v_t^i - eta grad f_i(x_t^i + delta v_t^i)
      x_{t+1}^i = x_t^i + v_{t+1}^i - [tau | t] alpha (x_t^i - z_t)

  and the centre as in `easgd`. A worker's model between two steps is the point x + delta v ahead,
  where its gradient is taken.

  Args:
    learning_rate: eta.
    aggregator: how the workers' distances from the centre become one.
    momentum: delta.
    period: tau, local steps per exchange, or [[first round, tau], ...] where it changes.
    alpha: the moving rate, that of each worker; the paper takes 0.9 / W.

  Raises:
    ValueError: if learning_rate <= 0, momentum is outside [0, 1), or as `easgd`.

  Reference: Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, algorithm 2, made synchronous.
  """
  _check(alpha)
  first, later = periods(period)
  if learning_rate <= 0:
    raise ValueError(f"learning_rate={learning_rate} is not above 0")
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum={momentum} is not in [0, 1)")

  ahead = lambda params, v: jax.tree.map(lambda x, v: x + momentum * v, params, v)
  model = lambda local: jax.tree.map(lambda y, v: y - momentum * v, local.params, local.inner)
  refuse("eamsgd", aggregator)

  def init(params):
    velocity = jax.tree.map(jnp.zeros_like, params)
    return ElasticState(params, params, velocity, aggregator.init(params))

  def begin(state):
    return ElasticLocal(ahead(state.params, state.inner), state.inner, jnp.ones((), bool))

  def step(grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    accelerate = lambda v, g: momentum * v - learning_rate * g
    velocity = jax.tree.map(accelerate, local.inner, grads)
    moved = plus(model(local), velocity)
    params = ahead(_pulled(moved, local, state, alpha), velocity)
    return ElasticLocal(params, velocity, jnp.zeros((), bool))

  rates = {"momentum": momentum, "alpha": alpha}
  over = lambda wrap: eamsgd(learning_rate, wrap(aggregator), period=period, **rates)
  of_rounds = lambda period, _: eamsgd(learning_rate, aggregator, period=period, **rates)
  sync = _exchanging(aggregator, alpha, model)
  return Method(init, begin, step, sync, lambda state: state.centre, first, over, of_rounds, later)


def _check(alpha: float) -> None:
  if not 0 < alpha < 1:
    raise ValueError(f"alpha={alpha} is not in (0, 1)")


def _pulled(moved: Params, local: ElasticLocal, state: ElasticState, alpha: float) -> Params:
  """In a round's first step, also towards the centre from where the worker stood before it."""
  pull = lambda y, x, z: y - jnp.where(local.first, alpha * (x - z), 0)
  return jax.tree.map(pull, moved, state.params, state.centre)


def _exchanging(
  aggregator: Aggregator, alpha: float, model: Callable[[ElasticLocal], Params]
) -> Callable[..., ElasticState]:
  """The `sync` that moves the centre towards where the workers were when the round began."""

  def sync(local, state, *, key, weight=1.0, active=True):
    workers = collectives.worker_count()
    if alpha * (1 + workers) >= 2:
      raise ValueError(f"alpha={alpha} is not below 2 / (1 + W) with W = {workers} workers")
    distance = minus(state.params, state.centre)
    value, _, link = aggregator.aggregate(distance, state.link, key, presence_of(weight, active))
    move = lambda z, d: z + workers * alpha * d
    centre = jax.tree.map(move, state.centre, value)
    own = kept(active, (model(local), local.inner), (state.params, state.inner))
    return ElasticState(own[0], centre, own[1], link)

  return sync
