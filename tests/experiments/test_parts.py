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
@pytest.mark.parametrize("name", parts.CASES)
def test_two_steps_by_hand_are_two_rounds(name):
  pair = parts.pair(name, SMALL)
  for _ in range(2):
    pair.whole()
    pair.by_hand.step()
  whole, by_hand = pair.params(), jax.device_get(pair.by_hand.values["params"])
  assert whole.keys() == by_hand.keys()
  largest = max(np.max(np.abs(x)) for x in whole.values())
  assert max(np.max(np.abs(whole[at] - by_hand[at])) for at in whole) <= 1e-5 * largest


@pytest.mark.parametrize("shape", [(130, 65), (48,)])
def test_block_top_k_by_hand_is_the_compressor(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  plan, key = by_hand_top_k.plan(shape), jax.random.key(1)
  payload, left = by_hand_top_k.encode(x, plan)
  mean = by_hand_top_k.mean(payload.codes[None], payload.table[None], plan)
  ours = block_top_k()
  decoded = ours.decode(ours.encode(x, key, key), jax.ShapeDtypeStruct(shape, x.dtype), key)
  np.testing.assert_allclose(mean, decoded, atol=1e-6)
  np.testing.assert_allclose(left, x - decoded, atol=1e-6)


def test_newton_schulz_by_hand_is_that_of_muon():
  x = jax.random.normal(jax.random.key(0), (12, 8))
  np.testing.assert_allclose(by_hand_parts.newton_schulz(x), orthogonalized(x, 5), atol=1e-5)
