"""Momentum on each worker, of what it sends; corrected for what is sent late, where it is."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, unweighted, weighted
from research.aggregate.privacy.clipping import clipped
from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, State, Tree


class MomentumCorrectionState(NamedTuple):
  momentum: Tree  # u_i, private
  memory: Tree  # v_i, private
  inner: State


def momentum_correction(
  inner: Aggregator,
  *,
  momentum: float = 0.9,
  clip_norm: float = math.inf,
  nesterov: bool = False,
  axis: collectives.Axes = WORKER_AXES,
) -> Aggregator:
  """Deep gradient compression: accumulates velocities, not gradients, and sends the largest.

      g_i <- g_i min(1, clip_norm W^-1/2 / ||g_i||)
      u_i <- m u_i + g_i,       v_i <- v_i + u_i
      u_i <- m (u_i + g_i),     v_i <- v_i + u_i + g_i       with Nesterov's momentum
      value = A(v),   v_i <- v_i - sent_i,   u_i <- 0 where sent_i is not 0

  Momentum of the optimizer would act on what arrives late; here a coordinate has its momentum while
  it waits, and none left over from before it was sent (momentum factor masking). The optimizer
  behind it is plain `sgd`. Where everything is sent at once, no momentum is left.

  Args:
    inner: a sparse aggregator, such as gather_mean(top_k(0.001)).
    momentum: m, in [0, 1).
    clip_norm: of the mean gradient; each worker's whole tree is clipped at W^-1/2 of it.
    nesterov: Nesterov's momentum in place of Polyak's.
    axis: the worker axes, for W.

  Raises:
    ValueError: for arguments out of range, or an inner aggregator in `composition.REFUSED`.

  Reference: Lin, Han, Mao, Wang, Dally 2018, arXiv 1712.01887, algorithms 2 (momentum correction)
    and 1 (local clipping), section 3.3.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum={momentum} is not in [0, 1)")
  if not clip_norm > 0:
    raise ValueError(f"clip_norm={clip_norm} is not in (0, inf]")
  refuse("momentum_correction", inner)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return MomentumCorrectionState(zeros, zeros, inner.init(params))

  def accumulate(u, v, g):
    u = momentum * (u + g) if nesterov else momentum * u + g
    return u, v + u + g if nesterov else v + u

  def aggregate(tree, state, key, presence=EVERYONE):
    grads = tree
    if math.isfinite(clip_norm):
      grads = clipped(tree, clip_norm / math.sqrt(collectives.worker_count(axis)))
    grads = weighted(grads, presence)
    pairs = jax.tree.map(accumulate, state.momentum, state.memory, grads)
    u, v = jax.tree.transpose(jax.tree.structure(tree), None, pairs)
    value, sent, link = inner.aggregate(v, state.inner, key, unweighted(presence))
    memory = jax.tree.map(jnp.subtract, v, sent)
    u = jax.tree.map(lambda u, s: jnp.where(s == 0, u, 0), u, sent)
    u, memory = kept(presence.active, (u, memory), (state.momentum, state.memory))
    return Aggregate(value, sent, MomentumCorrectionState(u, memory, link))

  traits = {"memory", "whole"} if math.isfinite(clip_norm) else {"memory"}
  return Aggregator(init, aggregate, inner.traits | traits)


class WorkerMomentumState(NamedTuple):
  momentum: Tree  # m_i, private
  inner: State


def worker_momentum(inner: Aggregator, *, momentum: float = 0.9) -> Aggregator:
  """Each worker sends its momentum in the place of its value.

      m_i <- beta m_i + (1 - beta) x_i,   value = A(m)

  Of a mean it is momentum of the mean. A robust rule sees less noise: honest workers' momenta lie
  nearer together than their gradients, and what a faulty worker adds in every round no longer hides
  among them. The optimizer behind it is plain `sgd`; m_i starts from zero.

  Args:
    inner: the aggregator, such as krum(faulty); an attack goes inside, where it replaces momenta.
    momentum: beta, in [0, 1).

  Raises:
    ValueError: if momentum is not in [0, 1), or for an inner aggregator in `composition.REFUSED`.

  Reference: Karimireddy, He, Jaggi 2021, arXiv 2012.10333, algorithm 2.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum={momentum} is not in [0, 1)")
  refuse("worker_momentum", inner)

  def init(params):
    return WorkerMomentumState(jax.tree.map(jnp.zeros_like, params), inner.init(params))

  def aggregate(tree, state, key, presence=EVERYONE):
    move = lambda m, x: momentum * m + (1 - momentum) * x
    own = kept(presence.active, jax.tree.map(move, state.momentum, tree), state.momentum)
    value, sent, link = inner.aggregate(own, state.inner, key, presence)
    return Aggregate(value, sent, WorkerMomentumState(own, link))

  return Aggregator(init, aggregate, inner.traits | {"memory"})
