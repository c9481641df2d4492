"""Compression by the largest coefficients of a blockwise cosine transform.

A leaf is treated as a matrix [product of all but the last dimension, last dimension]; a vector is
one row. The matrix is split into blocks of nearly equal size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.compress.blocks import floating, saturated, widened
from research.compress.packing import pack, unpack
from research.compress.sparsify import position_bits
from research.core import checks
from research.core.base import Array, Compressor


class Coefficients(NamedTuple):
  values: Array  # [blocks, k], the leaf's dtype
  positions: Array  # uint8, packed: the position of each value in its block


class Grid(NamedTuple):
  """A matrix split into blocks of equal size; the last blocks are padded with zeros."""

  across: tuple[int, int]  # number of blocks (down, right)
  sides: tuple[int, int]  # (height, width) of a block

  @property
  def size(self) -> int:
    """Number of elements of a block."""
    return math.prod(self.sides)


class DCTTopK(Compressor, name="dct_top_k"):
  """Sends the k largest DCT coefficients of each block: k (itemsize + 3/2) bytes per block.

      C(x)_block = D^T S_k(D x_block D^T) D,   D_{ij} = c_i cos(pi i (2 j + 1) / (2 h)),

  with c_0 = h^(-1/2) and c_i = (2/h)^(1/2) otherwise, on blocks of up to chunk x chunk elements, or
  chunk elements for a vector. S_k keeps the k largest magnitudes; ties go to the first. D is
  orthonormal, so C is contractive: ||C(x) - x||^2 <= (1 - k / chunk^2) ||x||^2. C(x) is not sparse,
  only its transform is. A position takes ceil(log2 of the block's size) bits: 12 for 64 x 64. A
  non-finite element makes its block non-finite.

  Args:
    chunk: maximum side of a block.
    k: number of coefficients to send per block; all if the block has fewer.

  Raises:
    ValueError: if chunk < 1, or k is not in [1, chunk^2].

  Reference: Peng, Quesnelle, Kingma 2024, arXiv 2411.19870, section 3 (extraction of fast
    components). In the paper, the sides of a block are the largest divisors of the dimensions up to
    `chunk`, so 1 for a prime dimension above `chunk`.
  """

  chunk: int = 64
  k: int = 8

  def check(self):
    checks.at_least("chunk", self.chunk)
    if not 1 <= self.k <= self.chunk**2:
      raise ValueError(f"k={self.k} is not in [1, chunk^2] = [1, {self.chunk**2}]")

  def encode(self, x, shared, own):
    del shared, own
    grid = _grid(x.shape, self.chunk)
    spectrum = _transformed(_to_grid(widened(floating(x)), grid), grid)
    _, positions = lax.top_k(jnp.abs(spectrum), min(self.k, grid.size))
    values = jnp.take_along_axis(spectrum, positions, axis=1, mode="promise_in_bounds")
    codes = positions.astype(jnp.uint32).reshape(-1)
    return Coefficients(saturated(values, x.dtype), pack(codes, position_bits(grid.size)))

  def decode(self, payload, like, shared):
    del shared
    grid, values = _grid(like.shape, self.chunk), widened(payload.values)
    codes = unpack(payload.positions, position_bits(grid.size), values.size)
    positions = codes.reshape(values.shape).astype(jnp.int32)
    zeros = jnp.zeros((values.shape[0], grid.size), values.dtype)
    put = lambda row, at, value: row.at[at].set(value, mode="promise_in_bounds")
    spectrum = jax.vmap(put)(zeros, positions, values)
    return saturated(_from_grid(_transformed(spectrum, grid, -1), grid, like), like.dtype)


dct_top_k = DCTTopK


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
  return math.prod(shape[:-1]), math.prod(shape[-1:])


def _grid(shape: tuple[int, ...], chunk: int) -> Grid:
  rows, columns = _as_matrix(shape)
  down, right = max(1, -(-rows // chunk)), max(1, -(-columns // chunk))
  return Grid((down, right), (max(1, -(-rows // down)), max(1, -(-columns // right))))


def _to_grid(x: Array, grid: Grid) -> Array:
  """Splits x into blocks [blocks, elements of a block]."""
  matrix = x.reshape(_as_matrix(x.shape))
  filled = [n * side - size for n, side, size in zip(*grid, matrix.shape, strict=True)]
  if any(filled):
    matrix = jnp.pad(matrix, [(0, fill) for fill in filled])
  (down, right), (height, width) = grid
  return matrix.reshape(down, height, right, width).swapaxes(1, 2).reshape(-1, grid.size)


def _from_grid(blocks: Array, grid: Grid, like: jax.ShapeDtypeStruct) -> Array:
  (down, right), (height, width) = grid
  matrix = blocks.reshape(down, right, height, width).swapaxes(1, 2)
  matrix = matrix.reshape(down * height, right * width)
  rows, columns = _as_matrix(like.shape)
  return matrix[:rows, :columns].reshape(like.shape)


def _transformed(blocks: Array, grid: Grid, direction: int = 1) -> Array:
  """Computes the cosine transform of each block, or the inverse transform for direction -1."""
  height, width = (jnp.asarray(cosines(n), blocks.dtype) for n in grid.sides)
  if direction < 0:
    height, width = height.T, width.T
  product = jnp.einsum(
    "nhw,ih,jw->nij",
    blocks.reshape(-1, *grid.sides),
    height,
    width,
    precision=lax.Precision.HIGHEST,
  )
  return product.reshape(-1, grid.size)


def cosines(size: int) -> np.ndarray:
  """Returns D, the orthonormal DCT-II matrix [size, size]; its rows are the basis.

  Args:
    size: number of elements of a block.
  """
  frequency, place = np.arange(size)[:, None], np.arange(size)[None, :]
  scale = np.where(frequency == 0, 1, 2) / size
  return np.sqrt(scale) * np.cos(np.pi * frequency * (2 * place + 1) / (2 * size))
