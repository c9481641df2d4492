"""Robust averages, coordinate by coordinate: statistics that a minority of workers cannot move far.

Nobody needs all of what W workers have. Each leaf is cut in W chunks, worker j receives chunk j of
everyone and applies the rule to it, and all gather the results: 2 (W-1)/W times the tree's bytes
per worker at any W, as much as a ring all-reduce. `vectors.py` has the rules that look at a
worker's whole vector.

A rule is over the values of the n workers present, each counted once, whatever it weighs, and its
result is multiplied by the mean weight over all W: one where weights are relative to those present.
In a round in which nobody is, the value is zero.
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


class Robust(Aggregator):
  """A rule over the values of the workers present.

  Subclasses define the worker axes, and the rule on the chunks that a worker holds.
  """

  axis: ClassVar[Any] = WORKER_AXES
  adds = Trait.SELECTS | Trait.DENSE

  def of_chunks(self, everyone: Tree, roll: Roll | None) -> Tree:
    """The value of this worker's chunk.

    Args:
      everyone: chunks of all W workers, leaves [W, ...] of float32 or wider.
      roll: who is present; None: all.
    """
    raise NotImplementedError(f"{type(self).__name__} has no of_chunks")

  def aggregate(self, tree, state, key, presence=EVERYONE):
    del key
    everyone, roll = exchanged(tree, self.axis), call_roll(presence, self.axis)
    chunk = self.of_chunks(everyone, roll)
    return Aggregate(restored(scaled(chunk, roll), tree, self.axis), tree, state)


class Trimmed(Robust):
  """The mean of each coordinate without a number of its smallest and largest values."""

  def trim(self, count: int) -> int:
    """How many of n values are left out at either end."""
    raise NotImplementedError(f"{type(self).__name__} has no trim")

  def of_chunks(self, everyone, roll):
    return jax.tree.map(lambda x: middle(x, self.trim, roll), everyone)


class Median(Trimmed, name="median"):
  """The median over workers of each coordinate; of an even number, the mean of the middle two.

      value_k = med{x_i_k : i present}

  A value that is not a number counts as the largest. While fewer than half of the workers are
  faulty, each coordinate lies within the range of the honest workers' ones.

  Args:
    axis: the worker axes.

  Reference: Yin et al. 2018, arXiv 1803.01498, algorithm 1, option I.
  """

  axis: collectives.Axes = WORKER_AXES

  def trim(self, count):
    return around_middle(count)


median = Median


class TrimmedMean(Trimmed, name="trimmed_mean"):
  """The mean of each coordinate without its smallest and its largest values.

      value_k = 1/(n - 2b) sum_{r=b+1}^{n-b} x_(r)_k,   b = floor(beta n),   x_(1)_k <= x_(2)_k ...

  A value that is not a number counts as the largest. While at most b workers are faulty, each
  coordinate lies within the range of the honest workers' ones.

  Args:
    fraction: beta, of the workers to leave out at either end, in [0, 0.5); as the decimal that is
      written, so that 0.29 of 100 workers are 29.
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
  """How many of n values are left out at either end of their median."""
  return (count - 1) // 2


def middle(x: Array, trim: Callable[[int], int], roll: Roll | None) -> Array:
  """The mean over the n workers present of [W, ...] without the trim(n) least and greatest."""
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
  """A rule's result, times the workers' mean weight."""
  return value if roll is None else jax.tree.map(lambda x: roll.scale.astype(x.dtype) * x, value)


def exchanged(tree: Tree, axis: collectives.Axes) -> Tree:
  """This worker's chunk of what everyone has: leaves [W, chunk] of float32 or wider.

  They travel in their own dtype. What pads the last chunk is zero.
  """
  count = collectives.worker_count(axis)
  chunks = collectives.exchange(jax.tree.map(lambda x: cut(x, count), tree), axis)
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), chunks)


def restored(chunk: Tree, like: Tree, axis: collectives.Axes) -> Tree:
  """The leaves of which each worker has a chunk, equal on all of them."""
  one = lambda c, x: joined(collectives.gather(c.astype(x.dtype), axis), x)
  return jax.tree.map(one, chunk, like)
