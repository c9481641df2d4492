"""Elastic averaging: workers explore around a common centre that follows them."""

from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.presence import kept
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State
from research.core.method import Method, Period


class ElasticState(NamedTuple):
  params: Params  # x_t^i of this worker
  centre: Params  # z_t
  inner: State  # state of this worker's optimizer; in EAMSGD its velocity v_t^i
  link: State  # state of the aggregator


class ElasticLocal(NamedTuple):
  params: Params  # the point at which the gradient is computed
  inner: State
  first: Array  # bool, whether the next step is the round's first


class Elastic(Method):
  """Pulls the workers towards the centre and the centre towards the workers, once per round."""

  alpha: ClassVar[float]

  def check(self):
    checks.in_range("alpha", self.alpha, "(0, 1)")

  def pulled(self, params: Params, local: ElasticLocal, state: ElasticState) -> Params:
    """Adds, in a round's first step, the pull towards the centre, evaluated at the round's start.

    Args:
      params: this worker's model after its optimizer step.
      local: the state within the round.
      state: the state at the round's start.

    Returns:
      The model, moved by -alpha (x_t^i - z_t) in the first step.
    """
    pull = lambda y, x, z: y - jnp.where(local.first, self.alpha * (x - z), 0)
    return jax.tree.map(pull, params, state.params, state.centre)

  def model(self, local: ElasticLocal) -> Params:
    """Returns this worker's model at the end of a round."""
    return local.params

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    workers = collectives.worker_count()
    if self.alpha * (1 + workers) >= 2:
      raise ValueError(f"alpha={self.alpha} is not below 2 / (1 + W) with W = {workers} workers")
    own = self.model(local), local.inner
    params, inner = kept(presence.active, own, (state.params, state.inner))
    distance = optax.tree.sub(state.params, state.centre)
    return distance, state._replace(params=params, inner=inner)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    workers = collectives.worker_count()
    move = lambda z, d: z + workers * self.alpha * d
    return state._replace(centre=jax.tree.map(move, state.centre, value))

  def params(self, state):
    return state.centre


class EASGD(Elastic, name="easgd"):
  """Synchronous elastic averaging SGD with any inner optimizer; the centre is deployed.

      x_{t+1}^i = x_t^i + inner(grad f_i(x_t^i)) - [tau | t] alpha (x_t^i - z_t)
      z_{t+1} = z_t + [tau | t] beta aggregate_i(weight_i (x_t^i - z_t)),      beta = W alpha

  The workers' models are never replaced. The exchange at step t uses the models before that step,
  so the exchange may overlap with the full round.

  On a quadratic of curvature h with SGD of step size eta and tau = 1, the mean model and the centre
  converge for 0 < eta h < 2 and 0 < alpha < (4 - 2 eta h) / (2 + W (2 - eta h)). For one worker,
  the bound on alpha is (4 - 2 eta h) / (4 - eta h). Without gradients, the condition is alpha < 2 /
  (1 + W): above this bound, every exchange increases the distance between the centre and the mean.

  Args:
    inner: each worker's optimizer.
    aggregator: combines the workers' distances from the centre.
    period: tau, number of local steps per exchange, or a schedule [[first round, tau], ...].
    alpha: the moving rate of each worker; the paper uses 0.9 / W.

  Raises:
    ValueError: if period or alpha is out of range, or, at trace time, if alpha >= 2 / (1 + W).

  Reference: Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, section 3 and algorithm 1.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 10
  alpha: float = 0.1

  def init(self, params):
    return ElasticState(params, params, self.inner.init(params), self.aggregator.init(params))

  def begin(self, state):
    return ElasticLocal(state.params, state.inner, jnp.ones((), bool))

  def step(self, grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    updates, optimizer = self.inner.update(grads, local.inner, local.params)
    params = self.pulled(optax.apply_updates(local.params, updates), local, state)
    return ElasticLocal(params, optimizer, jnp.zeros((), bool))


easgd = EASGD


class EAMSGD(Elastic, name="eamsgd"):
  """Elastic averaging SGD with Nesterov momentum; the centre is deployed.

      v_{t+1}^i = delta v_t^i - eta grad f_i(x_t^i + delta v_t^i)
      x_{t+1}^i = x_t^i + v_{t+1}^i - [tau | t] alpha (x_t^i - z_t)

  The centre moves as in `easgd`. Between two steps, a worker stores the look-ahead point x + delta
  v, at which it computes its gradient.

  Args:
    learning_rate: eta.
    aggregator: combines the workers' distances from the centre.
    momentum: delta, in [0, 1).
    period: tau, number of local steps per exchange, or a schedule [[first round, tau], ...].
    alpha: the moving rate of each worker; the paper uses 0.9 / W.

  Raises:
    ValueError: if learning_rate <= 0, momentum is outside [0, 1), or `easgd` rejects period or
      alpha.

  Reference: Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, algorithm 2, made synchronous.
  """

  learning_rate: float
  aggregator: Aggregator
  _: KW_ONLY
  momentum: float = 0.99
  period: Period = 10
  alpha: float = 0.1

  def check(self):
    super().check()
    checks.above("learning_rate", self.learning_rate)
    checks.in_range("momentum", self.momentum, "[0, 1)")

  def init(self, params):
    velocity = optax.tree.zeros_like(params)
    return ElasticState(params, params, velocity, self.aggregator.init(params))

  def ahead(self, params: Params, velocity: Params) -> Params:
    """Returns x + delta v, the point at which the gradient is computed."""
    return jax.tree.map(lambda x, v: x + self.momentum * v, params, velocity)

  def model(self, local):
    return jax.tree.map(lambda y, v: y - self.momentum * v, local.params, local.inner)

  def begin(self, state):
    ahead = self.ahead(state.params, state.inner)
    return ElasticLocal(ahead, state.inner, jnp.ones((), bool))

  def step(self, grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    accelerate = lambda v, g: self.momentum * v - self.learning_rate * g
    velocity = jax.tree.map(accelerate, local.inner, grads)
    moved = optax.tree.add(self.model(local), velocity)
    params = self.ahead(self.pulled(moved, local, state), velocity)
    return ElasticLocal(params, velocity, jnp.zeros((), bool))


eamsgd = EAMSGD
