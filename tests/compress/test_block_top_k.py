"""Block top-k: its bytes, and its equation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from research.compress.block_top_k import block_top_k

KEY = jax.random.key(0)


def test_a_block_takes_112_bytes_and_a_leaf_a_table_of_16():
  for blocks in (1, 3, 1000):
    x = jax.ShapeDtypeStruct((blocks, 64, 64), jnp.float32)
    payload = jax.eval_shape(block_top_k().encode, x, KEY, KEY)
    assert payload.places.size + payload.codes.size == 112 * blocks
    assert payload.table.size * 4 == 16


def test_the_largest_of_each_block_are_sent_with_two_bits():
  x = np.random.default_rng(0).standard_normal(3 * 64 - 2).astype(np.float32)
  compressor = block_top_k(8, block=64)
  send = lambda x: compressor.decode(compressor.encode(x, KEY, KEY), x, KEY)
  got = np.asarray(jax.jit(send)(jnp.asarray(x)))
  blocks = np.pad(x, (0, 2)).reshape(3, 64)
  at = np.argsort(-np.abs(blocks), axis=1)[:, :8]
  values = np.take_along_axis(blocks, at, 1).ravel().astype(np.float64)
  bins = np.clip(np.floor((values - values.mean()) / (1.5 * values.std()) + 0.5) + 2, 0, 3)
  means = np.array([values[bins == code].mean() for code in bins])
  want = np.zeros(blocks.shape)
  np.put_along_axis(want, at, means.reshape(3, 8), 1)
  np.testing.assert_allclose(got, want.ravel()[: len(x)], atol=1e-6)
  assert len(np.unique(got)) <= 5
