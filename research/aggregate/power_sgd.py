"""PowerSGD: gradients as products of two thin matrices, found by one step of a power iteration."""

from dataclasses import KW_ONLY
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.presence import weighted
from research.aggregate.privacy.hiding import Sum
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Key, Trait

# Thin products wait for memory whatever their precision, and accelerators would choose a low one.
matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
FUSED = 8  # the largest rank whose products are not written to memory of their own


class PowerSGD(Aggregator, name="power_sgd"):
  """A rank-r approximation of each worker's matrix, averaged; both factors by all-reduce.

      P = orthonormal(1/W sum_i M_i Q),   Q_i = M_i^T P,   Q <- 1/W sum_i Q_i
      value = P Q^T,                      sent_i = P Q_i^T

  Q starts where the last round left it; a column in which no worker had anything, as after a round
  of zero gradients, stays as it was, since from zero it would never move again. Leaves of two and
  more dimensions are matrices [all but the last, last]; those that r (rows + columns) numbers would
  not make smaller, and vectors, are averaged exactly. Meant to stand under `error_feedback`. We
  orthogonalise by Householder QR instead of the paper's Gram-Schmidt, which loses orthogonality in
  float32.

  Args:
    rank: r, at least 1.
    axis: the worker axes to average over.
    seed: of the first Q, the same on all workers.

  Raises:
    ValueError: if rank < 1.

  Reference: Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727, algorithm 1.
  """

  rank: int = 2
  axis: collectives.Axes = WORKER_AXES
  _: KW_ONLY
  seed: int = 0
  adds = Trait.DENSE

  def check(self):
    checks.at_least("rank", self.rank)

  @property
  def privacy(self):
    return Sum(self.axis)

  def init(self, params):
    leaves, treedef = jax.tree.flatten(params)
    keys = [jax.random.fold_in(jax.random.key(self.seed), leaf) for leaf in range(len(leaves))]
    return treedef.unflatten([self._first(x, k) for x, k in zip(leaves, keys, strict=True)])

  def _first(self, x: Array, key: Key) -> Array:
    """Q of round 0; empty for a leaf that is averaged exactly."""
    shape = (x.shape[-1], self.rank) if is_low_rank(x, self.rank) else (0,)
    return jax.random.normal(key, shape, jnp.float32)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    del key
    leaves, treedef = jax.tree.flatten(weighted(tree, presence))
    q = treedef.flatten_up_to(state)
    exact = {i: x for i, x in enumerate(leaves) if not is_low_rank(x, self.rank)}
    m = {i: as_matrix(x) for i, x in enumerate(leaves) if i not in exact}
    products = {i: matmul(m[i], q[i]) for i in m}
    left, exact_mean = collectives.packed_mean((products, exact), self.axis)
    p = {i: jnp.linalg.qr(left[i])[0] for i in m}
    own = {i: matmul(p[i].T, m[i]) for i in m}  # Q_i^T
    right = collectives.packed_mean(own, self.axis)

    def restored(rights, vectors):
      shaped = lambda i, x: product(p[i], rights[i]).reshape(x.shape).astype(x.dtype)
      return [vectors[i] if i in exact else shaped(i, x) for i, x in enumerate(leaves)]

    factors = [found(right[i].T, q[i]) if i in m else q[i] for i in range(len(leaves))]
    value, sent = restored(right, exact_mean), restored(own, exact)
    return Aggregate(*map(treedef.unflatten, (value, sent, factors)))


power_sgd = PowerSGD


def found(new: Array, old: Array) -> Array:
  """The new factor [n, r], with the old column wherever the new one is zero or not finite."""
  size = jnp.sum(jnp.abs(new), 0)
  return jnp.where((size > 0) & jnp.isfinite(size), new, old)


def is_low_rank(x: Array, rank: int) -> bool:
  """Whether two factors are smaller than the leaf."""
  rows = x.size // x.shape[-1] if x.ndim > 1 and x.shape[-1] else 0
  return rows > 0 and rank * (rows + x.shape[-1]) < x.size


def as_matrix(x: Array) -> Array:
  """float32 [all dimensions but the last, last]."""
  return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def product(left: Array, right: Array) -> Array:
  """left @ right for few columns of left, as a sum that fuses with what it is added to.

  A matrix product would be written to memory first, and here it is as large as the leaf.
  """
  if left.shape[1] > FUSED:
    return matmul(left, right)
  outer = lambda k: left[:, k, None] * right[None, k]
  return sum(map(outer, range(1, left.shape[1])), outer(0))
