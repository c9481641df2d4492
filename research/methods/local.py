"""Local SGD: every worker takes several optimizer steps alone, then the models are averaged.

What a worker does between two exchanges is the same for all methods with local steps, and stands
here: `begin`, `stepping` and `periods`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.core.base import Aggregator, Params, Served, State, Tree
from research.core.method import Method
from research.optim.projected import projected

# Local steps per round, or a schedule of them: [first round, steps], ... from round 0 on.
Period = int | Sequence[Sequence[int]]


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


def periods(period: Period) -> tuple[int, tuple[tuple[int, int], ...]]:
  """The period that a method begins with, and the later ones with their first rounds.

  Raises:
    ValueError: if a period is < 1, or the schedule does not begin at round 0 and rise.
  """
  stages = [[0, period]] if isinstance(period, int) else [list(stage) for stage in period]
  rounds = [stage[0] for stage in stages]
  if any(len(stage) != 2 for stage in stages) or rounds[:1] != [0] or sorted(set(rounds)) != rounds:
    raise ValueError(f"period={period} is no list of [first round, steps] from round 0 on, rising")
  for _, steps in stages:
    check_steps("period", steps)
  first, *later = ((number, steps) for number, steps in stages)
  return first[1], tuple(later)


def served(
  inner: optax.GradientTransformation, outer: optax.GradientTransformation, aggregator: Aggregator
) -> Served | None:
  """Local steps for a server: what a worker sends is theta - theta_H, an outer gradient."""
  if aggregator.link is None:
    return None
  end = lambda local, params: (minus(params, local.params), local.inner)
  return Served(inner.init, LocalSteps, stepping(inner), end, outer, aggregator.link)


class LocalSGDState(NamedTuple):
  params: Params  # x_t
  inner: State  # of this worker's optimizer
  link: State  # of the aggregator


def local_sgd(
  inner: optax.GradientTransformation, aggregator: Aggregator, *, period: Period = 8
) -> Method:
  """Local SGD (parallel SGD with periodic averaging), with any inner optimizer.

      x_{t,0}^i = x_t,   x_{t,h+1}^i = x_{t,h}^i + inner(grad f_i(x_{t,h}^i))     h in [H]
      x_{t+1} = x_t + aggregate_i(weight_i (x_{t,H}^i - x_t))

  A momentum or second moment of the inner optimizer stays with its worker from round to round and
  is not averaged: one tree is sent per round.

  Args:
    inner: each worker's optimizer.
    aggregator: how the workers' changes of the model become one.
    period: H, local steps per round, or [[first round, H], ...] where it changes.

  Raises:
    ValueError: if period < 1, or a schedule of it does not begin at round 0 and rise.

  Reference: Stich 2019, arXiv 1805.09767, algorithm 1.
  """
  first, later = periods(period)
  refuse("local_sgd", aggregator)

  def init(params):
    return LocalSGDState(params, inner.init(params), aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    change = minus(local.params, state.params)
    value, _, link = aggregator.aggregate(change, state.link, key, presence_of(weight, active))
    own = kept(active, local.inner, state.inner)
    return LocalSGDState(plus(state.params, value), own, link)

  over = lambda wrap: local_sgd(inner, wrap(aggregator), period=period)
  of_rounds = lambda period, _: local_sgd(inner, aggregator, period=period)
  onto = lambda project: local_sgd(projected(inner, project), aggregator, period=period)
  params = lambda state: state.params
  method = Method(init, begin, stepping(inner), sync, params, first, over, of_rounds, later)
  return method._replace(onto=onto, served=served(inner, optax.sgd(1.0), aggregator))
