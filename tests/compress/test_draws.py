"""The hash that stochastic rounding draws from: its statistics, and that all executions agree."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research.comm import collectives
from research.comm import mesh as meshes
from research.compress.draws import random_bits, uniform

N = 2**18
# Standard errors: all tests of this file together exceed five of them once in 10,000 keys.
FAR = 5.0


def bits(seed: int, count: int = N) -> np.ndarray:
  return np.asarray(jax.jit(random_bits, static_argnums=1)(jax.random.key(seed), (count,)))


def as_signs(x: np.ndarray) -> np.ndarray:
  """The 32 bits of each word, -1 or 1: [n, 32]."""
  return 2 * np.unpackbits(x.view(np.uint8)).reshape(-1, 32).astype(np.float32) - 1


def deviations(counts: np.ndarray) -> float:
  """How many standard deviations chi^2 of equally likely cells lies from its mean."""
  expected = counts.sum() / counts.size
  chi2 = ((counts - expected) ** 2 / expected).sum()
  return (chi2 - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


def test_it_is_the_equation():
  key, words = jax.random.key(3), 0xFFFFFFFF

  def mix(x):
    x = (x ^ x >> 16) * 0x21F0AAAD & words
    x = (x ^ x >> 15) * 0xD35A2D97 & words
    return x ^ x >> 15

  first, second = map(int, jax.random.bits(key, (2,), jnp.uint32))
  want = [mix(mix((i + first) & words) ^ second) for i in range(12)]
  assert random_bits(key, (3, 4)).reshape(-1).tolist() == want
  assert uniform(key, (12,)).tolist() == [(x >> 8) / 2**24 for x in want]


@pytest.mark.parametrize("seed", [0, 1])
def test_words_are_balanced_and_do_not_depend_on_their_neighbours(seed):
  x = bits(seed)
  u = (x >> 8) / 2**24 - 0.5
  assert abs(u.mean()) * math.sqrt(12 * N) < FAR
  assert abs((u**2).mean() - 1 / 12) * math.sqrt(180 * N) < FAR
  for lag in (1, 2, 3, 8, 64, 128, 256, 1000, 4096):
    assert abs(np.mean(u[lag:] * u[:-lag])) * 12 * math.sqrt(N - lag) < FAR, lag
  signs = as_signs(x)
  assert np.abs(signs.mean(0)).max() * math.sqrt(N) < FAR
  for lag in (0, 1, 256):
    pairs = signs[lag:].T @ signs[: N - lag] / math.sqrt(N - lag)
    assert np.abs(pairs - math.sqrt(N - lag) * (lag == 0) * np.eye(32)).max() < FAR + 1, lag
  for shift in (0, 8, 16, 24):
    byte = x >> np.uint32(shift) & np.uint32(255)
    assert abs(deviations(np.bincount(byte, minlength=256))) < FAR
    together = byte[1:].astype(int) << 8 | byte[:-1]
    assert abs(deviations(np.bincount(together, minlength=2**16))) < FAR


def test_keys_of_leaves_workers_and_rounds_are_independent():
  root = jax.random.key(0)
  of_leaves = [jax.random.fold_in(root, leaf) for leaf in range(3)]
  of_workers = [collectives.key_of(root, jnp.int32(worker)) for worker in range(2)]
  keys = [root, *of_leaves, *of_workers, jax.random.key(1)]
  draw = jax.jit(lambda key: random_bits(key, (N,)))
  streams = [np.asarray(draw(key)) for key in keys]
  for i, one in enumerate(streams):
    for other in streams[:i]:
      differ = as_signs(one ^ other)
      assert np.abs(differ.mean(0)).max() * math.sqrt(N) < FAR
      byte = (one >> np.uint32(24)).astype(int) << 8 | other >> np.uint32(24)
      assert abs(deviations(np.bincount(byte, minlength=2**16))) < FAR


def test_batches_of_keys_and_shards_draw_the_same():
  keys = jax.random.split(jax.random.key(1), 4)
  draw = lambda key: random_bits(key, (64, 3))
  want = np.stack([draw(key) for key in keys])
  np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), want)
  np.testing.assert_array_equal(jax.pmap(draw)(keys), want)
  mesh = meshes.device_mesh({"data": 4}, jax.devices()[:4])
  per_worker = jax.shard_map(
    lambda key: draw(key[0])[None],
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P("data"),
    check_vma=False,
  )
  np.testing.assert_array_equal(jax.jit(per_worker)(keys), want)
  cut = jax.jit(draw, out_shardings=jax.sharding.NamedSharding(mesh, P("data")))
  np.testing.assert_array_equal(cut(keys[0]), want[0])
