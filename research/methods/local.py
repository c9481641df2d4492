"""Local SGD: every worker takes several optimizer steps alone, then the models are averaged.

What a worker does between two exchanges is the same for all methods with local steps, and stands
here: `begin`, `stepping` and `weighted`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.base import Aggregator, Array, Method, Params, State, Tree


class LocalSteps(NamedTuple):
  params: Params  # x_{t,h} of this worker
  inner: State  # of its optimizer


def begin(state: Any) -> LocalSteps:
  """The first point of a round: the model and the optimizer that the state holds."""
  return LocalSteps(state.params, state.inner)


def stepping(inner: optax.GradientTransformation) -> Callable[..., LocalSteps]:
  """A method's `step` that takes one step of the inner optimizer."""

  def step(grads, local, state, *, key, grad_fn=None):
    del state, key, grad_fn
    updates, optimizer = inner.update(grads, local.inner, local.params)
    return LocalSteps(optax.apply_updates(local.params, updates), optimizer)

  return step


def weighted(tree: Tree, weight: float | Array, active: bool | Array) -> Tree:
  """A worker's part of what is averaged: weight_i times the tree, zero of an inactive one."""
  share = lambda x: jnp.where(active, (weight * x).astype(x.dtype), 0)
  return jax.tree.map(share, tree)


def minus(a: Tree, b: Tree) -> Tree:
  return jax.tree.map(jnp.subtract, a, b)


def plus(a: Tree, b: Tree) -> Tree:
  return jax.tree.map(jnp.add, a, b)


def check_steps(name: str, value: int, at_least: int = 1) -> None:
  """Refuses a number of steps or rounds that is too small.

  Raises:
    ValueError: with the name, the value and the least legal one.
  """
  if value < at_least:
    raise ValueError(f"{name}={value} is not at least {at_least}")


class LocalSGDState(NamedTuple):
  params: Params  # x_t
  inner: State  # of this worker's optimizer
  link: State  # of the aggregator


def local_sgd(
  inner: optax.GradientTransformation, aggregator: Aggregator, *, period: int = 8
) -> Method:
  """Local SGD (parallel SGD with periodic averaging), with any inner optimizer.

      x_{t,0}^i = x_t,   x_{t,h+1}^i = x_{t,h}^i + inner(grad f_i(x_{t,h}^i))     h in [H]
      x_{t+1} = x_t + aggregate_i(weight_i (x_{t,H}^i - x_t))

  A momentum or second moment of the inner optimizer stays with its worker from round to round and
  is not averaged: one tree is sent per round.

  Args:
    inner: each worker's optimizer.
    aggregator: how the workers' changes of the model become one.
    period: H, local steps per round.

  Raises:
    ValueError: if period < 1.

  Reference: Stich 2019, arXiv 1805.09767, algorithm 1.
  """
  check_steps("period", period)
  refuse("local_sgd", aggregator)

  def init(params):
    return LocalSGDState(params, inner.init(params), aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    change = weighted(minus(local.params, state.params), weight, active)
    value, _, link = aggregator.aggregate(change, state.link, key)
    return LocalSGDState(plus(state.params, value), local.inner, link)

  over = lambda wrap: local_sgd(inner, wrap(aggregator), period=period)
  return Method(init, begin, stepping(inner), sync, lambda state: state.params, period, over)
