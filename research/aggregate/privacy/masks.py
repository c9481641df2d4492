"""Masks that cancel in a sum: pairwise and of one's own, as streams of pseudo-random words."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core.base import Array, Tree

LIMBS = 4  # field elements in the seed of a mask: 64 bits
_MINUS_ONE = np.uint32(2**32 - 1)


def expand(seed: Array, like: Tree) -> Tree:
  """PRG: a mask of the tree's shapes, uniform in Z_{2^32}, from a seed [LIMBS]."""
  limbs = seed.astype(jnp.uint32).reshape(2, LIMBS // 2)
  key = jax.random.wrap_key_data(limbs[:, 0] * 2**16 + limbs[:, 1], impl="threefry2x32")
  leaves, treedef = jax.tree.flatten(like)
  bits = lambda leaf, x: jax.random.bits(jax.random.fold_in(key, leaf), x.shape, jnp.uint32)
  return treedef.unflatten([bits(leaf, x) for leaf, x in enumerate(leaves)])


def mask(seeds: Array, worker: Array | int, like: Tree) -> Tree:
  """All that hides worker i: PRG(b_i) + sum_{j>i} PRG(s_ij) - sum_{j<i} PRG(s_ij).

  Args:
    seeds: [W, LIMBS], s_ij in row j and b_i in row i.
    worker: i.
    like: a tree of the shapes that are masked.
  """
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint32), like)
  return _add_masks(nothing, seeds, _signs(worker, jnp.arange(len(seeds), dtype=jnp.int32)))


def unmask(total: Tree, seeds: Array, alive: Array) -> Tree:
  """The sum of the ring values of those who sent, from the sum of their masked messages.

  Args:
    total: uint32.
    seeds: [W, W, LIMBS]: b_i in row i and column i where i sent, s_ij where i did not.
    alive: bool [W], who sent.
  """
  owner, peer = jnp.indices((len(alive), len(alive)), jnp.int32)
  left_over = ~alive[:, None] & alive[None, :]
  signs = jnp.where(left_over, _signs(owner, peer), 0)
  signs = jnp.where((owner == peer) & alive[None], _MINUS_ONE, signs)
  return _add_masks(total, seeds.reshape(-1, LIMBS), signs.reshape(-1))


def _signs(worker: Array | int, peer: Array) -> Array:
  """With which sign a worker adds the mask of a pair, in Z_{2^32}."""
  return jnp.where(peer < worker, _MINUS_ONE, np.uint32(1))


def _add_masks(total: Tree, seeds: Array, signs: Array) -> Tree:
  """total + sum_k signs_k PRG(seeds_k), one at a time; a sign of zero costs nothing."""

  def add(total, seed, sign):
    return jax.tree.map(lambda t, m: t + sign * m, total, expand(seed, total))

  def one(total, pair):
    seed, sign = pair
    return lax.cond(sign != 0, add, lambda total, *_: total, total, seed, sign), None

  return lax.scan(one, total, (seeds, signs))[0]
