"""The hand-written parts of steps: put together, they are the library's methods."""

import jax
import numpy as np
import pytest

from experiments.baselines import by_hand_parts, by_hand_top_k
from experiments.benchmarks import parts
from research.compress.block_top_k import block_top_k
from research.optim.muon import orthogonalized

SMALL = "transformer('tiny', layers=1, width=32, heads=2, kv_heads=2, hidden=48, dtype='float32')"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "dion", "sparse_loco"])
def test_two_steps_by_hand_are_two_rounds(name):
  pair = parts.pair(name, SMALL)
  for _ in range(2):
    pair.whole()
    pair.by_hand.step()
  assert pair.difference() <= parts.TOLERANCE


def test_block_top_k_by_hand_is_the_compressor():
  x, key = jax.random.normal(jax.random.key(0), (130, 65)), jax.random.key(1)
  plan, ours = by_hand_top_k.plan(x.shape), block_top_k()

  def by_hand(x):
    payload, left = by_hand_top_k.encode(x, plan)
    return by_hand_top_k.mean(payload.codes[None], payload.table[None], plan), left

  def decoded(x):
    return ours.decode(ours.encode(x, key, key), jax.ShapeDtypeStruct(x.shape, x.dtype), key)

  mean, left = jax.jit(by_hand)(x)
  expected = jax.jit(decoded)(x)
  np.testing.assert_allclose(mean, expected, atol=1e-6)
  np.testing.assert_allclose(left, x - expected, atol=1e-6)


def test_newton_schulz_by_hand_is_that_of_muon():
  x = jax.random.normal(jax.random.key(0), (12, 8))
  by_hand = jax.jit(by_hand_parts.newton_schulz)(x)
  np.testing.assert_allclose(by_hand, jax.jit(orthogonalized, static_argnums=1)(x, 5), atol=1e-5)
