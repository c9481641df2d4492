"""Converts leaves to blocks of float32 and back, and has the numerics that compressors share.

Quantizers compute in float32 for any dtype of the leaf; a float64 value out of range becomes
infinite. Linear compressors compute in float64 for a float64 leaf.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from research.core.base import Array

_LONG = 4096  # elements of a row above which fold splits the row
TINY = 2.0**-126  # the smallest normal float32: a divisor that is not flushed to zero


def floating(x: Array) -> Array:
  """Returns x after checking its dtype.

  Args:
    x: an array.

  Raises:
    ValueError: if x is not floating-point.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"dtype={x.dtype} cannot be compressed; legal: floating-point dtypes")
  return x


def flatten(x: Array) -> Array:
  """Flattens x to [n].

  Args:
    x: an array of any shape.

  Raises:
    ValueError: if x is not floating-point.
  """
  return floating(x).reshape(-1)


def to_blocks(flat: Array, width: int | None) -> Array:
  """Splits a flat leaf into float32 blocks, the last one padded with zeros.

  Args:
    flat: floating-point [n].
    width: the number of elements per block; if it is None or larger than the leaf, there is one
      block.

  Returns:
    float32 [blocks, min(width, n)].
  """
  size = max(flat.size, 1)
  width = min(width or size, size)
  flat = jnp.pad(flat, (0, -flat.size % width)) if flat.size % width else flat
  return flat.astype(jnp.float32).reshape(-1, width)


def widened(x: Array) -> Array:
  """Converts x to float32, unless its dtype is wider.

  Args:
    x: a floating-point array.
  """
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def restore(values: Array, like: jax.ShapeDtypeStruct) -> Array:
  """Inverts `to_blocks`: drops the padding and restores the shape and dtype.

  Args:
    values: floating-point, of any shape, with at least as many elements as `like`.
    like: shape and dtype of the leaf.
  """
  return saturated(values.reshape(-1)[: like.size], like.dtype).reshape(like.shape)


def saturated(x: Array, dtype: jnp.dtype) -> Array:
  """Converts x to a dtype: finite values are clipped to its range; infinity and NaN are preserved.

  From float32 to bfloat16, the mantissa is rounded in a separate step, because XLA may remove a
  conversion that is undone later, and does so on GPUs.

  Args:
    x: floating-point, of any shape.
    dtype: a floating-point dtype.
  """
  to, of = jnp.finfo(dtype), jnp.finfo(x.dtype)
  if float(to.max) < float(of.max):
    x = widened(x)  # bfloat16 cannot represent the largest float16 number, 65504
    x = jnp.where(jnp.isfinite(x), jnp.clip(x, -float(to.max), float(to.max)), x)
  if to.nmant < of.nmant and to.nexp == of.nexp:
    x = lax.reduce_precision(x, to.nexp, to.nmant)
  return x.astype(dtype)


def fold(reduce: Callable[..., Array], of: Callable[[Array], Array], blocks: Array) -> Array:
  """Computes reduce(of(x)) for each block x, in two steps on CPUs.

  XLA:CPU fuses a reduction of at most 32 elements with the elementwise function `of`. Before a
  longer reduction, it writes of(x) to memory, which takes four times as long. Other platforms
  reduce in one step: a TPU would have to shuffle 32 elements into its 128 lanes, with code that
  takes twenty times as long to compile.

  Args:
    reduce: a reduction with a parameter `axis`, such as `jnp.max`.
    of: an elementwise function.
    blocks: [blocks, width].

  Returns:
    [blocks].
  """
  at_once = lambda x: reduce(of(x), axis=1)
  in_two = lambda x: _in_two_steps(reduce, of, x)
  return lax.platform_dependent(blocks, cpu=in_two, default=at_once)


def _in_two_steps(
  reduce: Callable[..., Array], of: Callable[[Array], Array], blocks: Array
) -> Array:
  rows, width = blocks.shape
  if width % 64:
    return reduce(of(blocks), axis=1)
  if width > _LONG and width % _LONG == 0:  # one thread would reduce each row
    parts = _in_two_steps(reduce, of, blocks.reshape(-1, _LONG))
    return reduce(parts.reshape(rows, width // _LONG), axis=1)
  depth = math.gcd(width // 32, 16)
  tiles = of(blocks.reshape(rows, -1, depth, 32))
  return reduce(reduce(tiles, axis=2).reshape(rows, width // depth), axis=1)


def largest_magnitude(blocks: Array) -> Array:
  """Returns max |x| of each block, float32 [blocks]; NaN if the block contains NaN.

  The bits of |x|, read as integers, have the same order as |x|, with NaN on top. Integer
  comparisons vectorize.

  Args:
    blocks: [blocks, width].
  """
  bits = lambda x: lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF
  return lax.bitcast_convert_type(fold(jnp.max, bits, blocks), jnp.float32)


def norm_over(blocks: Array, parts: int) -> Array:
  """Computes ||x|| / parts for each block x; no square or norm overflows or underflows.

  Args:
    blocks: float32 [blocks, width].
    parts: the divisor, such as a number of levels.

  Returns:
    float32 [blocks].
  """
  largest = jnp.maximum(largest_magnitude(blocks), TINY)
  down = invertible(largest)
  relative = (blocks * down[:, None]) / (largest * down)[:, None]
  return down * largest * jnp.sqrt(fold(jnp.sum, jnp.square, relative)) / parts / down


def invertible(units: Array) -> Array:
  """Returns a scale factor, usually 1, that makes the inverse of each unit a normal float32.

  XLA divides by multiplying with the inverse, and the inverse of 2^127 would be flushed to zero.
  Multiply both a value and its unit by the factor before dividing.

  Args:
    units: positive divisors, float32 [blocks].

  Returns:
    float32 [blocks].
  """
  return jnp.where(units > 2.0**64, 2.0**-64, 1.0)
