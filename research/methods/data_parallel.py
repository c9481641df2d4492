"""Synchronous data parallelism: every worker's gradient is averaged, one optimizer step follows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import presence_of
from research.core.base import Aggregator, Params, Served, State, Tree
from research.core.method import Method
from research.methods.local import Period, periods
from research.optim.projected import projected


class DataParallelState(NamedTuple):
  params: Params  # x_t
  inner: State  # of the optimizer
  link: State  # of the aggregator


class DataParallelLocal(NamedTuple):
  params: Params
  grads: Tree  # mean gradient over the round's mini-batches so far, float32 or wider


def data_parallel(
  inner: optax.GradientTransformation, aggregator: Aggregator, *, period: Period = 1
) -> Method:
  """Distributed mini-batch SGD, with any optax optimizer and any aggregator.

      g_i = (1/H) sum_h grad f_i(x_t; batch_h)
      x_{t+1} = x_t + inner(aggregate_i(weight_i g_i))

  Args:
    inner: the optimizer; clipping after the aggregation is part of its chain.
    aggregator: how the workers' gradients become one.
    period: H, mini-batches per optimizer step (gradient accumulation), or [[first round, H], ...]
      where it changes.

  Raises:
    ValueError: if period < 1, a schedule of it does not begin at round 0 and rise, or for an
      aggregator in `composition.REFUSED`.

  Reference: Dekel, Gilad-Bachrach, Shamir, Xiao 2012, arXiv 1012.1367.
  """
  first, later = periods(period)
  refuse("data_parallel", aggregator)

  def init(params):
    return DataParallelState(params, inner.init(params), aggregator.init(params))

  def begin(state):
    return from_(state.params, ())

  def from_(params, own):
    del own
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    return DataParallelLocal(params, jax.tree.map(wide, params))

  def step(grads, local, state, *, key, grad_fn=None):
    del state, key, grad_fn
    return local._replace(grads=jax.tree.map(lambda a, g: a + g / first, local.grads, grads))

  narrowed = lambda g, x: g.astype(x.dtype)

  def sync(local, state, *, key, weight=1.0, active=True):
    presence = presence_of(weight, active)
    grads = jax.tree.map(narrowed, local.grads, state.params)
    value, _, link = aggregator.aggregate(grads, state.link, key, presence)
    updates, optimizer = inner.update(value, state.inner, state.params)
    return DataParallelState(optax.apply_updates(state.params, updates), optimizer, link)

  over = lambda wrap: data_parallel(inner, wrap(aggregator), period=period)
  of_rounds = lambda period, _: data_parallel(inner, aggregator, period=period)
  onto = lambda project: data_parallel(projected(inner, project), aggregator, period=period)
  end = lambda local, params: (jax.tree.map(narrowed, local.grads, params), ())
  way, params = aggregator.link, lambda state: state.params
  served = way and Served(lambda params: (), from_, step, end, inner, way)
  method = Method(init, begin, step, sync, params, first, over, of_rounds, later)
  return method._replace(onto=onto, served=served)
