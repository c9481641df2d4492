"""Overlap local SGD: workers are pulled towards an average that is a round old."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import optax

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Params, State, Tree
from research.core.method import Period
from research.methods._steps import LocalStepping


class OverlapState(NamedTuple):
  params: Params  # x_t^i of this worker
  inner: State  # state of this worker's optimizer
  anchor: Params  # z_t
  velocity: Tree  # v_t
  link: State  # state of the aggregator


class OverlapLocalSGD(LocalStepping, name="overlap_local_sgd"):
  """Local SGD whose averaging overlaps with the entire next round.

      y_t^i = H local steps of the inner optimizer from x_t^i
      x_{t+1}^i = y_t^i - alpha (y_t^i - z_t)
      v_{t+1} = beta v_t + aggregate_i(weight_i (x_{t+1}^i - z_t)),    z_{t+1} = z_t + v_{t+1}

  The anchor z_{t+1} is needed only at the end of the next round. With beta = 0, the anchor is the
  mean of the workers' models. The deployed model is the mean of the workers' models.

  Args:
    inner: each worker's optimizer; its state is private.
    aggregator: combines the workers' differences from the anchor.
    period: H, number of local steps per round, or a schedule [[first round, H], ...].
    alpha: strength of the pull towards the anchor; the paper uses 0.6.
    momentum: beta, the anchor's momentum; the paper uses 0.7.

  Raises:
    ValueError: if period < 1, the period's schedule does not start at round 0 and increase, alpha
      is outside (0, 1], momentum is outside [0, 1), or the aggregator's value differs between
      workers.

  Reference: Wang, Liang, Joshi 2020, arXiv 2002.09539, equations 3 to 5 and 10 to 11.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 8
  alpha: float = 0.6
  momentum: float = 0.7

  eager = True

  def check(self):
    checks.in_range("alpha", self.alpha, "(0, 1]")
    checks.in_range("momentum", self.momentum, "[0, 1)")

  def init(self, params):
    zeros, link = optax.tree.zeros_like(params), self.aggregator.init(params)
    return OverlapState(params, self.inner.init(params), params, zeros, link)

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    pull = lambda y, z: y - self.alpha * (y - z)
    pulled = jax.tree.map(pull, local.params, state.anchor)
    own = (pulled, local.inner), (state.params, state.inner)
    params, inner = kept(presence.active, *own)
    return optax.tree.sub(pulled, state.anchor), state._replace(params=params, inner=inner)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    velocity = jax.tree.map(lambda v, d: self.momentum * v + d, state.velocity, value)
    return state._replace(anchor=optax.tree.add(state.anchor, velocity), velocity=velocity)


overlap_local_sgd = OverlapLocalSGD
