"""Hierarchical local SGD: averages often over fast links, and rarely over slow ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.analysis import wire
from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregator, Array, Key, Params, State, Tree
from research.core.method import Method
from research.methods.local import begin, check_steps, minus, plus, stepping

_SLOW, _FAST = WORKER_AXES


class HierarchicalState(NamedTuple):
  params: Params  # x_t of this worker's slice
  common: Params  # the model at the last average over slices
  inner: State  # of this worker's optimizer
  fast: State  # of the fast aggregator
  slow: State  # of the slow aggregator
  count: Array  # int32, rounds so far


def hierarchical_local_sgd(
  inner: optax.GradientTransformation,
  fast: Aggregator,
  slow: Aggregator,
  *,
  inner_period: int = 8,
  outer_period: int = 8,
) -> Method:
  """Local SGD in slices of workers, and local SGD between the slices.

      y_i = x_s after H inner steps of worker i of slice s
      x_s <- x_s + fast_i(weight_i / weight_s (y_i - x_s))       every round
      x_s <- c + slow_s(weight_s (x_s - c)) =: c                 every B-th round

  where weight_s is the mean weight in the slice, and c the model at the last average over slices.
  The optimizers' state stays with its worker. The deployed model is the mean of the slices'.

  Args:
    inner: each worker's optimizer.
    fast: the aggregator within a slice, `mean(axis='data')`.
    slow: the aggregator between slices, `mean(axis='slice')`; since the workers of a slice agree by
      then, one over all of them such as `hierarchical_mean()` does too, with less on slow links.
    inner_period: H, local steps per average within a slice.
    outer_period: B, rounds per average between slices.

  Raises:
    ValueError: if a period is < 1; when traced on a mesh without slices, or with a fast aggregator
      that talks between slices.

  Reference: Lin, Stich, Patel, Jaggi 2020, arXiv 1808.07217 (hierarchical local SGD).
  """
  check_steps("inner_period", inner_period)
  check_steps("outer_period", outer_period)
  refuse("hierarchical_local_sgd", fast)
  refuse("hierarchical_local_sgd", slow)

  def init(params):
    links = fast.init(params), slow.init(params)
    zero = jnp.zeros((), jnp.int32)
    return HierarchicalState(params, params, inner.init(params), *links, zero)

  def sync(local, state, *, key, weight=1.0, active=True):
    fast_key, slow_key = jax.random.split(key)
    own, of_slice = weight, weight
    if presence_of(weight, active) is not EVERYONE:
      of_slice = collectives.mean(jnp.where(active, weight, 0.0), _FAST)
      own = weight / jnp.where(of_slice > 0, of_slice, 1)
    change = minus(local.params, state.params)
    _check_fast(fast, change, state.fast, fast_key)
    value, _, fast_link = fast.aggregate(change, state.fast, fast_key, presence_of(own, active))
    params = plus(state.params, value)

    def between(link):
      slice_ = presence_of(of_slice, True if active is True else of_slice > 0)
      value, _, link = slow.aggregate(minus(params, state.common), link, slow_key, slice_)
      common = plus(state.common, value)
      return common, common, link

    count = state.count + 1
    apart = lambda link: (params, state.common, link)
    params, common, slow_link = lax.cond(count % outer_period == 0, between, apart, state.slow)
    optimizer = kept(active, local.inner, state.inner)
    return HierarchicalState(params, common, optimizer, fast_link, slow_link, count)

  periods = {"inner_period": inner_period, "outer_period": outer_period}
  over = lambda wrap: hierarchical_local_sgd(inner, wrap(fast), wrap(slow), **periods)
  return Method(init, begin, stepping(inner), sync, lambda state: state.params, inner_period, over)


def _check_fast(fast: Aggregator, tree: Tree, state: State, key: Key) -> None:
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  args = jax.tree.map(struct, (tree, state, key))
  axes = {axis: collectives.worker_count(axis) for axis in WORKER_AXES}
  if _SLOW in wire.axes_of(fast.aggregate, *args, axes=axes):
    raise ValueError(f"the fast aggregator talks over '{_SLOW}' too; give it axis='{_FAST}'")
