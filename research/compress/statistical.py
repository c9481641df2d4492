"""Statistical quantization: bins based on mean and deviation, decoded as their elements' mean."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from research.compress.blocks import (
  TINY,
  flatten,
  fold,
  invertible,
  largest_magnitude,
  restore,
  to_blocks,
)
from research.compress.packing import pack, unpack
from research.core import checks
from research.core.base import Array, Compressor, platform

_FEW = 16  # number of bins up to which selects decode faster than a gather


class Binned(NamedTuple):
  """Represents x approximately as table[codes]."""

  codes: Array  # uint8, packed
  table: Array  # float32 [blocks, 2^bits], the mean of each bin


class Statistical(Compressor, name="statistical"):
  """Rounds to n = 2^bits bins in six standard deviations: bits / 8 bytes per element, plus a table.

      code = clip(round((x - mu) n / (6 s)) + n / 2, 0, n - 1),   C(x) = mean of the code's bin

  mu and s are the mean and the standard deviation of a block. The table of a block's n bin means is
  sent as float32. Since each code is decoded as the mean of its bin, the error is the variance
  within the bins, and the sum of a block's elements is preserved. C is contractive: ||C(x) - x||^2
  <= (1 - 1 / (3 sqrt(block))) ||x||^2. For Gaussian numbers, the factor is 0.18 with 2 bits, 0.05
  with 3 bits and 0.01 with 4 bits. A non-finite element makes its block NaN.

  Args:
    bits: the number of bits per element, in [2, 8]. With a single bit, nearly all elements would be
      in one bin.
    block: the number of elements that share a table; None for one table per leaf. Zeros that pad
      the last block count as elements.

  Raises:
    ValueError: if bits is not in [2, 8] or block < 1.

  Reference: Sarfi et al. 2025, arXiv:2508.15706 (SparseLoCo, with 2 bits); Thérien et al. 2025,
    arXiv:2505.23725 (MuLoCo).
  """

  bits: int
  block: int | None = None

  def check(self):
    checks.in_range("bits", self.bits, "[2, 8]")
    checks.at_least("block", 1 if self.block is None else self.block)

  def encode(self, x, shared, own):
    del shared, own
    codes, table = binned(to_blocks(flatten(x), self.block), self.bits)
    return Binned(pack(codes.reshape(-1)[: x.size], self.bits), table)

  def decode(self, payload, like, shared):
    del shared
    codes = unpack(payload.codes, self.bits, like.size)
    width = min(self.block or max(like.size, 1), max(like.size, 1))
    codes = jnp.pad(codes, (0, -codes.size % width)).reshape(-1, width)
    return restore(looked_up(payload.table, codes), like)


statistical = Statistical


def binned(blocks: Array, bits: int) -> tuple[Array, Array]:
  """Assigns the elements of each block to bins, and computes the mean of each bin.

  Args:
    blocks: float32 [blocks, width].
    bits: the number of bits per code, in [2, 8].

  Returns:
    The codes, uint8 [blocks, width], and the means, float32 [blocks, 2^bits].
  """
  width, count = blocks.shape[1], 2**bits
  largest = jnp.maximum(largest_magnitude(blocks), TINY)
  down = invertible(largest)
  relative = (blocks * down[:, None]) / (largest * down)[:, None]
  mean = _total(lambda x: x, relative) / float(width)
  centered = relative - mean[:, None]
  deviation = jnp.sqrt(_total(jnp.square, centered) / float(width))
  step = jnp.maximum(6 / count * deviation, TINY)
  places = centered / step[:, None]
  totals, numbers = _by_bin(places, count)
  table = mean[:, None] + step[:, None] * totals / jnp.maximum(numbers, 1)
  codes = jnp.clip(jnp.floor(places + 0.5) + count // 2, 0, count - 1).astype(jnp.uint8)
  return codes, jnp.clip(table, -1, 1) * largest[:, None]


def looked_up(table: Array, codes: Array) -> Array:
  """Looks up each code in the table of the code's block.

  Args:
    table: float32 [blocks, n].
    codes: unsigned integers below n, [blocks, width].

  Returns:
    float32 [blocks, width].
  """
  if table.shape[1] > _FEW:
    return jnp.take_along_axis(table, codes.astype(jnp.int32), axis=1, mode="promise_in_bounds")
  found = jnp.broadcast_to(table[:, :1], codes.shape)
  for code in range(1, table.shape[1]):
    found = jnp.where(codes == code, table[:, code, None], found)
  return found


def _by_bin(places: Array, count: int) -> tuple[Array, Array]:
  """Computes the sum and the number of the elements in each bin, float32 [blocks, count]."""
  inner = np.arange(1 - count // 2, count // 2) - 0.5
  edges = jnp.asarray([-np.inf, *inner, np.inf], jnp.float32)[:, None]

  def of_piece(piece):
    inside = (piece[None] >= edges[:-1]) & (piece[None] < edges[1:])
    total = jnp.sum(jnp.where(inside, piece[None], 0), axis=1)
    return total, jnp.sum(inside.astype(jnp.float32), axis=1)

  pieces, padding = _pieces(places)
  at_once = max(1, _piece() // places.shape[1])
  totals, numbers = (_joined(x, places) for x in lax.map(of_piece, pieces, batch_size=at_once))
  return totals, numbers.at[:, count // 2].add(-padding)  # the bin of zeros


def _total(of: Callable[[Array], Array], blocks: Array) -> Array:
  """Computes the sum of of(x) over each block, float32 [blocks]; of(0) must be 0."""
  return _joined(fold(jnp.sum, of, _pieces(blocks)[0]), blocks)


def _piece() -> int:
  """Returns the number of elements to sum at once, which on a CPU is what the cache can hold."""
  return 2**12 if platform() == "cpu" else 2**18


def _pieces(blocks: Array) -> tuple[Array, int]:
  """Splits each block [width] into pieces; returns [pieces, elements] and the padding per block."""
  width = min(blocks.shape[1], _piece())
  padding = -blocks.shape[1] % width
  return jnp.pad(blocks, ((0, 0), (0, padding))).reshape(-1, width), padding


def _joined(parts: Array, blocks: Array) -> Array:
  """Sums the results of the pieces, [pieces, ...], over each block, [blocks, ...]."""
  count = len(blocks) and len(parts) // len(blocks)
  return jnp.sum(parts.reshape(len(blocks), count, *parts.shape[1:]), axis=1)
