"""Eager DiLoCo: outer steps with a worker's own new change and the others' previous changes."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import optax

from research.aggregate.presence import kept, weighted
from research.comm import collectives
from research.core.base import EVERYONE, Aggregator, Params, State, Tree
from research.core.method import Period
from research.methods._steps import LocalStepping


class EagerState(NamedTuple):
  params: Params  # theta_t^i of this worker
  inner: State  # state of this worker's optimizer
  outer: State  # state of this worker's outer optimizer
  mean: Tree  # the mean of Delta_{t-1}
  own: Tree  # this worker's term of that mean, M times
  link: State  # state of the aggregator


class EagerDiLoCo(LocalStepping, name="eager_diloco"):
  """DiLoCo whose exchange overlaps with the whole next round.

      theta_{t,0}^i = theta_t^i,   theta_{t,h+1}^i = theta_{t,h}^i + inner(grad f_i(theta_{t,h}^i))
      Delta_t^i = theta_t^i - theta_{t,H}^i
      g_t^i = mean_j Delta_{t-1}^j + (Delta_t^i - Delta_{t-1}^i) / M
      theta_{t+1}^i = theta_t^i + outer(g_t^i)

  g_t^i is the previous round's mean over the M workers, in which worker i has replaced its old term
  with its new term. In the first round, the others' terms are zero. The workers' models differ; the
  deployed model is their mean. With compression, Delta_{t-1}^i is the term as the other workers
  received it. A worker that missed a round replaces the last term that it sent.

  Args:
    inner: each worker's optimizer; its state is private.
    outer: each worker's outer optimizer; its state is private.
    aggregator: combines the workers' outer gradients.
    period: H, number of local steps per round, or a schedule [[first round, H], ...].

  Raises:
    ValueError: if period < 1, the period's schedule does not start at round 0 and increase, or the
      aggregator's value differs between workers.

  Reference: Kale, Douillard, Donchev 2025, arXiv 2502.12996, eager updates.
  """

  inner: optax.GradientTransformation
  outer: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 50

  eager = True

  def init(self, params):
    states = self.inner.init(params), self.outer.init(params)
    zeros = optax.tree.zeros_like(params)
    return EagerState(params, *states, zeros, zeros, self.aggregator.init(params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    workers = collectives.worker_count()
    change = optax.tree.sub(state.params, local.params)
    mixed = lambda mean, new, old: mean + (new - old) / workers
    gradient = jax.tree.map(mixed, state.mean, weighted(change, presence), state.own)
    updates, outer = self.outer.update(gradient, state.outer, state.params)
    after = optax.apply_updates(state.params, updates), local.inner, outer
    own = kept(presence.active, after, (state.params, state.inner, state.outer))
    params, inner, outer = own
    return change, state._replace(params=params, inner=inner, outer=outer)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del key
    return state._replace(mean=value, own=kept(presence.active, sent, state.own))


eager_diloco = EagerDiLoCo
