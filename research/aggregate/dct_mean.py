"""Averages each cosine coefficient over the workers that sent it: the exchange of DeMo's code."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.link import struct_of
from research.aggregate.presence import weighted
from research.comm import collectives
from research.compress.dct import Coefficients, DCTTopK
from research.compress.packing import pack, unpack
from research.compress.sparsify import position_bits
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  Key,
  Trait,
  Tree,
)


class Signed(NamedTuple):
  signs: Array  # uint8, packed: whether a coefficient is negative
  positions: Array  # uint8, packed: the position of each coefficient in its block


class DCTMean(Aggregator, name="dct_mean"):
  """Averages each of the largest DCT coefficients over its senders, not over all workers.

      q_i = S_k(D x_i D^T) of each block,   n_c = sum of weight_i over all i with q_i_c not 0
      value = D^T v D,   v_c = 1/n_c sum_i weight_i q_i_c
                         or, with one bit, 1/n_c sum_i weight_i sign(q_i_c)

  The value is multiplied by the mean weight of all W workers, which is one unless some are absent.
  D and S_k are those of `dct_top_k`. Use this aggregator in `demo`: a coefficient that only one
  worker sends counts as much as a coefficient that all workers send. A worker's `sent` is D^T q_i D
  with or without one bit, so `demo` subtracts exact values from the momentum. With one bit, a
  payload has 13/8 k bytes per block of 64 x 64 elements instead of k (itemsize + 3/2). A bit cannot
  represent zero: a block of zeros sends k equal positions, which receivers ignore. Blocks of one
  element send values.

  Args:
    chunk: maximum side of a block.
    k: the number of coefficients to send per block; a smaller block sends all its coefficients.
    one_bit: whether to send signs instead of values; requires k >= 2.
    axis: the worker axes.

  Raises:
    ValueError: if chunk or k is out of range.

  Reference: Peng, Quesnelle, Kingma 2024, arXiv 2411.19870, and the authors' code; one bit: the
    code of Psyche.
  """

  chunk: int = 64
  k: int = 8
  _: KW_ONLY
  one_bit: bool = False
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.SELECTS | Trait.DENSE

  def check(self):
    self.compressor.check()
    if self.one_bit and self.k < 2:
      raise ValueError(f"k={self.k} is not at least 2; one_bit needs two to send a block of zeros")

  @property
  def compressor(self) -> DCTTopK:
    """Returns the compressor that selects the coefficients."""
    return DCTTopK(self.chunk, self.k)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    leaves, treedef = jax.tree.flatten(weighted(tree, presence))
    payloads = [self.compressor.encode(x, key, key) for x in leaves]
    messages = list(map(self._message, leaves, payloads))
    weight = jnp.asarray(jnp.where(presence.active, presence.weight, 0), jnp.float32)
    everyone, weights = collectives.gather((messages, weight), self.axis)
    args = zip(leaves, payloads, everyone, strict=True)
    values = [self._mean(x, own, (of, weights), key) for x, own, of in args]
    decode = lambda x, payload: self.compressor.decode(payload, struct_of(x), key)
    sent = list(map(decode, leaves, payloads))
    return Aggregate(treedef.unflatten(values), treedef.unflatten(sent), state)

  def _size(self, x: Array, key: Key) -> int:
    """Returns the number of coefficients of a block."""
    every = DCTTopK(self.chunk, self.chunk**2)
    return jax.eval_shape(every.encode, struct_of(x), key, key).values.shape[1]

  def _as_signs(self, payload: Coefficients) -> bool:
    return self.one_bit and payload.values.shape[1] > 1

  def _message(self, x: Array, payload: Coefficients) -> Tree:
    if not self._as_signs(payload):
      return payload
    values = payload.values
    bits = position_bits(self._size(x, jax.random.key(0)))
    positions = unpack(payload.positions, bits, values.size).reshape(values.shape)
    positions = jnp.where(jnp.any(values != 0, 1, keepdims=True), positions, 0)
    signs = (values < 0).astype(jnp.uint8).reshape(-1)
    return Signed(pack(signs, 1), pack(positions.reshape(-1), bits))

  def _mean(self, x: Array, payload: Coefficients, everyone: Tree, key: Key) -> Array:
    """Computes a leaf's mean over senders; `everyone` holds all messages and weights [W, ...]."""
    size, shape = self._size(x, key), payload.values.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows = jnp.arange(shape[0])[:, None]

    def read(message: Tree, weight: Array) -> tuple[Array, Array]:
      codes = unpack(message.positions, position_bits(size), payload.values.size)
      positions = codes.reshape(shape).astype(jnp.int32)
      if not self._as_signs(payload):
        return message.values.astype(wide), positions
      negative = unpack(message.signs, 1, payload.values.size).reshape(shape)
      something = jnp.any(positions != positions[:, :1], 1, keepdims=True)
      return jnp.where(something, weight * (1 - 2 * negative.astype(wide)), 0), positions

    def count(counts: Array, of: tuple[Tree, Array]) -> tuple[Array, None]:
      values, positions = read(*of)
      return counts.at[rows, positions].add(jnp.where(values != 0, of[1], 0)), None

    def add(total: Array, of: tuple[Tree, Array]) -> tuple[Array, None]:
      (message, _), (values, positions) = of, read(*of)
      number = counts[rows, positions]
      values = values * jnp.mean(everyone[1]) / jnp.where(number > 0, number, 1)
      part = Coefficients(values, message.positions)
      return total + self.compressor.decode(part, jax.ShapeDtypeStruct(x.shape, wide), key), None

    counts, _ = lax.scan(count, jnp.zeros((shape[0], size), wide), everyone)
    return lax.scan(add, jnp.zeros(x.shape, wide), everyone)[0].astype(x.dtype)


dct_mean = DCTMean
