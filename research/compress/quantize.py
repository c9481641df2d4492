"""Uniform quantization with one step size per block of elements.

With s levels on either side of zero, the code of x is one of 2s + 1 integers, packed. The payload
is `codes`, n ceil(log2(2s + 1)) / 8 bytes, and `units`, one float32 per block.
"""

import math
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from research.compress.blocks import (
  TINY,
  flatten,
  invertible,
  largest_magnitude,
  norm_over,
  restore,
  to_blocks,
)
from research.compress.draws import uniform
from research.compress.packing import pack, unpack, unsigned
from research.core import checks
from research.core.base import Array, Compressor

MOST_LEVELS = 2**15 - 1


class Levels(NamedTuple):
  """Represents x approximately as (codes - s) * units."""

  codes: Array  # uint8, packed
  units: Array  # float32 [blocks], the distance between adjacent levels


class Quantizer(Compressor):
  """Rounds each block to multiples of the block's unit; a non-finite element makes its block NaN.

  Subclasses define the class attributes below, as constants, fields or properties.
  """

  levels: ClassVar[Any]  # s, number of levels on either side of zero
  block: ClassVar[Any] = None  # number of elements that share a unit; None means all
  stochastic: ClassVar[Any] = True  # whether to round stochastically, without bias

  def check(self):
    if self.block is not None:
      checks.at_least("block", self.block)

  @property
  def bits(self) -> int:
    """Returns the number of bits per code."""
    return math.ceil(math.log2(2 * self.levels + 1))

  def unit(self, blocks: Array) -> Array:
    """Returns the distance between adjacent levels, [blocks], for blocks [blocks, width]."""
    return largest_magnitude(blocks) / self.levels

  def encode(self, x, shared, own):
    del shared
    blocks = to_blocks(flatten(x), self.block)
    units = jnp.maximum(self.unit(blocks), TINY)
    down = invertible(units)
    scaled = (blocks * down[:, None]) * (1 / (units * down))[:, None]
    stochastic = lambda: jnp.floor(scaled + uniform(own, scaled.shape))
    level = stochastic() if self.stochastic else jnp.rint(scaled)
    codes = (jnp.clip(level, -self.levels, self.levels) + self.levels).astype(unsigned(self.bits))
    return Levels(pack(codes.reshape(-1)[: x.size], self.bits), units)

  def decode(self, payload, like, shared):
    del shared
    level = unpack(payload.codes, self.bits, like.size).astype(jnp.float32) - self.levels
    return restore(to_blocks(level, self.block) * payload.units[:, None], like)


class Int8(Quantizer, name="int8"):
  """Rounds to integers in [-127, 127] times a scale per block: 1 + 4 / block bytes per element.

      scale = max |x| / 127,   C(x) = scale round(x / scale)

  Rounding to nearest is contractive: ||C(x) - x||^2 <= (block - 1) / (4 127^2) ||x||^2, a factor of
  0.004 for blocks of 256. Stochastic rounding is unbiased, with the same bound on its variance.

  Args:
    block: the number of elements that share a scale.
    stochastic: whether to round stochastically, without bias, instead of to the nearest level.

  Raises:
    ValueError: if block < 1.

  Reference: Dettmers 2015, arXiv:1511.04561 (8 bits); Gupta et al. 2015, arXiv:1502.02551
    (stochastic rounding).
  """

  block: int = 256
  stochastic: bool = False
  levels = 127

  @property
  def contractive(self):
    return not self.stochastic or self.block <= 4 * 127**2


int8 = Int8


class Int4(Quantizer, name="int4"):
  """Rounds to integers in [-7, 7] times a scale per block: 0.5 + 4 / block bytes per element.

      scale = max |x| / 7,   C(x) = scale round(x / scale)

  Rounding to nearest is contractive: ||C(x) - x||^2 <= min((block - 1) / 196, 1 - 1 / block)
  ||x||^2, a factor of 0.65 for blocks of 128. Stochastic rounding is unbiased with variance at most
  (block - 1) / 196 ||x||^2.

  Args:
    block: the number of elements that share a scale.
    stochastic: whether to round stochastically, without bias, instead of to the nearest level.

  Raises:
    ValueError: if block < 1.

  Reference: see `int8`.
  """

  block: int = 128
  stochastic: bool = False
  levels = 7

  @property
  def contractive(self):
    return not self.stochastic or self.block < 197


int4 = Int4


class QSGD(Quantizer, name="qsgd"):
  """Rounds |x| / ||x|| stochastically to s levels (QSGD), with one norm per bucket.

      C(x)_i = ||x|| sign(x_i) xi_i,   xi_i in {l / s, (l + 1) / s} with mean |x_i| / ||x||

  C is unbiased: E ||C(x) - x||^2 <= min(d / s^2, sqrt(d) / s) ||x||^2 with d = bucket (lemma 3.1).
  An element takes ceil(log2(2 s + 1)) / 8 + 4 / bucket bytes, about half a byte if s = 7. The paper
  uses Elias' universal code, whose length depends on the values; here all codes have the same
  width, so that the payload has a static shape.

  Args:
    levels: s, the number of levels on either side of zero.
    bucket: the number of elements that share a norm; None for one norm per leaf, as in the theory.

  Raises:
    ValueError: if levels is not in [1, 32767] or bucket < 1.

  Reference: Alistarh et al. 2017, arXiv:1610.02132, section 3.1.
  """

  levels: int = 7
  bucket: int | None = 512

  def check(self):
    checks.at_least("bucket", 1 if self.bucket is None else self.bucket)
    checks.in_range("levels", self.levels, f"[1, {MOST_LEVELS}]")

  @property
  def block(self):
    return self.bucket

  @property
  def contractive(self):
    return self.bucket is not None and self.bucket < self.levels**2

  def unit(self, blocks):
    return norm_over(blocks, self.levels)


qsgd = QSGD


class TernGrad(Quantizer, name="terngrad"):
  """Rounds stochastically to -s, 0 or s: 2 bits per element, and one float32 s for each leaf.

      C(x) = s sign(x) b,   s = max |x|,   P(b_i = 1) = |x_i| / s

  C is unbiased: E ||C(x) - x||^2 = s ||x||_1 - ||x||^2 <= (sqrt(n) - 1) / 2 ||x||^2. The paper
  first clips gradients at 2.5 standard deviations; here, a wrapper can clip them.

  Reference: Wen et al. 2017, arXiv:1705.07878, algorithm 1.
  """

  levels = 1
  contractive = False


terngrad = TernGrad
