"""Quantisation onto evenly spaced levels, one distance between levels per block of elements.

With s levels on either side of zero, the code of x is one of 2s + 1 whole numbers, packed. The
payload is `codes`, n ceil(log2(2s + 1)) / 8 bytes, and `units`, a float32 per block.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.compress.blocks import (
  TINY,
  at_least_one,
  flatten,
  invertible,
  largest_magnitude,
  norm_over,
  restore,
  to_blocks,
)
from research.compress.packing import pack, unpack, unsigned
from research.core.base import Array, Compressor

MOST_LEVELS = 2**15 - 1


class Levels(NamedTuple):
  """x is about (codes - s) * units."""

  codes: Array  # uint8, packed
  units: Array  # float32 [blocks], the distance between two levels


def int8(block: int = 256, stochastic: bool = False) -> Compressor:
  """Whole numbers from -127 to 127 times a scale per block: 1 + 4 / block bytes per element.

      scale = max |x| / 127,   C(x) = scale round(x / scale)

  Rounding to nearest is contractive: ||C(x) - x||^2 <= (block - 1) / (4 127^2) ||x||^2, which is
  0.004 for blocks of 256. Stochastic rounding is unbiased, with the same bound on its variance.

  Args:
    block: elements that share a scale.
    stochastic: round up with the probability that makes the mean exact.

  Raises:
    ValueError: if block < 1.

  Reference: Dettmers 2015, arXiv:1511.04561 (8 bits); Gupta et al. 2015, arXiv:1502.02551
    (stochastic rounding).
  """
  at_least_one(block=block)
  contractive = not stochastic or block <= 4 * 127**2
  return _quantizer(127, block, _largest_over, stochastic, contractive)


def int4(block: int = 128, stochastic: bool = False) -> Compressor:
  """Whole numbers from -7 to 7, two to a byte, times a scale: 0.5 + 4 / block bytes per element.

      scale = max |x| / 7,   C(x) = scale round(x / scale)

  Rounding to nearest is contractive: ||C(x) - x||^2 <= min((block - 1) / 196, 1 - 1 / block)
  ||x||^2, 0.65 for blocks of 128. Stochastic rounding is unbiased with variance at most
  (block - 1) / 196 ||x||^2.

  Args:
    block: elements that share a scale.
    stochastic: round up with the probability that makes the mean exact.

  Raises:
    ValueError: if block < 1.

  Reference: as for `int8`.
  """
  at_least_one(block=block)
  return _quantizer(7, block, _largest_over, stochastic, contractive=not stochastic or block < 197)


def qsgd(levels: int = 7, bucket: int | None = 512) -> Compressor:
  """Quantised SGD: levels / ||x|| stochastically rounded, a norm per bucket.

      C(x)_i = ||x|| sign(x_i) xi_i,   xi_i in {l / s, (l + 1) / s} with mean |x_i| / ||x||

  for s levels. Unbiased: E ||C(x) - x||^2 <= min(d / s^2, sqrt(d) / s) ||x||^2 with d = bucket
  (lemma 3.1). ceil(log2(2 s + 1)) / 8 + 4 / bucket bytes per element: half a byte for 7 levels. The
  paper codes levels by Elias' universal code, whose length depends on the values; here each code
  has the same width, so that the payload has a static shape.

  Args:
    levels: s, levels on either side of zero.
    bucket: elements that share a norm; None for one norm of the whole leaf, as in the theory.

  Raises:
    ValueError: if levels is not in [1, 32767] or bucket < 1.

  Reference: Alistarh et al. 2017, arXiv:1610.02132, section 3.1.
  """
  at_least_one(bucket=1 if bucket is None else bucket)
  contractive = bucket is not None and bucket < levels**2
  return _quantizer(levels, bucket, norm_over, stochastic=True, contractive=contractive)


def terngrad() -> Compressor:
  """Ternary gradients: 2 bits per element and one float32, the largest magnitude of the leaf.

      C(x) = s sign(x) b,   s = max |x|,   P(b_i = 1) = |x_i| / s

  Unbiased: E ||C(x) - x||^2 = s ||x||_1 - ||x||^2 <= (sqrt(n) - 1) / 2 ||x||^2. The paper clips
  gradients at 2.5 standard deviations first, which is a wrapper's matter.

  Reference: Wen et al. 2017, arXiv:1705.07878, algorithm 1.
  """
  return _quantizer(1, None, _largest_over, stochastic=True, contractive=False)


def _largest_over(blocks: Array, levels: int) -> Array:
  return largest_magnitude(blocks) / levels


def _quantizer(
  levels: int,
  block: int | None,
  unit: Callable[[Array, int], Array],
  stochastic: bool,
  contractive: bool = True,
) -> Compressor:
  """Rounds to multiples of unit(blocks, levels). A non-finite element makes its whole block NaN."""
  if not 1 <= levels <= MOST_LEVELS:
    raise ValueError(f"levels={levels} is not in [1, {MOST_LEVELS}]")
  bits = math.ceil(math.log2(2 * levels + 1))

  def encode(x, shared, own):
    del shared
    blocks = to_blocks(flatten(x), block)
    units = jnp.maximum(unit(blocks, levels), TINY)
    down = invertible(units)
    scaled = (blocks * down[:, None]) * (1 / (units * down))[:, None]
    if stochastic:
      level = jnp.floor(scaled + jax.random.uniform(own, scaled.shape, jnp.float32))
    else:
      level = jnp.rint(scaled)
    codes = (jnp.clip(level, -levels, levels) + levels).astype(unsigned(bits))
    return Levels(pack(codes.reshape(-1)[: x.size], bits), units)

  def decode(payload, like, shared):
    del shared
    level = unpack(payload.codes, bits, like.size).astype(jnp.float32) - levels
    return restore(to_blocks(level, block) * payload.units[:, None], like)

  return Compressor(encode, decode, contractive=contractive)
