"""The mean over the senders of a cosine coefficient, and DeMo with it, in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from research.aggregate.dct_mean import dct_mean
from research.aggregate.mean import mean
from research.core import registry
from research.core.base import EVERYONE, Presence
from research.methods.demo import demo

W, SHAPE = 4, (6, 4)
X = np.random.default_rng(0).normal(size=(W, *SHAPE))
X[1, :2, :2] = 0  # a block without a gradient


def blocks() -> list[tuple[slice, slice]]:
  return [np.s_[i : i + 2, j : j + 2] for i, j in itertools.product(range(0, 6, 2), range(0, 4, 2))]


def largest(x: np.ndarray) -> np.ndarray:
  """The spectrum of each 2 x 2 block, only its two largest coefficients."""
  found = np.zeros(SHAPE)
  for block in blocks():
    spectrum = np.array(scipy.fft.dctn(x[block], norm="ortho"))
    spectrum.flat[np.argsort(np.abs(spectrum), axis=None)[:-2]] = 0
    found[block] = spectrum
  return found


def inverse(spectrum: np.ndarray) -> np.ndarray:
  found = np.zeros(SHAPE)
  for block in blocks():
    found[block] = np.array(scipy.fft.idctn(spectrum[block], norm="ortho"))
  return found


def by_hand(rows: np.ndarray, one_bit: bool) -> np.ndarray:
  q = np.stack([largest(x) for x in rows])
  total = (np.sign(q) if one_bit else q).sum(0)
  return inverse(total / np.maximum((q != 0).sum(0), 1))


def aggregated(one_bit: bool, presence=EVERYONE):
  one = lambda x, p: dct_mean(2, 2, one_bit=one_bit).aggregate(x, (), jax.random.key(0), p)
  axes = (0, None if presence is EVERYONE else 0)
  run = jax.jit(jax.vmap(one, axes, axis_name="data", axis_size=W))
  return run(jnp.asarray(X, jnp.float32), presence)


@pytest.mark.parametrize("one_bit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_coefficient_is_averaged_over_its_senders(one_bit):
  value, sent, _ = aggregated(one_bit)
  for worker in range(W):
    np.testing.assert_allclose(value[worker], by_hand(X, one_bit), atol=1e-6)
    np.testing.assert_allclose(sent[worker], inverse(largest(X[worker])), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("one_bit", [False, True])
def test_an_absent_worker_sends_nothing(one_bit):
  there = jnp.asarray([True, True, False, True])
  value, _, _ = aggregated(one_bit, Presence(jnp.where(there, 4 / 3, 0.0), there))
  np.testing.assert_allclose(value[0], by_hand(X[[0, 1, 3]], one_bit), atol=1e-6)


def test_a_payload_of_bits_is_small():
  sizes = {}
  for one_bit in (False, True):
    aggregator = dct_mean(64, 8, one_bit=one_bit)
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    payload = jax.eval_shape(aggregator.compressor.encode, x, *[jax.random.key(0)] * 2)
    message = jax.eval_shape(aggregator._message, x, payload)
    sizes[one_bit] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(message))
  assert sizes == {False: 2 * 8 * 4 + 2 * 12, True: 2 + 2 * 12}


def test_demo_with_all_options_equals_numpy():
  """Mean over senders, weight decay and lookahead, on ||x - target||^2 / 2."""
  targets, schedule = np.random.default_rng(1).normal(size=(W, *SHAPE)), lambda t: 0.1 / (1 + t)
  method = demo(schedule, dct_mean(2, 2), decay=0.9, weight_decay=0.2, lookahead=True)

  def worker(target):
    def one(state, key):
      local = method.begin(state)
      local = method.step(local.params - target, local, state, key=key)
      state = method.sync(local, state, key=key)
      return state, state.params

    keys = jax.random.split(jax.random.key(0), 4)
    return jax.lax.scan(one, method.init(jnp.zeros_like(target)), keys)[1]

  run = jax.jit(jax.vmap(worker, axis_name="data", out_axes=1))
  found = run(jnp.asarray(targets, jnp.float32))
  x, m = np.zeros(SHAPE), np.zeros((W, *SHAPE))
  for t, got in enumerate(found):
    ahead = x - schedule(max(t - 1, 0)) * np.sign(m)
    m = 0.9 * m + (ahead - targets)
    q = np.stack([inverse(largest(row)) for row in m])
    direction = np.sign(by_hand(m, one_bit=False))
    m = m - q
    x = x - schedule(t) * (direction + 0.2 * x)
    np.testing.assert_allclose(got[0], x, atol=1e-5)


def test_what_is_refused():
  with pytest.raises(ValueError, match="k=1 is not at least 2"):
    dct_mean(64, 1, one_bit=True)
  with pytest.raises(ValueError, match=r"error_feedback cannot be combined .* \(selects\)"):
    registry.build("aggregator", "error_feedback(dct_mean())")
  with pytest.raises(ValueError, match=r"demo cannot be combined with this aggregator \(selects\)"):
    registry.build("method", "demo(0.1, median())")
  with pytest.raises(ValueError, match="weight_decay=-1 is not at least 0"):
    demo(0.1, mean(), weight_decay=-1)
