"""Sign compression: one bit per element and a scale."""

from typing import NamedTuple

import jax.numpy as jnp

from research.compress.blocks import flatten, restore
from research.compress.packing import pack, unpack
from research.core.base import Array, Compressor


class Signs(NamedTuple):
  bits: Array  # uint8 [ceil(n / 8)], 1 where x >= 0
  scale: Array  # float32 []


class Sign(Compressor, name="sign"):
  """Sends signs and their mean magnitude: one bit per element and one float32.

      C(x) = ||x||_1 / n sign(x),   sign(0) = +1

  C is contractive: ||C(x) - x||^2 = (1 - ||x||_1^2 / (n ||x||^2)) ||x||^2, where the fraction is at
  least 1 / n, and about 2 / pi for Gaussian x. Every element becomes non-finite if one element is
  non-finite or sum |x| exceeds the range of float32.

  Reference: Karimireddy et al. 2019, arXiv:1901.09847, algorithm 1 (EF-SignSGD).
  """

  def encode(self, x, shared, own):
    del shared, own
    flat = flatten(x)
    scale = jnp.sum(jnp.abs(flat), dtype=jnp.float32) / float(max(x.size, 1))
    return Signs(pack((flat >= 0).astype(jnp.uint8), 1), scale)

  def decode(self, payload, like, shared):
    del shared
    positive = unpack(payload.bits, 1, like.size) != 0
    return restore(jnp.where(positive, payload.scale, -payload.scale), like)


sign = Sign
