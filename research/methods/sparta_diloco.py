"""SPARTA within DiLoCo: sparse averages after each step, and an outer step once per period."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State, Trait
from research.methods._steps import LocalStepping
from research.methods.diloco import DiLoCo, DiLoCoState
from research.methods.sparta import Sparta, SpartaState


class SpartaDiLoCoState(NamedTuple):
  params: Params  # x_t^i of this worker
  common: Params  # theta, the model after the last outer step
  inner: State  # state of this worker's optimizer
  outer: State  # state of the outer optimizer
  sparse: State  # state of the sparse aggregator
  link: State  # state of the aggregator of outer gradients
  count: Array  # int32, t


class SpartaDiLoCo(LocalStepping, name="sparta_diloco"):
  """DiLoCo whose workers average a small part of their models after each step.

      y_t^i = x_t^i + weight_i inner(grad f_i(x_t^i))
      x_{t+1}^i = y_t^i + sparse_j(y_t^j) - sent_t^i                      H does not divide t + 1
      theta <- theta + outer(aggregate_i(weight_i (theta - y_t^i)))       H divides t + 1
      x_{t+1}^i = theta

  A round is one step. Sparse averages preserve the mean of the models, and therefore the outer
  gradient. In a round with an outer step, a sparse average would change nothing, so none is sent.
  Between outer steps, the deployed model is the mean of the workers' models.

  Args:
    inner: each worker's optimizer.
    outer: the optimizer of the common model.
    sparse: the aggregator that averages a part of the models, the same part on every worker, such
      as `sum_mean(random_k(0.005))` or `shuffled(0.005)`.
    aggregator: combines the workers' outer gradients.
    outer_period: H, the number of steps between outer steps.

  Raises:
    ValueError: if outer_period < 1, or if an aggregator is incompatible.

  Reference: Beton et al. 2025, OpenReview stFPf3gzq1; the combination is that of the authors' code.
  """

  inner: optax.GradientTransformation
  outer: optax.GradientTransformation
  sparse: Aggregator
  aggregator: Aggregator
  _: KW_ONLY
  outer_period: int = 100

  refuses: ClassVar[Mapping[Trait, str]] = DiLoCo.refuses

  def check(self):
    checks.at_least("outer_period", self.outer_period)

  @property
  def _sparta(self) -> Sparta:
    return Sparta(self.inner, self.sparse)

  @property
  def _diloco(self) -> DiLoCo:
    return DiLoCo(self.inner, self.outer, self.aggregator)

  def __post_init__(self):
    super().__post_init__()
    Sparta(self.inner, self.sparse)  # raises for an aggregator that SPARTA rejects

  def init(self, params):
    states = self.inner.init(params), self.outer.init(params)
    links = self.sparse.init(params), self.aggregator.init(params)
    return SpartaDiLoCoState(params, params, *states, *links, jnp.zeros((), jnp.int32))

  def sync(self, local, state, *, key, presence=EVERYONE):
    def averaged(state):
      before = SpartaState(state.params, state.inner, state.sparse)
      after = self._sparta.sync(local, before, key=key, presence=presence)
      return state._replace(params=after.params, inner=after.inner, sparse=after.link)

    def stepped(state):
      before = DiLoCoState(state.common, state.inner, state.outer, state.link)
      after = self._diloco.sync(local, before, key=key, presence=presence)
      own = kept(presence.active, after.params, state.params)
      new = {"common": after.params, "inner": after.inner, "outer": after.outer, "link": after.link}
      return state._replace(params=own, **new)

    count = state.count + 1
    after = lax.cond(count % self.outer_period == 0, stepped, averaged, state)
    return after._replace(count=count)


sparta_diloco = SpartaDiLoCo
