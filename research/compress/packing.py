"""Packs small integers into bytes and unpacks them; the only module that handles bit layouts."""

from collections.abc import Iterator

import jax.numpy as jnp

from research.core.base import Array

WIDEST = 32


def packed_size(count: int, bits: int) -> int:
  """Returns the number of bytes of packed codes.

  Args:
    count: number of codes.
    bits: width of a code, in [1, 32].
  """
  return sum(-(-count * width // 8) for _, width in _fields(bits))


def pack(codes: Array, bits: int) -> Array:
  """Packs unsigned integers below 2^bits in order; only the last byte of each field has padding.

  A code is split into fields of 8, 4, 2 and 1 bits (9 = 8 + 1, 7 = 4 + 2 + 1). Fields of one width
  fill bytes from the least significant bit up. Packing therefore needs only shifts within a byte,
  which all machines vectorize, and its result has at most 3 bytes more than count * bits / 8.

  Args:
    codes: unsigned integers [count].
    bits: width of a code, in [1, 32].

  Returns:
    uint8 [packed_size(count, bits)], field after field.
  """
  packed = []
  for shift, width in _fields(bits):
    field = (codes >> shift).astype(jnp.uint8)
    if width < 8:
      places = jnp.arange(0, 8, width, dtype=jnp.uint8)
      field = field & ((1 << width) - 1)
      field = jnp.pad(field, (0, -field.size % places.size)).reshape(-1, places.size)
      field = jnp.sum(field << places[None, :], axis=-1, dtype=jnp.uint8)
    packed.append(field)
  return packed[0] if len(packed) == 1 else jnp.concatenate(packed)


def unpack(packed: Array, bits: int, count: int) -> Array:
  """Unpacks the codes that `pack` packed.

  Args:
    packed: uint8 [packed_size(count, bits)].
    bits: width of a code, in [1, 32].
    count: number of codes.

  Returns:
    The codes [count], in the narrowest sufficient unsigned dtype.
  """
  dtype = unsigned(bits)
  codes, start = jnp.zeros(count, dtype), 0
  for shift, width in _fields(bits):
    field = packed[start : start + packed_size(count, width)]
    if width < 8:
      places = jnp.arange(0, 8, width, dtype=jnp.uint8)
      field = (field[:, None] >> places[None, :]) & ((1 << width) - 1)
    codes = codes | field.reshape(-1)[:count].astype(dtype) << shift
    start += packed_size(count, width)
  return codes


def unsigned(bits: int) -> jnp.dtype:
  """Returns the narrowest unsigned integer dtype with at least `bits` bits.

  Args:
    bits: number of bits, at most 32.
  """
  return jnp.dtype(f"uint{max(8, 1 << (bits - 1).bit_length())}")


def _fields(bits: int) -> Iterator[tuple[int, int]]:
  """Yields the (shift, width) of each field of a code."""
  assert 1 <= bits <= WIDEST, bits
  shift = 0
  for width in (8, 8, 8, 8, 4, 2, 1):
    if shift + width <= bits:
      yield shift, width
      shift += width
