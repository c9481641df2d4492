"""Hand-written block top-k with 12-bit positions and 2-bit values, as a baseline of bench.py.

A leaf is split into blocks of at most 4096 elements. Of each block, 1/64 of the elements are sent:
their positions, and a 2-bit code each. The receiver reads a code's value from a table of four
float32 numbers per leaf.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK, K = 4096, 64


class Plan(NamedTuple):
  """The sizes of an encoded leaf."""

  shape: tuple[int, ...]
  size: int  # number of elements of the leaf
  blocks: int
  width: int  # number of elements of a block
  k: int  # number of elements that are sent of a block

  @property
  def places(self) -> int:
    """The number of bytes of the positions: 8 or 12 bits each."""
    count = self.blocks * self.k
    return count if self.width <= 256 else 3 * -(-count // 2)

  @property
  def bytes(self) -> int:
    """The number of bytes of the positions and the codes."""
    return self.places + -(-self.blocks * self.k // 4)


class Payload(NamedTuple):
  codes: jax.Array  # uint8 [bytes]: positions, then codes
  table: jax.Array  # float32 [4]


def plan(shape: tuple[int, ...]) -> Plan:
  """Returns the sizes of the encoding of a leaf."""
  size = 1
  for length in shape:
    size *= length
  blocks = -(-size // BLOCK)
  width = -(-size // blocks)
  return Plan(shape, size, blocks, width, max(1, round(K * width / BLOCK)))


def encode(x: jax.Array, plan: Plan) -> tuple[Payload, jax.Array]:
  """Encodes a leaf; returns the payload, and the part of the leaf that is not sent."""
  flat = jnp.pad(x.reshape(-1), (0, plan.blocks * plan.width - plan.size))
  blocks = flat.reshape(plan.blocks, plan.width)
  _, places = jax.lax.top_k(jnp.abs(blocks), plan.k)
  values = jnp.take_along_axis(blocks, places, axis=1)
  codes, table = quantized(values)
  left = blocks.at[jnp.arange(plan.blocks)[:, None], places].add(-table[codes])
  packed = jnp.concatenate([packed_places(places, plan), packed_codes(codes)])
  return Payload(packed, table), left.reshape(-1)[: plan.size].reshape(plan.shape)


def mean(payloads: jax.Array, tables: jax.Array, plan: Plan) -> jax.Array:
  """Decodes the payloads [W, bytes] of all workers with their tables [W, 4], and averages them."""
  workers, count = len(payloads), plan.blocks * plan.k
  places = jax.vmap(lambda packed: unpacked_places(packed, plan))(payloads[:, : plan.places])
  bits = payloads[:, plan.places :, None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8) & 3
  codes = bits.reshape(workers, -1)[:, :count]
  values = jnp.take_along_axis(tables, codes.astype(jnp.int32), axis=1) / workers
  starts = jnp.repeat(plan.width * jnp.arange(plan.blocks), plan.k)
  total = (
    jnp.zeros(plan.blocks * plan.width).at[(places + starts).reshape(-1)].add(values.reshape(-1))
  )
  return total[: plan.size].reshape(plan.shape)


def quantized(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns each value's bin, one of four of 1.5 standard deviations each, and the bins' means."""
  center, step = jnp.mean(values), 1.5 * jnp.std(values)
  codes = jnp.clip(jnp.floor((values - center) / jnp.maximum(step, 1e-30) + 0.5) + 2, 0, 3)
  codes = codes.astype(jnp.uint8)
  inside = [codes == code for code in range(4)]
  table = [jnp.sum(jnp.where(one, values, 0)) / jnp.maximum(jnp.sum(one), 1) for one in inside]
  return codes, jnp.stack(table)


def packed_places(places: jax.Array, plan: Plan) -> jax.Array:
  """Packs two positions of 12 bits into three bytes, or positions of 8 bits into one byte each."""
  flat = places.reshape(-1)
  if plan.width <= 256:
    return flat.astype(jnp.uint8)
  first, second = jnp.pad(flat, (0, flat.size % 2)).reshape(-1, 2).T
  three = first & 255, first >> 8 | (second & 15) << 4, second >> 4
  return jnp.stack(three, axis=1).astype(jnp.uint8).reshape(-1)


def unpacked_places(packed: jax.Array, plan: Plan) -> jax.Array:
  """Inverts `packed_places`."""
  if plan.width <= 256:
    return packed.astype(jnp.int32)
  a, b, c = packed.astype(jnp.int32).reshape(-1, 3).T
  both = jnp.stack([a | (b & 15) << 8, b >> 4 | c << 4], axis=1)
  return both.reshape(-1)[: plan.blocks * plan.k]


def packed_codes(codes: jax.Array) -> jax.Array:
  """Packs four codes of 2 bits into one byte."""
  flat = codes.reshape(-1)
  four = jnp.pad(flat, (0, -flat.size % 4)).reshape(-1, 4)
  return jnp.sum(four << jnp.arange(0, 8, 2, dtype=jnp.uint8), axis=1, dtype=jnp.uint8)
