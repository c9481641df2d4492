"""Implements Shamir's secret sharing: `quorum` shares determine a secret; fewer reveal nothing.

Secrets are uint32 arrays whose elements are in the field with PRIME elements. PRIME is the largest
prime below 2^16, so the product of two elements and the sum of 2^16 elements fit in 32 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax

from research.core.base import Array, Key

PRIME = 65521


def share(secret: Array, quorum: int, holders: int, key: Key) -> Array:
  """Splits a secret into one share per holder.

      f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1},   share_j = f(j + 1),   all modulo PRIME

  Args:
    secret: the secret, uint32 [...] with elements below PRIME; each element has its own polynomial.
    quorum: t, the number of shares that determine the secret.
    holders: the number of holders, each of which gets one share.
    key: a typed key that draws the coefficients; only the owner of the secret knows it.

  Returns:
    The shares, uint32 [holders, ...].

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
  """Computes the Lagrange weights: the weighted sum of the shares is the secret.

      lambda_j = prod_{m present, m != j} x_m / (x_m - x_j),   x_j = j + 1;   0 where absent

  Args:
    present: a mask [holders], True for the available shares; if there are fewer than the quorum,
      the weighted sum is unrelated to the secret.

  Returns:
    The weights, uint32 [holders].
  """
  points = jnp.arange(1, len(present) + 1, dtype=jnp.uint32)
  distances = (points[None, :] + PRIME - points[:, None]) % PRIME
  others = present[None, :] & ~jnp.eye(len(present), dtype=bool)
  of_others = lambda factors: _product(jnp.where(others, factors, 1).T)
  weight = of_others(points[None, :]) * _inverse(of_others(distances)) % PRIME
  return jnp.where(present, weight, 0)


def reconstruct(shares: Array, present: Array) -> Array:
  """Reconstructs a secret from its shares.

  Args:
    shares: the shares, uint32 [holders, ...].
    present: a mask [holders], True for the available shares, of which there must be at least the
      quorum.

  Returns:
    The secret, uint32 [...].
  """
  weight = weights(present).reshape(-1, *[1] * (shares.ndim - 1))
  return jnp.sum(shares * weight % PRIME, 0, dtype=jnp.uint32) % PRIME


def _product(factors: Array) -> Array:
  """Computes the product over the leading axis, modulo PRIME."""
  times = lambda a, b: (a * b % PRIME, None)
  return lax.scan(times, jnp.ones_like(factors[0]), factors)[0]


def _inverse(x: Array) -> Array:
  """Computes 1 / x modulo PRIME as x^(PRIME - 2), by Fermat's little theorem."""
  bits = jnp.array([bit == "1" for bit in f"{PRIME - 2:b}"])

  def square_and_multiply(power, bit):
    square = power * power % PRIME
    return jnp.where(bit, square * x % PRIME, square), None

  return lax.scan(square_and_multiply, jnp.ones_like(x), bits)[0]
