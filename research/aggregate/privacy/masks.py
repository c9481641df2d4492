"""Computes pseudo-random masks for secure aggregation: self masks, and pair masks that cancel."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core.base import Array, Tree

LIMBS = 4  # number of field elements in the seed of a mask, 64 bits in total
_MINUS_ONE = np.uint32(2**32 - 1)


def expand(seed: Array, like: Tree) -> Tree:
  """Expands a seed into a mask that is uniform in Z_{2^32}; papers call this function PRG.

  Args:
    seed: the seed, integers [LIMBS].
    like: a tree with the structure and shapes of the mask.

  Returns:
    The mask, a uint32 tree.
  """
  limbs = seed.astype(jnp.uint32).reshape(2, LIMBS // 2)
  key = jax.random.wrap_key_data(limbs[:, 0] * 2**16 + limbs[:, 1], impl="threefry2x32")
  leaves, treedef = jax.tree.flatten(like)
  bits = lambda leaf, x: jax.random.bits(jax.random.fold_in(key, leaf), x.shape, jnp.uint32)
  return treedef.unflatten([bits(leaf, x) for leaf, x in enumerate(leaves)])


def mask(seeds: Array, worker: Array | int, like: Tree) -> Tree:
  """Computes the total mask of worker i: PRG(b_i) + sum_{j>i} PRG(s_ij) - sum_{j<i} PRG(s_ij).

  Args:
    seeds: the seeds [W, LIMBS] of worker i, with s_ij in row j and b_i in row i.
    worker: i, the index of the worker.
    like: a tree with the structure and shapes of the masked values.

  Returns:
    The mask, a uint32 tree.
  """
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint32), like)
  return _add_masks(nothing, seeds, _signs(worker, jnp.arange(len(seeds), dtype=jnp.int32)))


def unmask(total: Tree, seeds: Array, alive: Array) -> Tree:
  """Removes the masks from the sum of the senders' masked messages.

  Args:
    total: the masked sum, a uint32 tree.
    seeds: the reconstructed seeds [W, W, LIMBS]: in row i, b_i in column i if worker i sent, else
      s_ij in the columns j.
    alive: a mask [W], True for the workers that sent.

  Returns:
    The sum of the senders' ring values, a uint32 tree.
  """
  owner, peer = jnp.indices((len(alive), len(alive)), jnp.int32)
  left_over = ~alive[:, None] & alive[None, :]
  signs = jnp.where(left_over, _signs(owner, peer), 0)
  signs = jnp.where((owner == peer) & alive[None], _MINUS_ONE, signs)
  return _add_masks(total, seeds.reshape(-1, LIMBS), signs.reshape(-1))


def _signs(worker: Array | int, peer: Array) -> Array:
  """Returns the sign, in Z_{2^32}, with which a worker adds the mask of a pair."""
  return jnp.where(peer < worker, _MINUS_ONE, np.uint32(1))


def _add_masks(total: Tree, seeds: Array, signs: Array) -> Tree:
  """Computes total + sum_k signs_k PRG(seeds_k), one mask at a time; zero signs cost nothing."""

  def add(total, seed, sign):
    return jax.tree.map(lambda t, m: t + sign * m, total, expand(seed, total))

  def one(total, pair):
    seed, sign = pair
    return lax.cond(sign != 0, add, lambda total, *_: total, total, seed, sign), None

  return lax.scan(one, total, (seeds, signs))[0]
