"""Synchronous data parallelism: averages the workers' gradients, then takes one optimizer step."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import optax

from research.core.base import EVERYONE, Aggregator, Params, State, Tree
from research.core.method import Method, Period
from research.methods._steps import widened_zeros
from research.optim.projected import projected


class DataParallelState(NamedTuple):
  params: Params  # x_t
  inner: State  # state of the optimizer
  link: State  # state of the aggregator


class DataParallelLocal(NamedTuple):
  params: Params
  grads: Tree  # running mean of the gradients of the round's mini-batches, float32 or wider


class DataParallel(Method, name="data_parallel"):
  """Distributed mini-batch SGD, with any optax optimizer and any aggregator.

      g_i = (1/H) sum_h grad f_i(x_t; batch_h)
      x_{t+1} = x_t + inner(aggregate_i(weight_i g_i))

  Args:
    inner: the optimizer; to clip after the aggregation, chain the clipping with this optimizer.
    aggregator: combines the workers' gradients.
    period: H, number of mini-batches per optimizer step (gradient accumulation), or a schedule
      [[first round, H], ...].

  Raises:
    ValueError: if period < 1, the period's schedule does not start at round 0 and increase, or the
      aggregator's value differs between workers.

  Reference: Dekel, Gilad-Bachrach, Shamir, Xiao 2012, arXiv 1012.1367.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 1

  def init(self, params):
    return DataParallelState(params, self.inner.init(params), self.aggregator.init(params))

  def begin(self, state):
    return DataParallelLocal(state.params, widened_zeros(state.params))

  def step(self, grads, local, state, *, key, grad_fn=None):
    del state, key, grad_fn
    steps = self.local_steps
    return local._replace(grads=jax.tree.map(lambda a, g: a + g / steps, local.grads, grads))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key, presence
    return jax.tree.map(lambda g, x: g.astype(x.dtype), local.grads, state.params), state

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    updates, optimizer = self.inner.update(value, state.inner, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), inner=optimizer)

  def onto(self, project):
    return self.replace(inner=projected(self.inner, project))


data_parallel = DataParallel
