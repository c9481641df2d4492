"""Number formats: identity, bfloat16, float8 with block scales, powers of two."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from research.compress.blocks import (
  TINY,
  flatten,
  floating,
  largest_magnitude,
  restore,
  saturated,
  to_blocks,
)
from research.compress.draws import random_bits
from research.compress.packing import pack, unpack
from research.core import checks
from research.core.base import Array, Compressor

_INFINITY = 0x7F800000  # the bits of float32 infinity
_LARGEST_FLOAT8 = 448.0  # largest e4m3 number


class Identity(Compressor, name="identity"):
  """Sends leaves uncompressed, in their own dtype and shape: C(x) = x, which is linear."""

  linear = True

  def encode(self, x, shared, own):
    del shared, own
    return floating(x)

  def decode(self, payload, like, shared):
    del like, shared
    return payload


identity = Identity


class BF16(Compressor, name="bf16"):
  """Rounds to bfloat16: 2 bytes per element.

  Rounding is contractive: ||C(x) - x||^2 <= 2^-16 ||x||^2 for normal numbers. Finite values out of
  range saturate. The compressor is linear, except that sums of payloads are also rounded to
  bfloat16. The shape is unchanged.

  Reference: Kalamkar et al. 2019, arXiv:1905.12322.
  """

  linear = True

  def encode(self, x, shared, own):
    del shared, own
    return saturated(floating(x), jnp.dtype(jnp.bfloat16))

  def decode(self, payload, like, shared):
    del shared
    return saturated(payload, like.dtype)


bf16 = BF16


class Float8(NamedTuple):
  """Represents x = values * scales."""

  values: Array  # float8_e4m3fn [n]
  scales: Array  # float32 [blocks]


class FP8(Compressor, name="fp8"):
  """Rounds to float8 e4m3 times a scale per block: 1 + 4 / block bytes per element.

      scale = max |x| / 448,   C(x) = scale float8(x / scale)

  C is contractive: an element's error is at most 1/16 of its value or 2^-10 scale, whichever is
  larger, so ||C(x) - x||^2 <= (2^-8 + block (2^-10 / 448)^2) ||x||^2, a factor of about 0.004. The
  format has no infinity, but nothing overflows, since the block's largest element maps to 448. A
  non-finite element makes its block NaN.

  Args:
    block: number of elements that share a scale.

  Raises:
    ValueError: if block < 1.

  Reference: Micikevicius et al. 2022, arXiv:2209.05433; blocks of 128: DeepSeek-AI 2024,
    arXiv:2412.19437, section 3.3.2.
  """

  block: int = 128

  def check(self):
    checks.at_least("block", self.block)

  def encode(self, x, shared, own):
    del shared, own
    blocks = to_blocks(flatten(x), self.block)
    scales = jnp.maximum(largest_magnitude(blocks) / _LARGEST_FLOAT8, TINY)
    scaled = jnp.clip(blocks * (1 / scales)[:, None], -_LARGEST_FLOAT8, _LARGEST_FLOAT8)
    return Float8(scaled.astype(jnp.float8_e4m3fn).reshape(-1)[: x.size], scales)

  def decode(self, payload, like, shared):
    del shared
    return restore(to_blocks(payload.values, self.block) * payload.scales[:, None], like)


fp8 = FP8


class Natural(Compressor, name="natural"):
  """Rounds stochastically to powers of two (natural compression): 9 bits per element, no scales.

      C(x) = sign(x) 2^floor(log2 |x|)        with probability (2^ceil(log2 |x|) - |x|) / 2^floor
             sign(x) 2^ceil(log2 |x|)         otherwise

  Adding a random mantissa to the bits of |x| carries into the exponent with exactly this
  probability. C is unbiased, with E ||C(x) - x||^2 <= 1/8 ||x||^2, for |x| up to 2^127 (65504 in a
  float16 leaf). Larger values saturate. Infinity and NaN become infinite.

  Reference: Horvath et al. 2019, arXiv:1905.10988, theorem 1.
  """

  def encode(self, x, shared, own):
    del shared
    bits = lax.bitcast_convert_type(flatten(x).astype(jnp.float32), jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    mantissa = random_bits(own, bits.shape) >> 9
    exponent = jnp.minimum((magnitude + mantissa) >> 23, 254)
    exponent = jnp.where(magnitude >= _INFINITY, 255, exponent)
    return pack(exponent | (bits >> 31 << 8), 9)

  def decode(self, payload, like, shared):
    del shared
    code = unpack(payload, 9, like.size).astype(jnp.uint32)
    bits = (code & 255) << 23 | code >> 8 << 31
    return restore(lax.bitcast_convert_type(bits, jnp.float32), like)


natural = Natural
