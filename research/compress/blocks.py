"""Converts a leaf to blocks of float32 and back: what all compressors here share.

Quantizers compute in float32 whatever the leaf's dtype; a float64 value beyond its range becomes
infinite. Linear compressors compute in float64 for a float64 leaf.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from research.core.base import Array

TINY = 2.0**-126  # the smallest normal float32: a divisor that is never zero nor flushed to it


def floating(x: Array) -> Array:
  """x, if it is floating-point.

  Raises:
    ValueError: if not.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"dtype={x.dtype} cannot be compressed; legal: floating-point dtypes")
  return x


def flatten(x: Array) -> Array:
  """x as [n]; it must be floating-point."""
  return floating(x).reshape(-1)


def to_blocks(flat: Array, width: int | None) -> Array:
  """float32 [blocks, width], the last block filled up with zeros.

  A leaf shorter than `width` is one block of its own length; None makes one block of any leaf.
  """
  size = max(flat.size, 1)
  width = min(width or size, size)
  flat = jnp.pad(flat, (0, -flat.size % width)) if flat.size % width else flat
  return flat.astype(jnp.float32).reshape(-1, width)


def widened(x: Array) -> Array:
  """x in at least float32."""
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def restore(values: Array, like: jax.ShapeDtypeStruct) -> Array:
  """The first values, as many as `like` has, in its shape and dtype."""
  return saturated(values.reshape(-1)[: like.size], like.dtype).reshape(like.shape)


def saturated(x: Array, dtype: jnp.dtype) -> Array:
  """x in a dtype: finite values stay finite, infinite values and NaN stay what they are.

  What bfloat16 cannot hold of a float32 is rounded off by itself: XLA drops a conversion that it
  sees undone, and on a GPU does.
  """
  to, of = jnp.finfo(dtype), jnp.finfo(x.dtype)
  if float(to.max) < float(of.max):
    x = widened(x)  # the narrower of two half precisions cannot hold the other's largest number
    x = jnp.where(jnp.isfinite(x), jnp.clip(x, -float(to.max), float(to.max)), x)
  if to.nmant < of.nmant and to.nexp == of.nexp:
    x = lax.reduce_precision(x, to.nexp, to.nmant)
  return x.astype(dtype)


def fold(reduce: Callable[..., Array], of: Callable[[Array], Array], blocks: Array) -> Array:
  """reduce(of(x)) of each block [blocks, width], on CPUs in two steps.

  XLA:CPU fuses a reduction of at most 32 elements with the elementwise `of` that feeds it; before a
  longer one it writes of(x) to memory, which takes four times as long. A TPU has to shuffle 32
  elements into its 128 lanes, by code that takes twenty times as long to compile.
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
  depth = math.gcd(width // 32, 16)
  tiles = of(blocks.reshape(rows, -1, depth, 32))
  return reduce(reduce(tiles, axis=2).reshape(rows, width // depth), axis=1)


def largest_magnitude(blocks: Array) -> Array:
  """max |x| of each block, float32 [blocks]; NaN where a block has one.

  |x| as an integer has the order of |x|, NaN above all, and integers are compared many at a time.
  """
  bits = lambda x: lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF
  return lax.bitcast_convert_type(fold(jnp.max, bits, blocks), jnp.float32)


def norm_over(blocks: Array, parts: int) -> Array:
  """||x|| / parts of each block, float32 [blocks]; no square or norm overflows or vanishes."""
  largest = jnp.maximum(largest_magnitude(blocks), TINY)
  down = invertible(largest)
  relative = (blocks * down[:, None]) / (largest * down)[:, None]
  return down * largest * jnp.sqrt(fold(jnp.sum, jnp.square, relative)) / parts / down


def invertible(units: Array) -> Array:
  """A factor for a value and its unit, so that the unit's inverse is a normal float32: mostly 1.

  XLA divides by multiplying with an inverse, and that of 2^127 would be flushed to zero.
  """
  return jnp.where(units > 2.0**64, 2.0**-64, 1.0)
