"""The order in which a worker's examples are drawn: epochs, as a pure function of step and key."""

import jax
import jax.numpy as jnp

from research.base import Array, Key, Tree

ROUNDS = 20
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio; spreads the rounds over the range of a word


def epoch_sample(size: Array | int, step: Array | int, key: Key, *, batch_size: int) -> Array:
  """Draws one batch without replacement, epoch by epoch, and keeps no state.

  With m = max(1, size // batch_size) batches in an epoch, step t is in epoch t // m, at positions
  (t mod m) batch_size + i. The index at a position is a pseudo-random permutation of range(size)
  there, keyed by (key, epoch): nothing is sorted or stored, so any step of any worker costs the
  same. Where batch_size does not divide size, each epoch leaves size mod batch_size examples out,
  other ones each time; where batch_size > size, a batch goes round the examples.

  Args:
    size: examples that the worker has, an int32 scalar in [1, 2^31), traced or not.
    step: the worker's step, an int32 scalar >= 0, traced or not.
    key: typed key of the worker's order.
    batch_size: examples in one batch, static.

  Returns:
    int32 [batch_size], indices in [0, size).
  """
  size, step = jnp.asarray(size, jnp.int32), jnp.asarray(step, jnp.int32)
  batches = jnp.maximum(1, size // batch_size)
  position = (step % batches) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
  return permute(position % size, size, jax.random.fold_in(key, step // batches))


def permute(position: Array, size: Array, key: Key) -> Array:
  """The image of `position` under a pseudo-random permutation of range(size), for any size.

  The swap-or-not shuffle: round i pairs each x with x' = K_i - x mod size and swaps the pair if a
  pseudo-random bit of max(x, x') says so. Each round is an involution of range(size), whatever the
  bits are, so the whole is a bijection: exact for every size, without a loop that walks back into
  range, and a fixed dozen of operations a round.

  It is no cipher. One element stays unmoved by all rounds, and two keep their distance, with
  probability 2^-ROUNDS, about 1e-6; beyond that, positions and pairs of positions pass chi-square
  tests as uniform. The 64 bits of key reach a vanishing part of the size! permutations.

  Args:
    position: int32 of any shape, in [0, size).
    size: int32 scalar in [1, 2^31).
    key: typed key.

  Returns:
    int32 of the shape of `position`, in [0, size).

  Reference:
    Hoang, Morris, Rogaway, 2012, arXiv:1208.1176, figure 1; the bit is a multiplicative hash here.
  """
  word, offset = jax.random.bits(key, (2,), jnp.uint32)
  keys = _mix(word + jnp.arange(1, ROUNDS + 1, dtype=jnp.uint32) * jnp.uint32(_GOLDEN))
  centers = ((keys ^ offset) % size.astype(jnp.uint32)).astype(jnp.int32)
  x = position
  for i in range(ROUNDS):
    mirrored = centers[i] - x
    mirrored = jnp.where(mirrored < 0, mirrored + size, mirrored)
    bits = _bits(jnp.maximum(x, mirrored).astype(jnp.uint32) + keys[i])
    x = jnp.where(bits >> 31, mirrored, x)
  return x


def take(examples: Tree, index: Array) -> Tree:
  """The examples at `index`: each leaf [examples, ...] becomes [*index.shape, ...]."""
  return jax.tree.map(lambda x: x[index], examples)


def _bits(x: Array) -> Array:
  """uint32 to uint32; the upper bits depend on all of x."""
  x = x * jnp.uint32(0x7FEB352D)
  return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)


def _mix(x: Array) -> Array:
  """A bijection of uint32 whose every bit depends on all of x."""
  x = _bits(x ^ (x >> 16))
  return x ^ (x >> 16)
