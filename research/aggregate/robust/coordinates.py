"""Computes coordinate-wise robust averages, which a minority of workers can change only slightly.

No worker receives all values. Each leaf is cut into W chunks. Worker j receives chunk j of all
workers and applies the rule to these chunks, and the results are gathered. For any W, each worker
sends 2 (W-1)/W times the tree's bytes, as in a ring all-reduce. Rules for workers' full vectors are
in `vectors.py`.

A rule applies to the values of the n workers that are present, and counts each worker once,
whatever its weight is. The result of the rule is multiplied by the mean weight over all W workers,
which is one if the weights are normalized over the present workers. If no worker is present, the
value is zero.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.aggregate.chunks import cut, joined
from research.aggregate.presence import Roll, call_roll
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Trait, Tree
from research.core.part import required


class Robust(Aggregator):
  """Applies a robust rule to the values of the workers that are present.

  Subclasses define the worker axes and the rule for a worker's chunks.
  """

  axis: ClassVar[Any] = WORKER_AXES
  adds = Trait.SELECTS | Trait.DENSE

  @required
  def of_chunks(self, everyone: Tree, roll: Roll | None) -> Tree:
    """Applies the rule to the chunks that this worker has received.

    Args:
      everyone: the chunks of all W workers, with leaves [W, ...] of float32 or wider.
      roll: the workers that are present; None means all workers.

    Returns:
      The value of the chunk, with leaves [...].
    """
    ...

  def aggregate(self, tree, state, key, presence=EVERYONE):
    del key
    everyone, roll = exchanged(tree, self.axis), call_roll(presence, self.axis)
    chunk = self.of_chunks(everyone, roll)
    return Aggregate(restored(scaled(chunk, roll), tree, self.axis), tree, state)


class Trimmed(Robust):
  """Averages each coordinate without its smallest and largest values."""

  @required
  def trim(self, count: int) -> int:
    """Returns how many of n values to drop at each end."""
    ...

  def of_chunks(self, everyone, roll):
    return jax.tree.map(lambda x: middle(x, self.trim, roll), everyone)


class Median(Trimmed, name="median"):
  """Computes the coordinate-wise median over workers; for even n, the mean of the middle two.

      value_k = med{x_i_k : i present}

  NaN counts as the largest value. If fewer than half of the workers are faulty, each coordinate is
  within the range of the honest workers' values.

  Args:
    axis: the worker axes.

  Reference: Yin et al. 2018, arXiv 1803.01498, algorithm 1, option I.
  """

  axis: collectives.Axes = WORKER_AXES

  def trim(self, count):
    return around_middle(count)


median = Median


class TrimmedMean(Trimmed, name="trimmed_mean"):
  """Computes the coordinate-wise mean without a fraction of the smallest and of the largest values.

      value_k = 1/(n - 2b) sum_{r=b+1}^{n-b} x_(r)_k,   b = floor(beta n),   x_(1)_k <= x_(2)_k ...

  NaN counts as the largest value. If at most b workers are faulty, each coordinate is within the
  range of the honest workers' values.

  Args:
    fraction: beta, the fraction of values to drop at each end, in [0, 0.5). It is interpreted as a
      decimal number, so that 0.29 of 100 workers is 29.
    axis: the worker axes.

  Raises:
    ValueError: if fraction is not in [0, 0.5).

  Reference: Yin et al. 2018, arXiv 1803.01498, algorithm 1, option II.
  """

  fraction: float
  axis: collectives.Axes = WORKER_AXES

  def check(self):
    checks.in_range("fraction", self.fraction, "[0, 0.5)")

  def trim(self, count):
    return int(Fraction(str(self.fraction)) * count)


trimmed_mean = TrimmedMean


def around_middle(count: int) -> int:
  """Returns the number of values that the median drops at each end.

  Args:
    count: n, the number of values.
  """
  return (count - 1) // 2


def middle(x: Array, trim: Callable[[int], int], roll: Roll | None) -> Array:
  """Averages over the n present workers, without the trim(n) smallest and trim(n) largest values.

  Args:
    x: the values of all workers [W, ...], float32 or wider.
    trim: a function from n to the number of values to drop at each end.
    roll: the workers that are present; None means all workers.

  Returns:
    The means [...].
  """
  count = x.shape[0]
  if roll is None:
    return jnp.mean(jnp.sort(x, 0)[trim(count) : count - trim(count)], 0)  # NaN is sorted last
  ends = jnp.asarray([trim(n) if n else 0 for n in range(count + 1)])[roll.count]
  column = lambda row: row.reshape(-1, *[1] * (x.ndim - 1))
  ordered = jnp.sort(jnp.where(column(roll.present) & ~jnp.isnan(x), x, jnp.inf), 0)
  place = column(jnp.arange(count))
  inside = jnp.where((place >= ends) & (place < roll.count - ends), ordered, 0)
  return jnp.sum(inside, 0) / jnp.maximum(roll.count - 2 * ends, 1)


def scaled(value: Tree, roll: Roll | None) -> Tree:
  """Multiplies the result of a rule by the mean weight of the workers.

  Args:
    value: the result of the rule.
    roll: the workers that are present; None means all workers, with weights one.
  """
  return value if roll is None else jax.tree.map(lambda x: roll.scale.astype(x.dtype) * x, value)


def exchanged(tree: Tree, axis: collectives.Axes) -> Tree:
  """Sends chunk j of this worker's leaves to worker j, and receives this worker's chunks.

  Chunks are sent in their own dtype; the last chunk is padded with zeros.

  Args:
    tree: this worker's values.
    axis: the worker axes.

  Returns:
    The chunks of all workers that belong to this worker, with leaves [W, chunk] of float32 or
    wider.
  """
  count = collectives.worker_count(axis)
  chunks = collectives.exchange(jax.tree.map(lambda x: cut(x, count), tree), axis)
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), chunks)


def restored(chunk: Tree, like: Tree, axis: collectives.Axes) -> Tree:
  """Gathers the workers' chunks of a result into full leaves.

  Args:
    chunk: this worker's chunk of the result, with leaves [...].
    like: a tree with the structure, shapes and dtypes of the result.
    axis: the worker axes.

  Returns:
    The result with full leaves, equal on all workers.
  """
  one = lambda c, x: joined(collectives.gather(c.astype(x.dtype), axis), x)
  return jax.tree.map(one, chunk, like)
