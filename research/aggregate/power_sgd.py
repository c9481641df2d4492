"""PowerSGD: gradients as products of two thin matrices, found by one step of a power iteration."""

import jax
import jax.numpy as jnp

from research.base import WORKER_AXES, Aggregate, Aggregator, Array
from research.comm import collectives


def power_sgd(rank: int = 2, axis: collectives.Axes = WORKER_AXES, *, seed: int = 0) -> Aggregator:
  """A rank-r approximation of each worker's matrix, averaged; both factors by all-reduce.

      P = orthonormal(1/W sum_i M_i Q),   Q_i = M_i^T P,   Q <- 1/W sum_i Q_i
      value = P Q^T,                      sent_i = P Q_i^T

  Q starts where the last round left it. Leaves of two and more dimensions are matrices
  [all but the last, last]; those that r (rows + columns) numbers would not make smaller, and
  vectors, are averaged exactly. Meant to stand under `error_feedback`. We orthogonalise by
  Householder QR instead of the paper's Gram-Schmidt, which loses orthogonality in float32.

  Args:
    rank: r, at least 1.
    axis: the worker axes to average over.
    seed: of the first Q, the same on all workers.

  Raises:
    ValueError: if rank < 1.

  Reference: Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727, algorithm 1.
  """
  if rank < 1:
    raise ValueError(f"rank={rank}; it is at least 1")

  def init(params):
    leaves, treedef = jax.tree.flatten(params)
    keys = [jax.random.fold_in(jax.random.key(seed), leaf) for leaf in range(len(leaves))]
    return treedef.unflatten([first(x, k) for x, k in zip(leaves, keys, strict=True)])

  def first(x, key):
    shape = (x.shape[-1], rank) if is_low_rank(x, rank) else (0,)
    return jax.random.normal(key, shape, jnp.float32)

  def one(x, q):
    if not is_low_rank(x, rank):
      return collectives.mean(x, axis), x, q
    m = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    p, _ = jnp.linalg.qr(collectives.mean(m @ q, axis))
    own = m.T @ p
    q = collectives.mean(own, axis)
    shaped = lambda right: (p @ right.T).reshape(x.shape).astype(x.dtype)
    return shaped(q), shaped(own), q

  def aggregate(tree, state, key):
    del key
    leaves, treedef = jax.tree.flatten(tree)
    results = [one(x, q) for x, q in zip(leaves, treedef.flatten_up_to(state), strict=True)]
    value, sent, factors = (treedef.unflatten([r[i] for r in results]) for i in range(3))
    return Aggregate(value, sent, factors)

  return Aggregator(init, aggregate, frozenset({"dense"}))


def is_low_rank(x: Array, rank: int) -> bool:
  """Whether two factors are smaller than the leaf."""
  rows = x.size // x.shape[-1] if x.ndim > 1 and x.shape[-1] else 0
  return rows > 0 and rank * (rows + x.shape[-1]) < x.size
