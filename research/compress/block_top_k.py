"""Block top-k: the largest elements of each block, with short positions and 2-bit values."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from research.compress.blocks import flatten, restore, to_blocks
from research.compress.packing import pack, unpack
from research.compress.selection import put
from research.compress.sparsify import position_bits
from research.compress.statistical import binned, looked_up
from research.core import checks
from research.core.base import Array, Compressor


class Picked(NamedTuple):
  places: Array  # uint8, packed: the position of each value in its block
  codes: Array  # uint8, packed
  table: Array  # float32 [1, 2^bits], the value of each code


class BlockTopK(Compressor, name="block_top_k"):
  """Sends the k largest elements of each block: k (log2 block + bits) / 8 bytes, and a table.

      C(x)_block = Q(S_k(x_block)),   Q = the statistical quantizer of all sent elements

  S_k keeps the k elements of largest magnitude in a block of consecutive elements; ties go to the
  first elements. With the default values, a block of 4096 elements takes 112 bytes, and a leaf 16
  bytes for the table: 1/146 of float32. A leaf is split into ceil(n / block) blocks of nearly equal
  size, and a smaller block sends proportionally fewer elements. C is contractive: ||C(x) - x||^2 <=
  (1 - (k / block) / (3 sqrt(m))) ||x||^2 if m elements are sent. A non-finite element makes the
  leaf non-finite.

  Args:
    k: the number of elements to send from a full block.
    block: the maximum number of elements in a block.
    bits: the number of bits per value, in [2, 8].

  Raises:
    ValueError: if block < 1, k is not in [1, block] or bits is not in [2, 8].

  Reference: Sarfi et al. 2025, arXiv:2508.15706 (SparseLoCo), section 3. In the paper, the blocks
    of a matrix are tiles of 64 x 64.
  """

  k: int = 64
  block: int = 4096
  bits: int = 2
  sparse = True

  def check(self):
    checks.at_least("block", self.block)
    if not 1 <= self.k <= self.block:
      raise ValueError(f"k={self.k} is not in [1, block] = [1, {self.block}]")
    checks.in_range("bits", self.bits, "[2, 8]")

  def encode(self, x, shared, own):
    del shared, own
    width, k = self._of_block(x.size)
    blocks = to_blocks(flatten(x), width)
    _, positions = lax.top_k(jnp.abs(blocks), k)
    values = jnp.take_along_axis(blocks, positions, axis=1, mode="promise_in_bounds")
    codes, table = binned(to_blocks(values.reshape(-1), None), self.bits)
    places = pack(positions.astype(jnp.uint32).reshape(-1), position_bits(width))
    return Picked(places, pack(codes.reshape(-1), self.bits), table)

  def decode(self, payload, like, shared):
    del shared
    width, k = self._of_block(like.size)
    blocks = -(-like.size // width)
    codes = unpack(payload.codes, self.bits, blocks * k)
    values = looked_up(payload.table, codes.reshape(len(payload.table), blocks * k))
    places = unpack(payload.places, position_bits(width), blocks * k).astype(jnp.uint32)
    starts = jnp.arange(blocks, dtype=jnp.uint32) * jnp.uint32(width)
    positions = places + jnp.repeat(starts, k)
    return restore(put(values.reshape(-1), positions, blocks * width), like)

  def _of_block(self, size: int) -> tuple[int, int]:
    """Returns the number of elements in each block of a leaf, and the number of sent elements."""
    width = -(-size // max(1, -(-size // self.block))) or 1
    return width, max(1, round(self.k * width / self.block))


block_top_k = BlockTopK
