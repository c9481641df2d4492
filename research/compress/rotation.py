"""Random rotation before compression, which spreads every element over a block."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.compress.blocks import flatten, restore, saturated, widened
from research.compress.packing import unpack
from research.core.base import Array, Compressor, Key

RADIX = 64


class Hadamard(Compressor, name="hadamard"):
  """Applies the inner compressor in randomly rotated coordinates, where no element dominates.

      C(x) = D H C_inner(H D x),   H = Walsh-Hadamard / sqrt(b),   D = diag(random signs)

  on blocks of b elements, in O(n log b). H D is orthogonal, so C is contractive, unbiased or linear
  if and only if the inner compressor is. The constants are those of the inner compressor for the
  padded leaf. The typical error is smaller than these worst-case constants, since the largest
  element of a rotated block rarely exceeds sqrt(2 log b) times the root mean square. D is drawn
  from the shared key and not sent. b is the largest power of two up to `block` that pads the leaf
  by at most an eighth. Rotated values are rounded from float32 to the leaf's dtype. A non-finite
  element makes its block non-finite.

  Args:
    inner: the compressor of the rotated leaf [blocks, b].
    block: maximum number of elements that are rotated together, a power of two.

  Raises:
    ValueError: if block is not a power of two.

  Reference: Suresh et al. 2017, arXiv:1611.00429, section 3 (stochastic rotated quantisation).
  """

  inner: Compressor
  block: int = 4096

  def check(self):
    if self.block < 1 or self.block & (self.block - 1):
      raise ValueError(f"block={self.block} is not a power of two")

  @property
  def linear(self):
    return self.inner.linear

  @property
  def contractive(self):
    return self.inner.contractive

  def encode(self, x, shared, own):
    signs_key, inner_key = jax.random.split(shared)
    flat, width = flatten(x), _width(x.size, self.block)
    blocks = widened(jnp.pad(flat, (0, -flat.size % width)))
    blocks = blocks * random_signs(signs_key, blocks.size).astype(blocks.dtype)
    rotated = walsh_hadamard(blocks.reshape(-1, width))
    return self.inner.encode(saturated(rotated, x.dtype), inner_key, own)

  def decode(self, payload, like, shared):
    signs_key, inner_key = jax.random.split(shared)
    width = _width(like.size, self.block)
    rotated = jax.ShapeDtypeStruct((-(-like.size // width), width), like.dtype)
    rotated = self.inner.decode(payload, rotated, inner_key)
    blocks = walsh_hadamard(widened(rotated)).reshape(-1)
    return restore(blocks * random_signs(signs_key, blocks.size).astype(blocks.dtype), like)


hadamard = Hadamard


def walsh_hadamard(blocks: Array) -> Array:
  """Applies the orthonormal Walsh-Hadamard transform to each row; a second call inverts it.

  One factor of H_b = H_64 x ... x H_64 x H_rest is applied at a time, as a product with a 64 x 64
  matrix. The transform then needs few passes over memory and uses any machine's matrix unit.

  Args:
    blocks: [rows, b], b a power of two.

  Returns:
    [rows, b].
  """
  rows, width = blocks.shape
  done = 1
  while done < width:
    side = min(RADIX, width // done)
    index = np.arange(side)
    parity = np.bitwise_count(index[:, None] & index[None, :]) % 2
    factor = jnp.asarray((1 - 2.0 * parity) / math.sqrt(side), blocks.dtype)
    parts = blocks.reshape(rows, width // side, side)
    product = jnp.einsum("raj,ij->rai", parts, factor, precision=lax.Precision.HIGHEST)
    blocks = product.swapaxes(1, 2)  # the next factor's digit of the index comes last
    done *= side
  return blocks.reshape(rows, width)


def random_signs(key: Key, count: int) -> Array:
  """Draws random signs, -1 or 1, int8 [count], from one random bit each.

  Args:
    key: a typed key.
    count: number of signs.
  """
  words = jax.random.bits(key, (-(-count // 32),), jnp.uint32)
  bits = unpack(lax.bitcast_convert_type(words, jnp.uint8).reshape(-1), 1, count)
  return 2 * bits.astype(jnp.int8) - 1


def _width(size: int, block: int) -> int:
  """Returns the largest power of two up to `block` that pads `size` by at most an eighth."""
  while block > 1 and (not size or -size % block > size // 8):
    block //= 2
  return block
