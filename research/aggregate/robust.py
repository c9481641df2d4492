"""Robust averages, coordinate by coordinate: what most workers send, whatever the others do.

Nobody needs all of what W workers have. Each leaf is cut in W chunks, worker j receives chunk j of
everyone and applies the rule to it, and all gather the results: 2 (W-1)/W times the tree's bytes
per worker at any W, as much as a ring all-reduce. `robust_vectors.py` has the rules that look at a
worker's whole vector.
"""

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp

from research.aggregate.chunks import cut, joined
from research.base import WORKER_AXES, Aggregate, Aggregator, Array, Tree
from research.comm import collectives

TRAITS = frozenset({"selects", "dense"})


def median(axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The median over workers of each coordinate; of an even number, the mean of the middle two.

      value_k = med{x_i_k : i in [W]}

  A value that is not a number counts as the largest. While fewer than half of the workers are
  faulty, each coordinate lies within the range of the honest workers' ones.

  Args:
    axis: the worker axes.

  Reference: Yin et al. 2018, arXiv 1803.01498, algorithm 1, option I.
  """
  return _coordinatewise(lambda count: (count - 1) // 2, axis)


def trimmed_mean(fraction: float, axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The mean of each coordinate without its smallest and its largest values.

      value_k = 1/(W - 2b) sum_{r=b+1}^{W-b} x_(r)_k,   b = floor(beta W),   x_(1)_k <= x_(2)_k ...

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
  """The mean of what is left after leaving out trim(W) values of each coordinate at either end."""

  def aggregate(tree, state, key):
    del key
    everyone = exchanged(tree, axis)
    ends = trim(collectives.worker_count(axis))
    chunk = jax.tree.map(lambda x: middle(x, ends), everyone)
    return Aggregate(restored(chunk, tree, axis), tree, state)

  return Aggregator(lambda params: (), aggregate, TRAITS)


def middle(x: Array, ends: int) -> Array:
  """The mean over workers of [W, ...] without the `ends` least and greatest; sort puts NaN last."""
  return jnp.mean(jnp.sort(x, 0)[ends : x.shape[0] - ends], 0)


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
