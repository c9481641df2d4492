"""Dion: orthonormal updates of low rank, of which only two thin factors are exchanged."""

import math
from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.power_sgd import found, matmul, orthonormal
from research.aggregate.presence import alike, kept
from research.core import checks
from research.core.base import EVERYONE, Array, Params, Presence, State, Trait, Tree
from research.core.method import COMMON_MODEL
from research.methods._matrices import Leaves, OfMatrices, divided
from research.methods._steps import rate_at

NEGLIGIBLE = 1e-5  # relative to the longest column; a shorter column of R is rounding error


class DionState(NamedTuple):
  rule = "dion"  # without annotation, so that this is not a field; see training/reach.py

  params: Params  # W_t
  momentum: Leaves  # M_t of this worker
  right: Leaves  # Q_t
  inner: State  # state of the optimizer of the other leaves
  link: tuple[State, State]  # states of the exchanges of P and of R
  count: Array  # int32, t


class Dion(OfMatrices, name="dion"):
  """Orthonormalizes a low-rank part of the momentum; every worker has its own momentum.

      B_i = M_i + weight_i G_i                                          G_i = grad f_i(W_t)
      P = orthonormal(aggregate_i(B_i Q_t)),   R = aggregate_i(B_i^T P)
      M_i <- B_i - (1 - mu) P R^T,   Q_{t+1} = R with columns of unit length
      W_{t+1} = (1 - eta_t lambda) W_t - eta_t sqrt(outputs / inputs) P Q_{t+1}^T

  The factors of a matrix [m, n] have r = ceil(rank min(m, n)) columns; a worker sends r (m + n)
  elements of it. The model declares which leaves are hidden matrices, or stacks of them, as for
  `muon`. With `mean()`, the method is Dion on the mean gradient, although the workers' momenta
  differ. The gradients of all other leaves (embeddings, heads, vectors, and matrices that are not
  larger than their factors) are averaged with the first exchange and passed to `others`.

  If B has a rank below r, a column of R is zero up to rounding. Such a column changes no weight,
  and Q keeps its old column, because a zero column could never change again. An absent worker keeps
  its momentum, and the factors are computed from the other workers. We orthonormalize by
  Householder QR.

  Args:
    learning_rate: eta of the matrices, a constant or a schedule over rounds.
    others: the optimizer of all other leaves, such as `adamw(3e-3)`.
    aggregator: averages the factors and the other gradients; errors of R stay in the momenta.
    rank: the rank as a fraction of the smaller dimension, in (0, 0.5]; above 0.5, the factors of a
      square matrix would be larger than the matrix.
    momentum: mu, in [0, 1).
    weight_decay: lambda of the matrices, at least 0.
    seed: the seed of the initial Q, equal on all workers.

  Raises:
    ValueError: if an argument is out of range or the aggregator is incompatible; in `init`, if the
      model has no hidden matrix.

  Reference: Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan, Langford 2025, arXiv 2504.05295,
    algorithm 1 and its decoupled momentum.
  """

  _: KW_ONLY
  rank: float = 0.25
  momentum: float = 0.95
  seed: int = 0

  refuses = COMMON_MODEL | {
    Trait.MEMORY: "the momenta already keep what the factors lack, in bases that change",
    Trait.VOTE: "signs cannot replace the factors of a matrix",
    Trait.SELECTS: "the factors' product is the mean of the momenta only if both are means",
    Trait.NOISE: "each example's gradient stays in the momenta, and would be sent in all rounds",
    Trait.PARTIAL: "the momenta would lose what a worker that drops out did not send",
  }

  def check(self):
    super().check()
    checks.in_range("rank", self.rank, "(0, 0.5]")
    checks.in_range("momentum", self.momentum, "[0, 1)")

  def suits(self, inputs, outputs):
    return self.columns(inputs, outputs) * (inputs + outputs) < inputs * outputs

  def columns(self, m: int, n: int) -> int:
    """Returns r, the number of columns of the factors of a matrix [m, n]."""
    return math.ceil(self.rank * min(m, n))

  def init(self, params):
    kinds = self.matrices(params)
    matrices, others = divided(params, kinds)
    left, right = {}, {}
    for number, (name, x) in enumerate(matrices.items()):
      *stack, m, n = kinds[name].view(x).shape
      key, r = jax.random.fold_in(jax.random.key(self.seed), number), self.columns(m, n)
      left[name] = jnp.zeros((*stack, m, r), jnp.float32)
      right[name] = jax.random.normal(key, (*stack, n, r), jnp.float32)
    momentum = {name: jnp.zeros(x.shape, jnp.float32) for name, x in matrices.items()}
    link = self.aggregator.init((left, others)), self.aggregator.init(right)
    inner = self.others.init(others)
    return DionState(params, momentum, right, inner, link, jnp.zeros((), jnp.int32))

  def sync(self, local, state, *, key, presence=EVERYONE):
    kinds, there = self.matrices(state.params), alike(presence.active)
    grads, others = divided(relative(local.grads, presence, there), kinds)
    b = jax.tree.map(jnp.add, state.momentum, grads)
    keys = jax.random.split(key)

    def exchanged(number, tree):
      return self.aggregator.aggregate(tree, state.link[number], keys[number], there)

    of_b = {name: kinds[name].view(x) for name, x in b.items()}
    products = {name: matmul(x, state.right[name]) for name, x in of_b.items()}
    (left, others), _, first = exchanged(0, (products, others))
    p = orthonormal(left)
    right, _, second = exchanged(1, {name: matmul(x.mT, p[name]) for name, x in of_b.items()})
    q = {name: unit_columns(x) for name, x in right.items()}
    times_p = lambda name, x: matmul(p[name], x.mT).reshape(b[name].shape)
    momentum = {k: x - (1 - self.momentum) * times_p(k, right[k]) for k, x in b.items()}
    directions = {name: times_p(name, x) for name, x in q.items()}
    rate = rate_at(self.learning_rate, state.count)
    params, inner = self.stepped(state.params, directions, rate, others, state.inner)
    return DionState(
      params,
      kept(presence.active, momentum, state.momentum),
      jax.tree.map(found, q, state.right),
      inner,
      (first, second),
      state.count + 1,
    )


dion = Dion


def relative(grads: Tree, presence: Presence, there: Presence) -> Tree:
  """Weights a worker's gradients relative to `there`, the presence with which factors are averaged.

  Args:
    grads: this worker's gradients.
    presence: this worker's participation and weight.
    there: the worker's participation, with equal weights for all workers.

  Returns:
    The weighted gradients: their mean with the weights of `there` equals the mean of `grads` with
    the weights of `presence`.
  """
  if presence is EVERYONE:
    return grads
  share = presence.weight / jnp.where(presence.active, there.weight, 1)
  return jax.tree.map(lambda g: (share * g).astype(g.dtype), grads)


def unit_columns(x: Array) -> Array:
  """Scales columns to unit length; columns much shorter than the longest column become zero.

  Args:
    x: [..., n, r].
  """
  length = jnp.linalg.norm(x, axis=-2, keepdims=True)
  is_zero = length <= NEGLIGIBLE * jnp.max(length, -1, keepdims=True)
  return jnp.where(is_zero, 0, x / jnp.where(is_zero, 1, length))
