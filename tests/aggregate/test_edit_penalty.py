"""EDiT's penalty: its recursion in numpy, and what an outlier does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.aggregate.edit_penalty import edit_penalty
from research.aggregate.mean import mean
from research.core.base import EVERYONE, Presence

W = 4


def rounds_of(aggregator, steps: np.ndarray, presence: Any = EVERYONE) -> np.ndarray:
  """The values [rounds, n] of steps [rounds, W, n]; they are equal on all workers."""

  def worker(values, presence):
    state, found = aggregator.init(values[0]), []
    for x in values:
      value, _, state = aggregator.aggregate(x, state, jax.random.key(0), presence)
      found.append(value)
    return jnp.stack(found)

  axes = (1, None if presence is EVERYONE else 0)
  run = jax.jit(jax.vmap(worker, axes, axis_name="data", axis_size=W))
  everyone = np.asarray(run(jnp.asarray(steps, jnp.float32), presence))
  np.testing.assert_array_equal(everyone, np.broadcast_to(everyone[:1], everyone.shape))
  return everyone[0]


def by_hand(steps: np.ndarray, delta, alpha, warm_up, tau, phi):
  mean_, variance = np.zeros(W), np.zeros(W)
  for t, x in enumerate(steps):
    norms = np.linalg.norm(x, axis=1)
    limit = mean_ + delta * np.sqrt(variance)
    limit = np.where((t >= warm_up) & (variance > 0), limit, np.inf)
    w = np.where(norms <= limit, np.exp(-norms / tau), 0)
    value = (w[:, None] * x).sum(0) / max(w.sum(), 1e-30)
    yield value * min(1, phi / max(np.linalg.norm(value), 1e-30))
    counted = np.minimum(norms, limit)
    change = counted - mean_ if t else np.zeros(W)
    mean_ = mean_ + alpha * change if t else counted
    variance = (1 - alpha) * (variance + alpha * change**2)


def test_rounds_equal_numpy():
  """With outliers in some rounds, and values above and below the largest norm."""
  steps = np.random.default_rng(0).normal(size=(6, W, 5))
  arguments = {"delta": 0.5, "alpha": 0.3, "warm_up": 2, "tau": 0.7, "phi": 1.0}
  aggregator = edit_penalty(mean(), threshold=0.5, decay=0.3, warm_up=2, temperature=0.7, clip=1.0)
  want = [*by_hand(steps, **arguments)]
  np.testing.assert_allclose(rounds_of(aggregator, steps), want, atol=1e-6)
  everyone_in = [*by_hand(steps, **arguments | {"delta": 1e6})]
  assert not np.allclose(want, everyone_in)
  norms = np.linalg.norm(want, axis=1)
  assert norms.min() < 0.99
  assert norms.max() == pytest.approx(1.0)


@pytest.mark.slow
def test_an_outlier_is_left_out_and_all_of_them_are_nothing():
  rng = np.random.default_rng(1)
  steps = 1 + 0.01 * rng.normal(size=(12, W, 5))
  steps[-3, 0] *= 100
  steps[-2, 1] = np.nan
  steps[-1] *= 100
  aggregator = edit_penalty(mean(), warm_up=5, decay=0.1, temperature=np.inf)
  found = rounds_of(aggregator, steps)
  np.testing.assert_allclose(found[:-3], steps[:-3].mean(1), rtol=1e-5)
  np.testing.assert_allclose(found[-3], steps[-3, 1:].mean(0), rtol=1e-5)
  np.testing.assert_allclose(found[-2], steps[-2, [0, 2, 3]].mean(0), rtol=1e-5)
  np.testing.assert_array_equal(found[-1], 0)


@pytest.mark.slow
def test_an_absent_worker_does_not_count():
  steps = np.random.default_rng(2).normal(size=(1, W, 5))
  there = Presence(jnp.asarray([2.0, 1.0, 0.0, 1.0]), jnp.asarray([True, True, False, True]))
  found = rounds_of(edit_penalty(mean(), temperature=np.inf), steps, there)
  np.testing.assert_allclose(found[0], steps[0, [0, 1, 3]].mean(0), rtol=1e-5)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"threshold": 0.0}, "threshold=0.0 is not above 0"),
    ({"decay": 1.0}, r"decay=1.0 is not in \(0, 1\)"),
    ({"warm_up": 0}, "warm_up=0 is not at least 1"),
    ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
    ({"clip": 0.0}, "clip=0.0 is not above 0"),
  ],
)
def test_ranges_are_checked_when_built(arguments, words):
  with pytest.raises(ValueError, match=words):
    edit_penalty(mean(), **arguments)
