"""Independent randomness per worker: each worker sends its seed with the payload."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.base import Compressor, Tree


class Seeded(NamedTuple):
  payload: Tree  # payload of the inner compressor
  seed: jax.Array  # uint32 []


class SeededCompressor(Compressor, name="seeded"):
  """Makes the inner compressor's shared draws independent per worker, for 4 more bytes.

      C_i(x) = C_inner(x; s_i),   s_i uniform, drawn by worker i and sent

  With shared draws, such as the support of random-k, all workers drop the same elements. The error
  of the mean is then as large as that of a single worker's value, although differences between
  workers cancel before compression. With independent draws, the errors average over W workers. The
  payloads can no longer be summed. The compressor remains unbiased or contractive if the inner
  compressor is.

  Args:
    inner: a compressor that draws from the shared key, such as random_k, count_sketch or hadamard.

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
