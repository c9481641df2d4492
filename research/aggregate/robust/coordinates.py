"""Coordinate-wise robust averages: statistics that a minority of workers can move only slightly.

No worker receives all values. Each leaf is cut into W chunks. Worker j receives chunk j of all
workers and applies the rule to it, and the results are gathered. For any W, each worker sends 2
(W-1)/W times the tree's bytes, as in a ring all-reduce. Rules on a worker's full vector are in
`vectors.py`.

A rule applies to the values of the n workers present, each counted once regardless of its weight.
The rule's result is multiplied by the mean weight over all W workers, which is one if weights are
normalized over the workers present. If no worker is present, the value is zero.
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
  """Applies a robust rule to the values of the workers present.

  Subclasses define the worker axes and the rule on a worker's chunks.
  """

  axis: ClassVar[Any] = WORKER_AXES
  adds = Trait.SELECTS | Trait.DENSE

  @required
  def of_chunks(self, everyone: Tree, roll: Roll | None) -> Tree:
    """Applies the rule to this worker's chunk.

    Args:
      everyone: chunks of all W workers, leaves [W, ...] of float32 or wider.
      roll: the workers present; None means all.

    Returns:
      The chunk's value, leaves [...].
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
    """Returns the number of values, out of n, to drop at either end."""
    ...

  def of_chunks(self, everyone, roll):
    return jax.tree.map(lambda x: middle(x, self.trim, roll), everyone)


class Median(Trimmed, name="median"):
  """Computes the coordinate-wise median over workers, or the mean of the middle two values.

      value_k = med{x_i_k : i present}

  NaN sorts as the largest value. While fewer than half of the workers are faulty, each coordinate
  is within the range of the honest workers' values.

  Args:
    axis: the worker axes.

  Reference: Yin et al. 2018, arXiv 1803.01498, algorithm 1, option I.
  """

  axis: collectives.Axes = WORKER_AXES

  def trim(self, count):
    return around_middle(count)


median = Median


class TrimmedMean(Trimmed, name="trimmed_mean"):
  """Computes the coordinate-wise mean without a fraction of the smallest and largest values.

      value_k = 1/(n - 2b) sum_{r=b+1}^{n-b} x_(r)_k,   b = floor(beta n),   x_(1)_k <= x_(2)_k ...

  NaN sorts as the largest value. While at most b workers are faulty, each coordinate is within the
  range of the honest workers' values.

  Args:
    fraction: beta, the fraction of workers to drop at either end, in [0, 0.5); interpreted as a
      decimal, so that 0.29 of 100 workers is 29.
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
  """Returns the number of values that the median drops at either end.

  Args:
    count: number of values.
  """
  return (count - 1) // 2


def middle(x: Array, trim: Callable[[int], int], roll: Roll | None) -> Array:
  """Averages over the n workers present, without the trim(n) smallest and largest values.

  Args:
    x: values of all workers [W, ...], float32 or wider.
    trim: n -> number of values to drop at either end.
    roll: the workers present; None means all.

  Returns:
    The mean [...].
  """
  count = x.shape[0]
  if roll is None:
    return jnp.mean(jnp.sort(x, 0)[trim(count) : count - trim(count)], 0)  # sort puts NaN last
  ends = jnp.asarray([trim(n) if n else 0 for n in range(count + 1)])[roll.count]
  column = lambda row: row.reshape(-1, *[1] * (x.ndim - 1))
  ordered = jnp.sort(jnp.where(column(roll.present) & ~jnp.isnan(x), x, jnp.inf), 0)
  place = column(jnp.arange(count))
  inside = jnp.where((place >= ends) & (place < roll.count - ends), ordered, 0)
  return jnp.sum(inside, 0) / jnp.maximum(roll.count - 2 * ends, 1)


def scaled(value: Tree, roll: Roll | None) -> Tree:
  """Multiplies a rule's result by the workers' mean weight.

  Args:
    value: the rule's result.
    roll: the workers present; None means all, with weights one.
  """
  return value if roll is None else jax.tree.map(lambda x: roll.scale.astype(x.dtype) * x, value)


def exchanged(tree: Tree, axis: collectives.Axes) -> Tree:
  """Sends chunk j of this worker's leaves to worker j and receives its own chunk from all workers.

  The chunks are sent in their own dtype; the last one is padded with zeros.

  Args:
    tree: this worker's values.
    axis: the worker axes.

  Returns:
    This worker's chunk from all workers: leaves [W, chunk] of float32 or wider.
  """
  count = collectives.worker_count(axis)
  chunks = collectives.exchange(jax.tree.map(lambda x: cut(x, count), tree), axis)
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), chunks)


def restored(chunk: Tree, like: Tree, axis: collectives.Axes) -> Tree:
  """Gathers the workers' chunks into full leaves; the inverse of `exchanged` for one chunk.

  Args:
    chunk: this worker's chunk of the result, leaves [...].
    like: a tree with the shapes and dtypes of the full leaves.
    axis: the worker axes.

  Returns:
    The full leaves, equal on all workers.
  """
  one = lambda c, x: joined(collectives.gather(c.astype(x.dtype), axis), x)
  return jax.tree.map(one, chunk, like)
