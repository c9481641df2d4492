"""Shamir's secret sharing: any `quorum` of the shares give the secret, fewer say nothing about it.

Secrets are arrays of elements of the field of PRIME elements, in uint32. PRIME is the largest below
2^16, so that the product of two elements and the sum of 2^16 of them are exact in 32 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax

from research.core.base import Array, Key

PRIME = 65521


def share(secret: Array, quorum: int, holders: int, key: Key) -> Array:
  """One share for each holder [holders, ...], of a secret [...] whose elements are below PRIME.

      f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1},   share_j = f(j + 1),   all modulo PRIME

  Args:
    secret: uint32, of any shape; each element is shared by a polynomial of its own.
    quorum: t, how many shares give the secret.
    holders: how many shares there are.
    key: of the coefficients, known to the owner of the secret alone.

  Raises:
    ValueError: if quorum is not in [1, holders], or there are PRIME holders or more.

  Reference: Shamir 1979, How to share a secret, Communications of the ACM 22(11).
  """
  if not 1 <= quorum <= holders:
    raise ValueError(f"quorum={quorum} is not in [1, {holders}], the number of holders")
  if holders >= PRIME:
    raise ValueError(f"{holders} holders; the field has points for less than {PRIME}")
  shape = (quorum - 1, *secret.shape)
  coefficients = jax.random.randint(key, shape, 0, PRIME, jnp.uint32)
  points = jnp.arange(1, holders + 1, dtype=jnp.uint32).reshape(-1, *[1] * secret.ndim)
  zero = jnp.zeros((holders, *secret.shape), jnp.uint32)
  horner = lambda value, a: ((value * points + a[None]) % PRIME, None)
  value, _ = lax.scan(horner, zero, coefficients)
  return (value * points + secret[None]) % PRIME


def weights(present: Array) -> Array:
  """What each holder's share counts for [holders]: the secret is the weighted sum of the shares.

      lambda_j = prod_{m present, m != j} x_m / (x_m - x_j),   x_j = j + 1;   0 where absent

  Args:
    present: bool [holders], whose shares there are: at least the quorum, else the sum of the
      weighted shares is unrelated to the secret.
  """
  points = jnp.arange(1, len(present) + 1, dtype=jnp.uint32)
  distances = (points[None, :] + PRIME - points[:, None]) % PRIME
  others = present[None, :] & ~jnp.eye(len(present), dtype=bool)
  of_others = lambda factors: _product(jnp.where(others, factors, 1).T)
  weight = of_others(points[None, :]) * _inverse(of_others(distances)) % PRIME
  return jnp.where(present, weight, 0)


def reconstruct(shares: Array, present: Array) -> Array:
  """The secret [...] from the shares [holders, ...] of those present, bool [holders]."""
  weight = weights(present).reshape(-1, *[1] * (shares.ndim - 1))
  return jnp.sum(shares * weight % PRIME, 0, dtype=jnp.uint32) % PRIME


def _product(factors: Array) -> Array:
  """Over the leading axis, modulo PRIME."""
  times = lambda a, b: (a * b % PRIME, None)
  return lax.scan(times, jnp.ones_like(factors[0]), factors)[0]


def _inverse(x: Array) -> Array:
  """x^(PRIME - 2), which is 1 / x modulo PRIME by Fermat's little theorem."""
  bits = jnp.array([bit == "1" for bit in f"{PRIME - 2:b}"])

  def square_and_multiply(power, bit):
    square = power * power % PRIME
    return jnp.where(bit, square * x % PRIME, square), None

  return lax.scan(square_and_multiply, jnp.ones_like(x), bits)[0]
