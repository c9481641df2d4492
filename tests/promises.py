"""Every compressor of the codebase, as specs, and what its docstring promises."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
  """A compressor and what its docstring promises, for a leaf of n elements (of `size` bytes)."""

  spec: str
  error: Callable[[int], float]  # E ||C(x) - x||^2 <= error(n) ||x||^2
  content: Callable[[int, int], float]  # bytes, but for the rounding up of what is packed
  worst: Callable[[int], float] | None = None  # the bound for every draw; error if None
  unbiased: bool = False
  idempotent: bool = False  # with the same shared key
  linear: bool = False


def kept(fraction, n):
  return max(1, round(fraction * n))


def near(levels, block):
  return lambda n: min((min(block, n) - 1) / (4 * levels**2), 1 - 1 / min(block, n))


def between(levels, block):
  return lambda n: (min(block, n) - 1) / (4 * levels**2)


def qsgd(levels, bucket):
  return lambda n: min(min(bucket, n) / levels**2, min(bucket, n) ** 0.5 / levels)


def scales(block, bits):
  return lambda n, size: n * bits / 8 + 4 * math.ceil(n / block)


def sparse(fraction, extra=0):
  index = lambda n: max(1, (n - 1).bit_length()) / 8
  return lambda n, size: kept(fraction, n) * (size + index(n)) + extra


def cosine(chunk, k):
  """Vectors of up to 2^20 elements; beyond that matrices that blocks divide."""

  def content(n, size):
    blocks, of_block = math.ceil(n / chunk), math.ceil(n / math.ceil(n / chunk))
    if n >= 2**20:
      blocks, of_block = n // chunk**2, chunk**2
    return blocks * min(k, of_block) * (size + max(1, (of_block - 1).bit_length()) / 8)

  return content


def blocks_of(k, block):
  """The number of blocks of n elements, their size and how many elements of each are sent."""

  def of(n):
    blocks = math.ceil(n / block)
    width = math.ceil(n / blocks)
    return blocks, width, max(1, round(k * width / block))

  return of


def block_error(k, block):
  def error(n):
    blocks, width, sent = blocks_of(k, block)(n)
    return 1 - sent / width / (3 * (blocks * sent) ** 0.5)

  return error


def block_content(k, block):
  def content(n, size):
    blocks, width, sent = blocks_of(k, block)(n)
    return blocks * sent * (max(1, (width - 1).bit_length()) + 2) / 8 + 16

  return content


# sizes that the tests use -> what hadamard pads them to
PADDED = {1: 1, 40: 40, 60: 64, 1000: 1024, 4096: 4096, 2**27: 2**27, 2**31: 2**31}
rotated = lambda of: lambda n, *size: of(PADDED.get(n, n), *size)

# fmt: off
COMPRESSORS = {row.spec: row for row in (
  Row("identity()", lambda n: 0, lambda n, size: n * size, idempotent=True, linear=True),
  Row("bf16()", lambda n: 2**-16, lambda n, size: 2 * n, idempotent=True, linear=True),
  Row("fp8()", lambda n: 2**-8 + 128 * (2**-10 / 448) ** 2, scales(128, 8), idempotent=True),
  Row("int8()", near(127, 256), scales(256, 8), idempotent=True),
  Row("int8(block=64, stochastic=True)", between(127, 64), scales(64, 8), lambda n: 64 / 127**2,
      unbiased=True),
  Row("int4()", near(7, 128), scales(128, 4), idempotent=True),
  Row("int4(stochastic=True)", between(7, 128), scales(128, 4), lambda n: 128 / 49, unbiased=True),
  Row("qsgd()", qsgd(7, 512), scales(512, 4), lambda n: 512 / 49, unbiased=True),
  Row("qsgd(levels=2, bucket=None)", qsgd(2, 2**32), scales(2**32, 3), lambda n: n / 4,
      unbiased=True),
  Row("terngrad()", lambda n: (n**0.5 - 1) / 2, scales(2**32, 2), lambda n: n, unbiased=True,
      idempotent=True),
  Row("natural()", lambda n: 1 / 8, lambda n, size: n * 9 / 8, lambda n: 1, unbiased=True,
      idempotent=True),
  Row("statistical(2)", lambda n: 1 - 1 / (3 * n**0.5), lambda n, size: n / 4 + 16),
  Row("sign()", lambda n: 1 - 1 / n, scales(2**32, 1), idempotent=True),
  Row("top_k(0.1)", lambda n: 1 - kept(0.1, n) / n, sparse(0.1), idempotent=True),
  Row("block_top_k(8, block=64)", block_error(8, 64), block_content(8, 64)),
  Row("random_k(0.3)", lambda n: 1 - kept(0.3, n) / n, lambda n, size: kept(0.3, n) * size,
      lambda n: 1, idempotent=True, linear=True),
  Row("random_k(0.3, unbiased=True)", lambda n: n / kept(0.3, n) - 1,
      lambda n, size: kept(0.3, n) * size, lambda n: (n / kept(0.3, n) - 1) ** 2 + 1,
      unbiased=True, linear=True),
  Row("threshold(0.5, capacity=0.2)", lambda n: 1, sparse(0.2, 4), idempotent=True),
  Row("count_sketch(1, 16)", lambda n: math.ceil(n / 16) - 1, lambda n, size: 4 * min(n, 16),
      lambda n: n**2, unbiased=True, linear=True),
  Row("count_sketch(3, 16)", lambda n: (n > 48) * (math.ceil(n / 16) - 1),
      lambda n, size: 4 * min(n, 48), lambda n: n**2, unbiased=True, linear=True),
  Row("hadamard(int4())", near(7, 128), rotated(scales(128, 4))),
  Row("hadamard(qsgd())", qsgd(7, 512), rotated(scales(512, 4)), lambda n: 512 / 49,
      unbiased=True),
  Row("hadamard(random_k(0.3))", rotated(lambda n: 1 - kept(0.3, n) / n),
      rotated(lambda n, size: kept(0.3, n) * size), lambda n: 1, linear=True),
  Row("seeded(random_k(0.3, unbiased=True))", lambda n: n / kept(0.3, n) - 1,
      lambda n, size: kept(0.3, n) * size + 4, lambda n: (n / kept(0.3, n) - 1) ** 2 + 1,
      unbiased=True),
  Row("dct_top_k()", lambda n: 1 - min(8, n) / min(64, n), cosine(64, 8)),
)}  # fmt: skip
# fmt: on

# One row of each compressor, and of `hadamard` around one of them.
QUICK = [
  spec
  for spec in COMPRESSORS
  if not spec.startswith(("int8(b", "int4(s", "qsgd(l", "random_k(0.3,", "count_sketch(3", "hada"))
]
QUICK.append("hadamard(int4())")
