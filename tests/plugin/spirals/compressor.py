"""Fixed-point numbers with one scale."""

from typing import Any, NamedTuple

import jax.numpy as jnp

import research as dx


class FixedPoint(NamedTuple):
  numbers: Any  # int8 or int16, in the shape of the leaf
  scale: Any  # float32 []


@dx.register("compressor")
class Fixed(dx.Compressor, name="fixed"):
  """C(x) = s round(x / s), with s = max |x| / (2^(bits - 1) - 1).

  Args:
    bits: 8 or 16 per element.
  """

  bits: int = 16

  def check(self):
    if self.bits not in (8, 16):
      raise ValueError(f"bits={self.bits} is not 8 or 16")

  def encode(self, x, shared, own):
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), initial=0.0) / float(2 ** (self.bits - 1) - 1)
    scale += 0.0 * jnp.sum(wide)  # some compilers' maximum of a NaN is a number
    numbers = jnp.round(wide / jnp.where(scale > 0, scale, 1.0))
    return FixedPoint(numbers.astype(f"int{self.bits}"), scale)

  def decode(self, payload, like, shared):
    return (payload.numbers.astype(jnp.float32) * payload.scale).astype(like.dtype)
