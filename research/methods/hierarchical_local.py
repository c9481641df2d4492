"""Hierarchical local SGD: averages often over fast links and rarely over slow links."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.presence import kept, presence_of
from research.analysis import wire
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregator, Array, Key, Params, State, Tree
from research.methods._steps import LocalStepping

_SLOW, _FAST = WORKER_AXES


class HierarchicalState(NamedTuple):
  params: Params  # x_t of this worker's slice
  common: Params  # the model at the last average over slices
  inner: State  # state of this worker's optimizer
  fast: State  # state of the fast aggregator
  slow: State  # state of the slow aggregator
  count: Array  # int32, completed rounds


class HierarchicalLocalSGD(LocalStepping, name="hierarchical_local_sgd"):
  """Local SGD within slices of workers, and local SGD between slices.

      y_i = x_s after H inner steps of worker i of slice s
      x_s <- x_s + fast_i(weight_i / weight_s (y_i - x_s))       every round
      x_s <- c + slow_s(weight_s (x_s - c)) =: c                 every B-th round

  Here, weight_s is the mean weight in the slice, and c is the model at the last average over
  slices. Optimizer states are private. The deployed model is the mean of the slices' models.

  Args:
    inner: each worker's optimizer.
    fast: the aggregator within a slice, `mean(axis='data')`.
    slow: the aggregator between slices, `mean(axis='slice')`. The models within a slice are equal
      before this exchange, so an aggregator over all workers, such as `hierarchical_mean()`, is
      also valid and sends less over slow links.
    inner_period: H, number of local steps per average within a slice.
    outer_period: B, number of rounds per average between slices.

  Raises:
    ValueError: if a period is below 1; at trace time, if the mesh has no slices or the fast
      aggregator communicates between slices.

  Reference: Lin, Stich, Patel, Jaggi 2020, arXiv 1808.07217 (hierarchical local SGD).
  """

  inner: optax.GradientTransformation
  fast: Aggregator
  slow: Aggregator
  _: KW_ONLY
  inner_period: int = 8
  outer_period: int = 8

  def check(self):
    checks.at_least("inner_period", self.inner_period)
    checks.at_least("outer_period", self.outer_period)

  @property
  def local_steps(self):
    return self.inner_period

  def init(self, params):
    links = self.fast.init(params), self.slow.init(params)
    zero = jnp.zeros((), jnp.int32)
    return HierarchicalState(params, params, self.inner.init(params), *links, zero)

  def sync(self, local, state, *, key, presence=EVERYONE):
    fast_key, slow_key = jax.random.split(key)
    weight, active = presence
    own, of_slice = weight, weight
    if presence is not EVERYONE:
      of_slice = collectives.mean(jnp.where(active, weight, 0.0), _FAST)
      own = weight / jnp.where(of_slice > 0, of_slice, 1)
    change = optax.tree.sub(local.params, state.params)
    _check_fast(self.fast, change, state.fast, fast_key)
    alone = presence_of(own, active)
    value, _, fast_link = self.fast.aggregate(change, state.fast, fast_key, alone)
    params = optax.tree.add(state.params, value)

    def between(link):
      slice_ = presence_of(of_slice, True if active is True else of_slice > 0)
      change = optax.tree.sub(params, state.common)
      value, _, link = self.slow.aggregate(change, link, slow_key, slice_)
      common = optax.tree.add(state.common, value)
      return common, common, link

    count = state.count + 1
    apart = lambda link: (params, state.common, link)
    due = count % self.outer_period == 0
    params, common, slow_link = lax.cond(due, between, apart, state.slow)
    optimizer = kept(active, local.inner, state.inner)
    return HierarchicalState(params, common, optimizer, fast_link, slow_link, count)


hierarchical_local_sgd = HierarchicalLocalSGD


def _check_fast(fast: Aggregator, tree: Tree, state: State, key: Key) -> None:
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  args = jax.tree.map(struct, (tree, state, key))
  axes = {axis: collectives.worker_count(axis) for axis in WORKER_AXES}
  if _SLOW in wire.axes_of(fast.aggregate, *args, axes=axes):
    raise ValueError(f"the fast aggregator also uses '{_SLOW}'; give it axis='{_FAST}'")
