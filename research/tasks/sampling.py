"""Computes the order in which a worker draws its examples, as a pure function of step and key."""

import jax
import jax.numpy as jnp
from jax import lax

from research.core.base import Array, Key, Tree
from research.core.task import Batch

ROUNDS = 16
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: spreads consecutive rounds over all words


def epoch_sample(size: Array | int, step: Array | int, key: Key, *, batch_size: int) -> Array:
  """Draws one batch, without replacement in each epoch; the function has no state.

  With m = max(1, size // batch_size) batches in an epoch, step t is in epoch t // m, at positions
  (t mod m) batch_size + i. A pseudo-random permutation of range(size), keyed by (key, epoch), maps
  positions to examples. Nothing is sorted or stored, so all steps of all workers cost the same. If
  batch_size does not divide size, each epoch leaves out size mod batch_size examples, which differ
  from epoch to epoch. If batch_size > size, a batch cycles through the examples.

  Args:
    size: the number of the worker's examples, an int32 scalar in [1, 2^31), traced or not.
    step: the worker's step, an int32 scalar in [0, 2^31), traced or not.
    key: the typed key that determines the worker's order.
    batch_size: the number of examples in a batch, static.

  Returns:
    The indices of the examples, int32 [batch_size], in [0, size).
  """
  size, step = jnp.asarray(size, jnp.int32), jnp.asarray(step, jnp.int32)
  batches = jnp.maximum(1, size // batch_size)
  position = (step % batches) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
  word, offset = jax.random.bits(key, (2,), jnp.uint32)
  epoch = (step // batches).astype(jnp.uint32)
  return permute(position % size, size, _mix(word + epoch), offset)


def with_replacement(size: Array | int, step: Array | int, key: Key, *, batch_size: int) -> Array:
  """Draws each example of a batch independently and uniformly, as theory usually assumes.

  Args:
    size: the number of the worker's examples, an int32 scalar in [1, 2^31), traced or not.
    step: the worker's step, an int32 scalar in [0, 2^31), traced or not.
    key: the typed key of the worker's draws.
    batch_size: the number of examples in a batch, static.

  Returns:
    The indices of the examples, int32 [batch_size], in [0, size).
  """
  return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, size, jnp.int32)


def in_order(size: Array | int, step: Array | int, key: Key, *, batch_size: int) -> Array:
  """Draws consecutive batches cyclically, for a buffer that is refilled while it is used.

  Args:
    size: the number of the worker's examples, a multiple of batch_size.
    step: the worker's step, an int32 scalar in [0, 2^31), traced or not.
    key: unused.
    batch_size: the number of examples in a batch, static.

  Returns:
    The indices of the examples, int32 [batch_size]: at step t, they start at (t batch_size) mod
    size.
  """
  del key
  batches = jnp.maximum(1, jnp.asarray(size, jnp.int32) // batch_size)
  return jnp.asarray(step, jnp.int32) % batches * batch_size + jnp.arange(batch_size)


def permute(position: Array, size: Array, word: Array, offset: Array) -> Array:
  """Applies a pseudo-random permutation of range(size), for any size.

  This is the swap-or-not shuffle: round i pairs each x with x' = K_i - x mod size, and swaps the
  pair if a pseudo-random bit of max(x, x') is set. Each round is an involution of range(size),
  whatever the bits are, so the result is a bijection for every size. The shuffle needs no cycle
  walking from a power of two, and all lanes of a vmap perform the same few operations.

  The permutation is not a cipher. With probability 2^-ROUNDS, a position has not moved after all
  rounds, or two neighbours have kept their distance. Otherwise, positions and pairs of positions
  pass chi-square tests for uniformity. For a large `size`, the 64-bit key reaches only a tiny
  fraction of the permutations.

  Args:
    position: the positions, int32 of any shape, in [0, size).
    size: the number of positions, an int32 scalar in [1, 2^31).
    word: a uint32 scalar; `word` and `offset` together are the 64-bit key.
    offset: a uint32 scalar.

  Returns:
    The permuted positions, int32 of the shape of `position`, in [0, size).

  Reference:
    Hoang, Morris, Rogaway, 2012, arXiv:1208.1176. Here, the bit is a multiplicative hash instead of
    a cryptographic one, and the keys of the rounds are hashes of one 64-bit key.
  """
  size = size.astype(jnp.uint32)

  def shuffle(i: Array, x: Array) -> Array:
    round_key = _mix(word + jnp.asarray(i, jnp.uint32) * jnp.uint32(_GOLDEN))
    center = _scale(round_key ^ offset, size)
    partner = jnp.where(x > center, center + size - x, center - x)
    swap = _multiply(jnp.maximum(x, partner) + round_key) >> 31 == 1
    return jnp.where(swap, partner, x)

  return lax.fori_loop(0, ROUNDS, shuffle, position.astype(jnp.uint32)).astype(jnp.int32)


def take(examples: Tree, index: Array) -> Tree:
  """Gathers the examples at the given indices.

  Args:
    examples: the examples, with leaves [examples, ...].
    index: the indices, integers of any shape.

  Returns:
    The gathered examples, with leaves [*index.shape, ...].
  """
  return jax.tree.map(lambda x: x[index], examples)


def _multiply(x: Array) -> Array:
  """Hashes uint32 to uint32; the upper bits of the result depend on all bits of x."""
  x = x * jnp.uint32(0x7FEB352D)
  return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)


def _mix(x: Array) -> Array:
  """Applies a bijection of uint32; every bit of the result depends on all bits of x."""
  x = _multiply(x ^ (x >> 16))
  return x ^ (x >> 16)


def _scale(word: Array, size: Array) -> Array:
  """Computes floor(word size / 2^32) from 16-bit halves; uniform words give uniform results."""
  low, high = word & 0xFFFF, word >> 16
  size_low, size_high = size & 0xFFFF, size >> 16
  middle = high * size_low + (low * size_low >> 16)
  return high * size_high + (middle >> 16) + ((middle & 0xFFFF) + low * size_high >> 16)


def mean(values: Array, batch: Batch) -> Array:
  """Averages values over the examples that the batch's mask keeps, if it has one.

  Args:
    values: the values [b], one per example.
    batch: the batch, with or without a mask.
  """
  if "mask" not in batch:
    return jnp.mean(values)
  mask = batch["mask"].astype(values.dtype)
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)
