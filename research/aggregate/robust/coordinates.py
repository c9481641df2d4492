"""Robust averages, coordinate by coordinate: what most workers send, whatever the others do.

Nobody needs all of what W workers have. Each leaf is cut in W chunks, worker j receives chunk j of
everyone and applies the rule to it, and all gather the results: 2 (W-1)/W times the tree's bytes
per worker at any W, as much as a ring all-reduce. `robust_vectors.py` has the rules that look at a
worker's whole vector.

A rule is over the values of the n workers present, each counted once, whatever it weighs, and its
result is multiplied by the mean weight over all W: one where weights are relative to those present.
In a round in which nobody is, the value is zero.
"""

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp

from research.aggregate.chunks import cut, joined
from research.aggregate.presence import Roll, call_roll
from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Tree

TRAITS = frozenset({"selects", "dense"})


def median(axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The median over workers of each coordinate; of an even number, the mean of the middle two.

      value_k = med{x_i_k : i present}

  A value that is not a number counts as the largest. While fewer than half of the workers are
  faulty, each coordinate lies within the range of the honest workers' ones.

  Args:
    axis: the worker axes.

  Reference: Yin et al. 2018, arXiv 1803.01498, algorithm 1, option I.
  """
  return _coordinatewise(lambda count: (count - 1) // 2, axis)


def trimmed_mean(fraction: float, axis: collectives.Axes = WORKER_AXES) -> Aggregator:
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
  if not 0 <= fraction < 0.5:
    raise ValueError(f"fraction={fraction} is not in [0, 0.5)")
  return _coordinatewise(lambda count: int(Fraction(str(fraction)) * count), axis)


def _coordinatewise(trim: Callable[[int], int], axis: collectives.Axes) -> Aggregator:
  """The mean of what is left after leaving out trim(n) values of each coordinate at either end."""

  def aggregate(tree, state, key, presence=EVERYONE):
    del key
    everyone, roll = exchanged(tree, axis), call_roll(presence, axis)
    chunk = jax.tree.map(lambda x: middle(x, trim, roll), everyone)
    return Aggregate(restored(scaled(chunk, roll), tree, axis), tree, state)

  return Aggregator(lambda params: (), aggregate, TRAITS)


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
