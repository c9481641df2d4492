"""Sparsification: sends a few elements exactly; the others become zero."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.compress.blocks import flatten, fold, restore
from research.compress.packing import pack, unpack
from research.compress.selection import count, grid, largest, put, take
from research.core import checks
from research.core.base import Array, Compressor, Key


class Sparse(NamedTuple):
  values: Array  # [k], the leaf's dtype
  positions: Array  # uint8, packed


class Thresholded(NamedTuple):
  values: Array  # [room], the leaf's dtype; zero where nothing is sent
  positions: Array  # uint8, packed
  reached: Array  # uint32 [], number of elements at or above the threshold, sent or not


class TopK(Compressor, name="top_k"):
  """Sends the k elements of largest magnitude: k (itemsize + ceil(log2 n) / 8) bytes.

      C(x)_i = x_i if |x_i| is among the k largest, else 0,   k = max(1, round(fraction n))

  C is contractive: ||C(x) - x||^2 <= (1 - k / n) ||x||^2. The selection is exact; ties go to the
  first elements, and NaN is larger than everything. A position takes ceil(log2 n) bits.

  Args:
    fraction: the fraction of the elements to send, in (0, 1].

  Raises:
    ValueError: if fraction is not in (0, 1].

  Reference: Stich et al. 2018, arXiv:1809.07599, section 2; Aji and Heafield 2017,
    arXiv:1704.05021.
  """

  fraction: float
  sparse = True

  def check(self):
    checks.in_range("fraction", self.fraction, "(0, 1]")

  def encode(self, x, shared, own):
    del shared, own
    flat = flatten(x)
    positions = largest(flat, kept(self.fraction, x.size))
    return Sparse(take(flat, positions), pack(positions, position_bits(x.size)))

  def decode(self, payload, like, shared):
    del shared
    return _scatter(payload, like)


top_k = TopK


class Threshold(Compressor, name="threshold"):
  """Sends elements with magnitude >= `value`: room (itemsize + ceil(log2 n) / 8) + 4 bytes.

      C(x)_i = x_i if |x_i| >= value, else 0

  Shapes are static, so the payload always has room = capacity n entries. If more elements reach the
  threshold, the largest are sent; `reached` in the payload counts all elements that reached it. The
  compressor is not unbiased and has no constant contraction factor: if no element reaches the
  threshold, nothing is sent. An element's error is at most `value` if the payload has room. In
  either case, ||C(x) - x|| <= ||x||.

  Args:
    value: the threshold, in units of x.
    capacity: the size of the payload as a fraction of the elements, in (0, 1].

  Raises:
    ValueError: if value is not above 0 or capacity is not in (0, 1].

  Reference: Strom 2015 (Interspeech); Sahu et al. 2021, arXiv:2108.00951, section 3 (hard
    threshold).
  """

  value: float
  capacity: float = 0.05
  sparse = True

  def check(self):
    checks.in_range("value", self.value, "(0, inf)")
    checks.in_range("capacity", self.capacity, "(0, 1]")

  def encode(self, x, shared, own):
    del shared, own
    flat = flatten(x)
    below = lambda x: jnp.abs(x) < self.value  # False for NaN, so NaN is sent
    positions = largest(flat, kept(self.capacity, x.size))
    values = take(flat, positions)
    values = jnp.where(below(values), 0, values)
    return Thresholded(values, pack(positions, position_bits(x.size)), count(~below(flat)))

  def decode(self, payload, like, shared):
    del shared
    return _scatter(payload, like)


threshold = Threshold


class RandomK(Compressor, name="random_k"):
  """Sends k elements at random positions that are equal on all workers: k itemsize bytes.

      C(x)_i = x_i if i is in the support S(shared), else 0,   P(i in S) = k / n

  C is linear and contractive: E ||C(x) - x||^2 = (1 - k / n) ||x||^2, as error feedback requires.
  With a factor of n / k, the memory of error feedback would grow. `unbiased` applies this factor,
  so that E C(x) = x and E ||C(x) - x||^2 = (n / k - 1) ||x||^2; use it without error feedback, or
  for DIANA. `decode` draws the support again, so the support is not sent. The support has one
  position in each of k equal segments of the leaf, all rotated by one random shift. The paper's
  uniform k-subsets have the same P(i in S), but require a permutation of the leaf. Any non-finite
  element makes the payload NaN, even outside the support.

  Args:
    fraction: the fraction of the elements to send, in (0, 1]; k = max(1, round(fraction n)).
    unbiased: whether to multiply by n / k.

  Raises:
    ValueError: if fraction is not in (0, 1].

  Reference: Stich et al. 2018, arXiv:1809.07599, section 2; unbiased: Wangni et al. 2017,
    arXiv:1710.09854.
  """

  fraction: float
  unbiased: bool = False
  linear = True
  sparse = True

  def check(self):
    checks.in_range("fraction", self.fraction, "(0, 1]")

  @property
  def contractive(self):
    return not self.unbiased

  def encode(self, x, shared, own):
    del own
    flat = flatten(x)
    k = kept(self.fraction, x.size)
    values = take(flat, support(shared, x.size, k))
    values = values * (x.size / k) if self.unbiased and k else values
    return jnp.where(fold(jnp.all, jnp.isfinite, flat[None]), values, jnp.nan)

  def decode(self, payload, like, shared):
    positions = support(shared, like.size, payload.size)
    return restore(put(payload, positions, like.size), like)


random_k = RandomK


def kept(fraction: float, size: int) -> int:
  """Returns k: fraction * size, rounded to an integer and at least 1 for a nonempty leaf.

  Args:
    fraction: the fraction of the elements to send, in (0, 1].
    size: n, number of elements of the leaf.

  Raises:
    ValueError: if positions in the leaf do not fit in 32 bits.
  """
  grid(size)  # rejects a leaf that is too large
  return min(size, max(1, round(fraction * size)))


def position_bits(size: int) -> int:
  """Returns the number of bits of a position in a leaf.

  Args:
    size: number of elements of the leaf.
  """
  return max(1, (size - 1).bit_length())


def support(key: Key, size: int, k: int) -> Array:
  """Draws k distinct positions in range(size), each position with probability k / size.

  Args:
    key: a typed key, equal on all workers.
    size: n, number of elements of the leaf.
    k: number of positions, static.

  Returns:
    uint32 [k].
  """
  if k == 0:
    return jnp.zeros(0, jnp.uint32)
  within, turn = jax.random.split(key)
  width, wider = map(jnp.uint32, divmod(size, k))  # the first `wider` segments are one longer
  stretch = jnp.arange(k, dtype=jnp.uint32)
  start = stretch * width + jnp.minimum(stretch, wider)
  length = width + (stretch < wider).astype(jnp.uint32)
  position = start + jax.random.randint(within, (k,), 0, length, jnp.uint32)
  shift = jax.random.randint(turn, (), 0, jnp.uint32(size), jnp.uint32)
  room = jnp.uint32(size) - shift  # avoids position + shift, which may exceed 2^32
  return jnp.where(position >= room, position - room, position + shift)


def _scatter(payload: Sparse | Thresholded, like: jax.ShapeDtypeStruct) -> Array:
  positions = unpack(payload.positions, position_bits(like.size), payload.values.size)
  return restore(put(payload.values, positions.astype(jnp.uint32), like.size), like)
