"""Draws random bits for stochastic rounding by a hash that XLA can fuse with other computations.

A stochastic compressor draws one number per element. With `jax.random` on a CPU, these draws cost
ten times as much as all other work of the compressor. Here, each draw is a hash of a key and an
index: it takes four multiplications, and its result is not written to memory. The bits pass the
statistical tests in `test_draws.py`, but an adversary could predict them, so noise that protects
privacy is drawn by `jax.random`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from research.core.base import Array, Key


def random_bits(key: Key, shape: tuple[int, ...]) -> Array:
  """Draws random uint32 [shape]; element i is a function of the key and of i modulo 2^32.

      u = mix(i + k_0),   bits_i = mix(u xor k_1)

  k_0 and k_1 are drawn from the key by `jax.random`. `mix` is a bijection of 32-bit words in which
  each bit of the input changes each bit of the output with a probability of nearly a half. The bits
  do not depend on how the array is sharded.

  Args:
    key: a typed key.
    shape: the shape of the result.

  Reference: Salmon et al. 2011 (Random123), on generators that are a function of key and counter;
    Wellons 2018, Hash Prospector, and its issue 19, for the shifts and factors of `mix`.
  """
  first, second = jax.random.bits(key, (2,), jnp.uint32)
  index = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
  return _mix(_mix(index + first) ^ second)


def uniform(key: Key, shape: tuple[int, ...]) -> Array:
  """Draws float32 numbers [shape], uniform on the multiples of 2^-24 in [0, 1).

  Args:
    key: a typed key.
    shape: the shape of the result.
  """
  bits = lax.bitcast_convert_type(random_bits(key, shape) >> 8, jnp.int32)
  return bits.astype(jnp.float32) * jnp.float32(2.0**-24)


def _mix(x: Array) -> Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
  x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
  return x ^ (x >> 15)
