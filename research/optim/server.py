"""Implements adaptive server optimizers for the clients' mean model change.

The optimizers are optax transformations of the pseudo-gradient -Delta_t. Unlike optax's own
optimizers, they start from v_{-1} = tau^2 and have no bias correction:

    m_t = b1 m_{t-1} + (1 - b1) Delta_t,      x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau)

Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core import checks
from research.core.base import Array, Params


class ServerState(NamedTuple):
  momentum: Params  # m_t
  square: Params  # v_t


def adam(learning_rate: float, b1: float, b2: float, tau: float) -> optax.GradientTransformation:
  """Returns Adam with v_t = b2 v_{t-1} + (1 - b2) Delta_t^2.

  Args:
    learning_rate: eta, the step size.
    b1: the decay rate of the mean of model changes, in [0, 1).
    b2: the decay rate of the mean of squared model changes, in [0, 1).
    tau: the degree of adaptivity, above 0, in units of a model change.

  Raises:
    ValueError: if learning_rate or tau is not above 0, or b1 or b2 is outside [0, 1).
  """
  checks.in_range("b2", b2, "[0, 1)")
  return _adaptive(lambda v, square: b2 * v + (1 - b2) * square, learning_rate, b1, tau)


def yogi(learning_rate: float, b1: float, b2: float, tau: float) -> optax.GradientTransformation:
  """Returns Yogi with v_t = v_{t-1} - (1 - b2) Delta_t^2 sign(v_{t-1} - Delta_t^2).

  Args:
    learning_rate: eta, the step size.
    b1: the decay rate of the mean of model changes, in [0, 1).
    b2: the decay rate of the mean of squared model changes, in [0, 1).
    tau: the degree of adaptivity, above 0, in units of a model change.

  Raises:
    ValueError: if learning_rate or tau is not above 0, or b1 or b2 is outside [0, 1).
  """
  checks.in_range("b2", b2, "[0, 1)")
  towards = lambda v, square: v - (1 - b2) * square * jnp.sign(v - square)
  return _adaptive(towards, learning_rate, b1, tau)


def adagrad(learning_rate: float, b1: float, tau: float) -> optax.GradientTransformation:
  """Returns AdaGrad with v_t = v_{t-1} + Delta_t^2.

  Args:
    learning_rate: eta, the step size.
    b1: the decay rate of the mean of model changes, in [0, 1).
    tau: the degree of adaptivity, above 0, in units of a model change.

  Raises:
    ValueError: if learning_rate or tau is not above 0, or b1 is outside [0, 1).
  """
  return _adaptive(lambda v, square: v + square, learning_rate, b1, tau)


def _adaptive(
  rule: Callable[[Array, Array], Array], learning_rate: float, b1: float, tau: float
) -> optax.GradientTransformation:
  """Returns the optimizer with v_t = rule(v_{t-1}, Delta_t^2)."""
  checks.above("learning_rate", learning_rate)
  checks.above("tau", tau)
  checks.in_range("b1", b1, "[0, 1)")

  def init(params):
    square = jax.tree.map(lambda x: jnp.full_like(x, tau**2), params)
    return ServerState(jax.tree.map(jnp.zeros_like, params), square)

  def update(updates, state, params=None):
    del params
    momentum = jax.tree.map(lambda m, g: b1 * m - (1 - b1) * g, state.momentum, updates)
    square = jax.tree.map(lambda v, g: rule(v, g**2), state.square, updates)
    move = lambda m, v: learning_rate * m / (jnp.sqrt(v) + tau)
    return jax.tree.map(move, momentum, square), ServerState(momentum, square)

  return optax.GradientTransformation(init, update)
