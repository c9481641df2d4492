"""Building blocks of methods: local phases, step sizes and moving averages."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core import checks
from research.core.base import Array, Params, State, Tree
from research.core.method import Method

Rate = float | optax.Schedule


class LocalSteps(NamedTuple):
  params: Params  # x_{t,h} of this worker
  inner: State  # state of its optimizer


class LocalStepping(Method):
  """Base class of methods whose workers keep a private inner optimizer from round to round."""

  inner: ClassVar[Any]  # an optax transformation

  def begin(self, state):
    return LocalSteps(state.params, state.inner)

  def step(self, grads, local, state, *, key, grad_fn=None):
    del state, key, grad_fn
    updates, optimizer = self.inner.update(grads, local.inner, local.params)
    return LocalSteps(optax.apply_updates(local.params, updates), optimizer)


class GradientLocal(NamedTuple):
  params: Params
  grads: Tree  # at params


class OneGradient(Method):
  """Base class of methods that compute one gradient per round, at the current model."""

  def begin(self, state):
    return GradientLocal(state.params, optax.tree.zeros_like(state.params))

  def step(self, grads, local, state, *, key, grad_fn=None):
    del state, key, grad_fn
    return local._replace(grads=grads)


def widened_zeros(params: Params) -> Tree:
  """Returns zeros in the shapes of the parameters, in float32 or wider.

  Args:
    params: arrays of any shapes.
  """
  wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
  return jax.tree.map(wide, params)


def check_rate(learning_rate: Rate, name: str = "learning_rate") -> None:
  """Rejects a constant step size that is not above zero.

  Args:
    learning_rate: a constant or a schedule; schedules are not checked.
    name: name of the argument in the error.

  Raises:
    ValueError: if a constant is not above zero; the error gives the argument's name and value.
  """
  if not callable(learning_rate):
    checks.above(name, learning_rate)


def rate_at(learning_rate: Rate, count: Array) -> Array:
  """Returns the step size in a round.

  Args:
    learning_rate: a constant, or a schedule over rounds.
    count: int32 scalar, index of the round.
  """
  return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)


def moved(params: Params, rate: Array, direction: Tree) -> Params:
  """Returns x - rate d, in the dtypes of x.

  Args:
    params: x.
    rate: step size, a scalar.
    direction: d, with the shapes of x.
  """
  return optax.apply_updates(params, jax.tree.map(lambda d: -rate * d, direction))


def decayed(direction: Tree, weight_decay: float, params: Params) -> Tree:
  """Returns d + lambda x: with a step along it, decoupled weight decay.

  Args:
    direction: d, with the shapes of x.
    weight_decay: lambda; with 0, the result is d.
    params: x.
  """
  if not weight_decay:
    return direction
  return jax.tree.map(lambda d, x: d + weight_decay * x, direction, params)


def descended(params: Params, rate: float, direction: Tree) -> Params:
  """Returns x - rate d.

  Args:
    params: x.
    rate: step size.
    direction: d, with the shapes of x.
  """
  return jax.tree.map(lambda x, d: x - rate * d, params, direction)


def mixed(decay: float, average: Tree, new: Tree) -> Tree:
  """Updates a moving average with a new value: decay a + (1 - decay) x.

  Args:
    decay: in [0, 1].
    average: a.
    new: x, with the shapes of a.
  """
  return jax.tree.map(lambda a, x: decay * a + (1 - decay) * x, average, new)
