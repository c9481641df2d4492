"""Post-local SGD: averages at every step until a switch, then once per period."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State
from research.methods._steps import LocalStepping


class PostLocalState(NamedTuple):
  params: Params  # x_t of this worker
  common: Params  # the model at the last average
  inner: State  # state of this worker's optimizer
  link: State  # state of the aggregator
  count: Array  # int32, t


class PostLocalSGD(LocalStepping, name="post_local_sgd"):
  """Local SGD whose period is 1 until step `switch`, and H afterwards.

      y_{t+1}^i = x_t^i + inner(grad f_i(x_t^i))
      x_{t+1}^i = c + aggregate_i(weight_i (y_{t+1}^i - c))    if t+1 <= t' or H divides t+1 - t'
      x_{t+1}^i = y_{t+1}^i                                    otherwise

  Here, c is the model at the last average. A round is one step. Optimizer states are private.
  Between averages the deployed model is the mean of the workers' models.

  Args:
    inner: each worker's optimizer.
    aggregator: combines the workers' model changes.
    period: H, number of local steps per average after the switch.
    switch: t', number of initial steps of synchronous training; 0 means local SGD from the start.

  Raises:
    ValueError: if period < 1 or switch < 0.

  Reference: Lin, Stich, Patel, Jaggi 2020, arXiv 1808.07217 (post-local SGD).
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: int = 8
  switch: int = 100

  def check(self):
    checks.at_least("period", self.period)
    checks.at_least("switch", self.switch, 0)

  @property
  def local_steps(self):
    return 1

  @property
  def later(self):
    return ()

  def in_rounds(self, steps, participation):
    del steps, participation
    return self

  def init(self, params):
    zero = jnp.zeros((), jnp.int32)
    states = self.inner.init(params), self.aggregator.init(params)
    return PostLocalState(params, params, *states, zero)

  def sync(self, local, state, *, key, presence=EVERYONE):
    active = presence.active

    def average(link):
      change = optax.tree.sub(local.params, state.common)
      value, _, link = self.aggregator.aggregate(change, link, key, presence)
      common = optax.tree.add(state.common, value)
      return common, common, link

    count = state.count + 1
    due = (count <= self.switch) | ((count - self.switch) % self.period == 0)
    alone = lambda link: (kept(active, local.params, state.params), state.common, link)
    params, common, link = lax.cond(due, average, alone, state.link)
    return PostLocalState(params, common, kept(active, local.inner, state.inner), link, count)


post_local_sgd = PostLocalSGD
