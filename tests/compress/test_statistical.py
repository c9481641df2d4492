"""The statistical quantizer: its equation, the mean of each bin, tables by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compress.packing import unpack
from research.compress.statistical import statistical

KEY = jax.random.key(0)


def sent(compressor, x):
  """What is sent for x, and what the receivers make of it."""

  @jax.jit
  def both(x):
    payload = compressor.encode(x, KEY, KEY)
    return payload, compressor.decode(payload, jax.ShapeDtypeStruct(x.shape, x.dtype), KEY)

  payload, decoded = both(x)
  return payload, np.asarray(decoded)


def in_numpy(x, bits):
  """The codes of one block and the values that they are decoded to."""
  count, x = 2**bits, x.astype(np.float64)
  codes = np.floor((x - x.mean()) * count / (6 * x.std()) + 0.5) + count // 2
  codes = np.clip(codes, 0, count - 1).astype(int)
  means = np.bincount(codes, x, count) / np.maximum(np.bincount(codes, minlength=count), 1)
  return codes, means[codes]


@pytest.mark.parametrize(("bits", "error"), [(2, 0.18), (4, 0.012)])
def test_elements_are_sent_as_the_mean_of_their_bin(bits, error):
  """With these errors for Gaussian numbers, in units of the variance."""
  x = np.random.default_rng(bits).standard_normal(10_000).astype(np.float32) * 3 + 1
  codes, want = in_numpy(x, bits)
  payload, got = sent(statistical(bits), jnp.asarray(x))
  np.testing.assert_array_equal(unpack(payload.codes, bits, len(x)), codes)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert payload.table.shape == (1, 2**bits)
  assert got.sum() == pytest.approx(x.sum(), rel=1e-5)
  assert np.mean((got - x) ** 2) / x.var() == pytest.approx(error, rel=0.1)


def test_each_block_has_a_table():
  x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
  x *= np.asarray([[1], [10], [0.1], [100]], np.float32)
  want = np.stack([in_numpy(row, 2)[1] for row in x])
  payload, got = sent(statistical(2, block=64), jnp.asarray(x))
  assert payload.table.shape == (4, 4)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
