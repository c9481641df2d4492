"""Implements momentum on workers, with or without correction for delayed coordinates."""

import math
from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import BOUNDED, MEMORY
from research.aggregate.presence import kept, unweighted, weighted
from research.aggregate.privacy.clipping import clipped
from research.comm import collectives
from research.core import checks
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  State,
  Trait,
  Tree,
)

_CLEARED = {
  Trait.DENSE: "momentum is cleared wherever something was sent, which would be everywhere"
}
_OF_GRADIENTS = {
  Trait.NOISE: "momentum would send an example in many rounds, but the accountant counts one",
  Trait.LOCAL: "neighbours average models, not gradients",
}


class MomentumCorrectionState(NamedTuple):
  momentum: Tree  # u_i, private
  memory: Tree  # v_i, private
  inner: State


class MomentumCorrection(Aggregator, name="momentum_correction"):
  """Accumulates velocities instead of gradients and sends the largest (deep gradient compression).

      g_i <- g_i min(1, clip_norm W^-1/2 / ||g_i||)
      u_i <- m u_i + g_i,       v_i <- v_i + u_i
      u_i <- m (u_i + g_i),     v_i <- v_i + u_i + g_i       with Nesterov momentum
      value = A(v),   v_i <- v_i - sent_i,   u_i <- 0 where sent_i is not 0

  Momentum in the optimizer would act on delayed values. Here, a coordinate accumulates momentum
  while it waits to be sent, and its momentum restarts from zero after it has been sent (momentum
  factor masking). Use plain `sgd` as the optimizer. If every coordinate were sent in every round,
  there would be no momentum.

  Args:
    inner: a sparse aggregator, such as gather_mean(top_k(0.001)).
    momentum: m, the momentum factor, in [0, 1).
    clip_norm: the maximum norm of the mean gradient; each worker clips its full tree to W^-1/2
      times this norm.
    nesterov: whether to use Nesterov momentum instead of Polyak's.
    axis: the worker axes, which determine W.

  Raises:
    ValueError: if an argument is out of range, or the inner aggregator has a trait in `refuses`.

  Reference: Lin, Han, Mao, Wang, Dally 2018, arXiv 1712.01887, algorithms 2 (momentum correction)
    and 1 (local clipping), section 3.3.
  """

  inner: Aggregator
  _: KW_ONLY
  momentum: float = 0.9
  clip_norm: float = math.inf
  nesterov: bool = False
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.MEMORY
  refuses = MEMORY | BOUNDED | _CLEARED

  def check(self):
    checks.in_range("momentum", self.momentum, "[0, 1)")
    checks.in_range("clip_norm", self.clip_norm, "(0, inf]")

  @property
  def traits(self):
    return super().traits | (Trait.WHOLE if math.isfinite(self.clip_norm) else Trait(0))

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return MomentumCorrectionState(zeros, zeros, self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    grads = tree
    if math.isfinite(self.clip_norm):
      grads = clipped(tree, self.clip_norm / math.sqrt(collectives.worker_count(self.axis)))
    grads = weighted(grads, presence)
    pairs = jax.tree.map(self._accumulated, state.momentum, state.memory, grads)
    u, v = jax.tree.transpose(jax.tree.structure(tree), None, pairs)
    value, sent, link = self.inner.aggregate(v, state.inner, key, unweighted(presence))
    memory = optax.tree.sub(v, sent)
    u = jax.tree.map(lambda u, s: jnp.where(s == 0, u, 0), u, sent)
    u, memory = kept(presence.active, (u, memory), (state.momentum, state.memory))
    return Aggregate(value, sent, MomentumCorrectionState(u, memory, link))

  def _accumulated(self, u: Array, v: Array, g: Array) -> tuple[Array, Array]:
    u = self.momentum * (u + g) if self.nesterov else self.momentum * u + g
    return u, v + u + g if self.nesterov else v + u


momentum_correction = MomentumCorrection


class WorkerMomentumState(NamedTuple):
  momentum: Tree  # m_i, private
  inner: State


class WorkerMomentum(Aggregator, name="worker_momentum"):
  """Sends each worker's momentum instead of its value.

      m_i <- beta m_i + (1 - beta) x_i,   value = A(m)

  If A is a mean, the result is the momentum of the mean. A robust rule sees less noise: the momenta
  of honest workers are closer together than their gradients, so a small bias that a faulty worker
  adds in every round is no longer hidden in the noise. Use plain `sgd` as the optimizer. Initially,
  m_i is zero.

  Args:
    inner: the aggregator A, such as krum(faulty), or an attack on an aggregator, which then
      replaces momenta.
    momentum: beta, the decay factor, in [0, 1).

  Raises:
    ValueError: if momentum is not in [0, 1), or the inner aggregator has a trait in `refuses`.

  Reference: Karimireddy, He, Jaggi 2021, arXiv 2012.10333, algorithm 2.
  """

  inner: Aggregator
  _: KW_ONLY
  momentum: float = 0.9
  adds = Trait.MEMORY
  refuses = _OF_GRADIENTS

  def check(self):
    checks.in_range("momentum", self.momentum, "[0, 1)")

  def init(self, params):
    return WorkerMomentumState(optax.tree.zeros_like(params), self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    move = lambda m, x: self.momentum * m + (1 - self.momentum) * x
    own = kept(presence.active, jax.tree.map(move, state.momentum, tree), state.momentum)
    value, sent, link = self.inner.aggregate(own, state.inner, key, presence)
    return Aggregate(value, sent, WorkerMomentumState(own, link))


worker_momentum = WorkerMomentum
