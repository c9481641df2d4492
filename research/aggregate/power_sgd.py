"""PowerSGD: low-rank gradient compression by one step of a power iteration per round."""

import itertools
from dataclasses import KW_ONLY
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.presence import weighted
from research.aggregate.privacy.hiding import Sum
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Key, Trait

# Products of thin matrices are memory-bound at any precision; accelerators default to a low one.
matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
FUSED = 8  # the largest rank whose products are fused instead of written to memory


class PowerSGD(Aggregator, name="power_sgd"):
  """Averages rank-r approximations of the workers' matrices; both factors are all-reduced.

      P = orthonormal(1/W sum_i M_i Q),   Q_i = M_i^T P,   Q <- 1/W sum_i Q_i
      value = P Q^T,                      sent_i = P Q_i^T

  Each round starts from the last round's Q. A column that is zero on all workers, for example after
  a round of zero gradients, keeps its old value, because a zero column could never change again.
  Leaves of two or more dimensions are treated as matrices [all dimensions but the last, last].
  Vectors, and matrices with at most r (rows + columns) elements, are averaged exactly. Use this
  aggregator inside `error_feedback`. We orthogonalise by Householder QR instead of the paper's
  Gram-Schmidt, which loses orthogonality in float32. Matrices of equal shape are decomposed
  together.

  Args:
    rank: r, at least 1.
    axis: the worker axes to average over.
    seed: the seed of the initial Q, equal on all workers.

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
    """Returns the initial Q, which is empty for a leaf that is averaged exactly."""
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
    p = orthonormal(left)
    own = {i: matmul(p[i].T, m[i]) for i in m}  # Q_i^T
    right = collectives.packed_mean(own, self.axis)

    def restored(rights, vectors):
      shaped = lambda i, x: product(p[i], rights[i]).reshape(x.shape).astype(x.dtype)
      return [vectors[i] if i in exact else shaped(i, x) for i, x in enumerate(leaves)]

    factors = [found(right[i].T, q[i]) if i in m else q[i] for i in range(len(leaves))]
    value, sent = restored(right, exact_mean), restored(own, exact)
    return Aggregate(*map(treedef.unflatten, (value, sent, factors)))


power_sgd = PowerSGD


def orthonormal(matrices: dict[Any, Array]) -> dict[Any, Array]:
  """Computes Q of the QR decomposition of each matrix, in one batched call per shape.

  A decomposition is a sequence of short steps, so an accelerator takes as long for a batch as for
  one matrix. On a CPU, the matrices of a batch are decomposed one after the other, because the
  batched LAPACK calls of jaxlib 0.10 can block the threads for which they wait.

  Args:
    matrices: float32 [stack..., m, r] each, by number or name.

  Returns:
    The orthonormal columns, by number or name, [stack..., m, r] each.
  """
  alike: dict[tuple[int, ...], list[Any]] = {}
  for name, x in matrices.items():
    alike.setdefault(x.shape[-2:], []).append(name)
  of_one = lambda x: jnp.linalg.qr(x)[0]
  in_turn = lambda batch: lax.map(of_one, batch)
  q = {}
  for shape, names in alike.items():
    stacks = [matrices[name].reshape(-1, *shape) for name in names]
    columns = lax.platform_dependent(jnp.concatenate(stacks), cpu=in_turn, default=of_one)
    parts = jnp.split(columns, list(itertools.accumulate(map(len, stacks)))[:-1])
    q |= {n: part.reshape(matrices[n].shape) for n, part in zip(names, parts, strict=True)}
  return q


def found(new: Array, old: Array) -> Array:
  """Returns the new factor, with the old column wherever the new column is zero or non-finite.

  Args:
    new: the new factor, [n, r].
    old: the old factor, [n, r].
  """
  size = jnp.sum(jnp.abs(new), 0)
  return jnp.where((size > 0) & jnp.isfinite(size), new, old)


def is_low_rank(x: Array, rank: int) -> bool:
  """Returns whether the two factors of a leaf are smaller than the leaf.

  Args:
    x: the leaf.
    rank: the rank of the factors.
  """
  rows = x.size // x.shape[-1] if x.ndim > 1 and x.shape[-1] else 0
  return rows > 0 and rank * (rows + x.shape[-1]) < x.size


def as_matrix(x: Array) -> Array:
  """Reshapes a leaf to a float32 matrix [all dimensions but the last, last].

  Args:
    x: the leaf, of two or more dimensions.
  """
  return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def product(left: Array, right: Array) -> Array:
  """Computes left @ right; if `left` is narrow, adds outer products, which XLA fuses.

  XLA would write the result of a matrix product, which is as large as the leaf, to memory.

  Args:
    left: the left factor, [m, r].
    right: the right factor, [r, n].

  Returns:
    The product [m, n].
  """
  if left.shape[1] > FUSED:
    return matmul(left, right)
  outer = lambda k: left[:, k, None] * right[None, k]
  return sum(map(outer, range(1, left.shape[1])), outer(0))
