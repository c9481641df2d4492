"""DES-LOC and Local Adam: workers average their models and their optimizers' moments."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.mean import mean
from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State, Trait
from research.core.method import COMMON_MODEL
from research.core.part import hidden
from research.methods._steps import LocalStepping


class DesLocState(NamedTuple):
  params: Params  # x_t of this worker
  common: Params  # the model at the last average
  inner: State  # state of this worker's optimizer
  exact: dict[str, State]  # states of the moments' means
  link: State  # state of the models' aggregator
  count: Array  # int32, completed rounds


class DesLoc(LocalStepping, name="desloc"):
  """Local SGD with any optimizer; each of the optimizer's moments is averaged at its own period.

      (y^i, s^i) = one step of the inner optimizer of worker i, with moments s_1, s_2, ...
      x^i = c + aggregate_i(weight_i (y^i - c)) =: c            every K_x steps, else x^i = y^i
      s_j^i = 1/W sum_i weight_i s_j^i                          every K_j steps

  A moment averages over many steps and hardly changes in a few, so it needs fewer exchanges than
  the model: the periods should be in proportion to the half-lives log(1/2) / log(b_j). If all
  periods are equal, which is the default, the method is Local Adam. Moments without a period stay
  private, as in `local_sgd`. The number of steps in a round is the greatest common divisor of all
  periods. Moments are averaged exactly, because a compressed second moment might be negative. The
  deployed model is the mean of the workers' models. An absent worker keeps its moments and loses
  its steps of the round.

  Args:
    inner: each worker's optimizer; to clip gradients as in the paper, chain the clipping with it.
    aggregator: combines the workers' model changes.
    period: K_x, the number of steps between averages of the models.
    moments: the periods K_j by the names of the optimizer's moments. The paper recommends
      {"mu": 3 K_x, "nu": 6 K_x} for Adam. None averages all moments every `period` steps.

  Raises:
    ValueError: if a period is below 1, `moments` names a moment that the optimizer does not have,
      or the aggregator is incompatible.

  Reference: Iacob, Sani, Safaryan, Giampouras, Horvath, Jovanovic, Kurmanji, Aleksandrov, Shen,
    Qiu, Lane 2025, arXiv 2505.22549, algorithm 1; for Local Adam, Cheng, Glasgow 2025, arXiv
    2409.13155.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: int = 8
  moments: Mapping[str, int] | None = None
  exact: Aggregator = hidden(mean())

  refuses = COMMON_MODEL | {
    Trait.NOISE: "the moments are not hidden",
    Trait.SECRET: "the moments are not masked",
    Trait.SELECTS: "the moments are not protected from faulty workers",
  }

  def check(self):
    checks.at_least("period", self.period)
    for name, period in (self.moments or {}).items():
      checks.one_of("moment", name, moments_of(self.inner))
      checks.at_least(f"period of {name}", period)

  @property
  def periods(self) -> dict[str, int]:
    """Returns the periods of the moments, in steps, by name."""
    if self.moments is None:
      return dict.fromkeys(moments_of(self.inner), self.period)
    return dict(self.moments)

  @property
  def local_steps(self):
    return math.gcd(self.period, *self.periods.values())

  @property
  def later(self):
    return ()

  def in_rounds(self, steps, participation):
    del steps, participation
    return self

  def init(self, params):
    inner = self.inner.init(params)
    exact = {name: self.exact.init(self.moment(name, inner, params)) for name in self.periods}
    link, zero = self.aggregator.init(params), jnp.zeros((), jnp.int32)
    return DesLocState(params, params, inner, exact, link, zero)

  def sync(self, local, state, *, key, presence=EVERYONE):
    active, count = presence.active, state.count + 1
    keys = jax.random.split(key)

    def average(link):
      change = optax.tree.sub(local.params, state.common)
      value, _, link = self.aggregator.aggregate(change, link, keys[0], presence)
      common = optax.tree.add(state.common, value)
      return common, common, link

    def averaged(name, inner, link):
      own = self.moment(name, inner, state.params)
      value, _, link = self.exact.aggregate(own, link, keys[1], presence)
      leaves, treedef = jax.tree.flatten(inner)
      new = kept(active, value, own)
      return treedef.unflatten([new.get(i, x) for i, x in enumerate(leaves)]), link

    is_due = lambda period: count * self.local_steps % period == 0
    alone = lambda link: (kept(active, local.params, state.params), state.common, link)
    params, common, link = lax.cond(is_due(self.period), average, alone, state.link)
    inner, exact = kept(active, local.inner, state.inner), dict(state.exact)
    for name, period in self.periods.items():
      same = lambda inner, link: (inner, link)
      run = partial(averaged, name)
      inner, exact[name] = lax.cond(is_due(period), run, same, inner, exact[name])
    return DesLocState(params, common, inner, exact, link, count)

  def moment(self, name: str, inner: State, params: Params) -> dict[int, Array]:
    """Returns the arrays of a moment, by their index among the leaves of the optimizer's state.

    Args:
      name: the name of the moment.
      inner: the optimizer's state.
      params: the model.
    """
    leaves = jax.tree.leaves(inner)
    return {i: leaves[i] for i, of in names_of_moments(inner, params).items() if of == name}


desloc = DesLoc


def moments_of(optimizer: optax.GradientTransformation) -> list[str]:
  """Returns the names of an optimizer's moments.

  Args:
    optimizer: an optax transformation.
  """
  params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  names = names_of_moments(jax.eval_shape(optimizer.init, params), params)
  return list(dict.fromkeys(names.values()))


def names_of_moments(inner: State, params: Params) -> dict[int, str]:
  """Finds the moments in an optimizer's state: fields with a floating-point array per parameter.

  Args:
    inner: the optimizer's state.
    params: the model.

  Returns:
    The name of the field, by the index of the array among the leaves of the state.
  """
  of_params = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  found = {}
  for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(inner)):
    ends = [len(path) - len(of) for of in of_params if path[len(path) - len(of) :] == of]
    names = [k.name for k in path[: max(ends, default=0)] if hasattr(k, "name")]
    if names and jnp.issubdtype(x.dtype, jnp.floating):
      found[i] = names[-1]
  return found
