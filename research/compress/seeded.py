"""Randomness that a worker does not share: its seed is sent along."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.base import Compressor, Tree


class Seeded(NamedTuple):
  payload: Tree  # of the inner compressor
  seed: jax.Array  # uint32 []


class SeededCompressor(Compressor, name="seeded"):
  """The inner compressor with its shared draws made anew for each worker: its payload and 4 bytes.

      C_i(x) = C_inner(x; s_i),   s_i uniform, drawn by worker i and sent

  What workers draw alike, such as the support of random-k, leaves out the same of all of them: then
  the error of a mean is as large as that of one value, and what workers disagree in cancels before
  it is compressed. Here errors are independent, and W workers average them. Payloads may no longer
  be summed; unbiased and contractive are the same as before.

  Args:
    inner: one that draws from the shared key, such as random_k, count_sketch or hadamard.

  Reference: Mishchenko et al. 2019, arXiv:1901.09269, section 2, whose workers draw independently.
  """

  inner: Compressor

  @property
  def contractive(self):
    return self.inner.contractive

  @property
  def sparse(self):
    return self.inner.sparse

  def encode(self, x, shared, own):
    seed = jax.random.bits(own, (), jnp.uint32)
    return Seeded(self.inner.encode(x, jax.random.fold_in(shared, seed), own), seed)

  def decode(self, payload, like, shared):
    key = jax.random.fold_in(shared, payload.seed)
    return self.inner.decode(payload.payload, like, key)


seeded = SeededCompressor
