"""Dion2: orthonormalizes only the largest rows or columns of the momentum in each round."""

import math
from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.core import checks
from research.core.base import EVERYONE, Array, Params, State
from research.methods._matrices import Leaves, OfMatrices, divided
from research.methods._steps import rate_at
from research.optim.muon import orthogonalized

NEWTON_SCHULZ_STEPS = 5


class Dion2State(NamedTuple):
  rule = "dion2"  # without annotation, so that this is not a field; see training/reach.py

  params: Params  # W_t
  momentum: Leaves  # M_t
  inner: State  # state of the optimizer of the other leaves
  link: State  # state of the aggregator
  count: Array  # int32, t


class Dion2(OfMatrices, name="dion2"):
  """Applies Muon to a fraction of the rows or columns, and decays the momentum of this fraction.

      M <- M + aggregate_i(weight_i grad f_i(W_t))
      K = the ceil(alpha m) rows of M [m, n] with the largest L1 norm; columns if n < m
      U = NewtonSchulz(M[K]),   M[K] <- beta M[K]
      W_{t+1} = (1 - eta_t lambda) W_t,   W_{t+1}[K] -= eta_t sqrt(outputs / inputs) U

  Full gradients are exchanged, as in the authors' data parallelism; only the orthonormalization is
  cheaper than Muon's, by about 1 / alpha^2. The momentum is equal on all workers. The model
  declares which leaves are hidden matrices, or stacks of them, as for `muon`. If a mesh
  shards a matrix, K is still chosen from the full matrix; the authors' default chooses from each
  shard.

  Args:
    learning_rate: eta of the matrices, a constant or a schedule over rounds.
    others: the optimizer of all other leaves, such as `adamw(3e-3)`.
    aggregator: combines the workers' gradients.
    fraction: alpha, in (0, 1]; 1 orthonormalizes the whole momentum, as Muon does.
    decay: beta, the factor on the selected momentum, in [0, 1).
    weight_decay: lambda of the matrices, at least 0.

  Raises:
    ValueError: if an argument is out of range or the aggregator is incompatible; in `init`, if the
      model has no hidden matrix.

  Reference: Ahn, Amsel, Langford 2025, arXiv 2512.16928, algorithm 1.
  """

  _: KW_ONLY
  fraction: float = 0.25
  decay: float = 0.95

  def check(self):
    super().check()
    checks.in_range("fraction", self.fraction, "(0, 1]")
    checks.in_range("decay", self.decay, "[0, 1)")

  def init(self, params):
    matrices, others = divided(params, self.matrices(params))
    momentum = {name: jnp.zeros(x.shape, jnp.float32) for name, x in matrices.items()}
    states = self.others.init(others), self.aggregator.init(params)
    return Dion2State(params, momentum, *states, jnp.zeros((), jnp.int32))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key, presence
    return local.grads, state

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    kinds = self.matrices(state.params)
    grads, others = divided(value, kinds)
    directions, momentum = {}, {}
    for name, g in grads.items():
      found = self.selected(kinds[name].view(state.momentum[name] + g))
      directions[name], momentum[name] = (x.reshape(g.shape) for x in found)
    rate = rate_at(self.learning_rate, state.count)
    params, inner = self.stepped(state.params, directions, rate, others, state.inner)
    return Dion2State(params, momentum, inner, state.link, state.count + 1)

  def selected(self, m: Array) -> tuple[Array, Array]:
    """Orthonormalizes the rows or columns in K.

    Args:
      m: the momentum M, [stack..., m, n].

    Returns:
      The directions, U in the rows or columns in K and zero elsewhere, and the decayed momentum.
    """
    if m.shape[-1] < m.shape[-2]:
      direction, left = self.selected(m.mT)
      return direction.mT, left.mT

    def one(m: Array) -> tuple[Array, Array]:
      rows = lax.top_k(jnp.sum(jnp.abs(m), -1), math.ceil(self.fraction * len(m)))[1]
      u = orthogonalized(m[rows], NEWTON_SCHULZ_STEPS)
      return jnp.zeros_like(m).at[rows].set(u), m.at[rows].multiply(self.decay)

    found = jax.vmap(one)(m.reshape(-1, *m.shape[-2:]))
    direction, left = (x.reshape(m.shape) for x in found)
    return direction, left


dion2 = Dion2
