"""NoLoCo: its recursion in numpy, when it reaches consensus, and what it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import regression

from research.aggregate.gossip import gossip
from research.comm.mixing import mixing
from research.comm.topology import random_pairs
from research.methods.noloco import noloco
from research.parallel import inference, traffic
from research.parallel.job import Job

PAIRS = gossip(random_pairs())


def rounds_of(method, targets: np.ndarray, keys: jax.Array) -> np.ndarray:
  """Models [rounds, W, n] of workers that minimize ||x - target||^2 / 2 from zero."""

  def worker(target):
    def one(state, key):
      local = method.begin(state)
      for _ in range(method.local_steps):
        grads = local.params - target
        local = method.step(grads, local, state, key=key)
      state = method.sync(local, state, key=key)
      return state, state.params

    return jax.lax.scan(one, method.init(jnp.zeros_like(target)), keys)[1]

  run = jax.jit(jax.vmap(worker, axis_name="data", out_axes=1))
  return np.asarray(run(jnp.asarray(targets, jnp.float32)), np.float64)


def test_three_rounds_equal_numpy():
  targets = np.random.default_rng(0).normal(size=(6, 3))
  keys = jax.random.split(jax.random.key(1), 3)
  method = noloco(optax.sgd(0.3), PAIRS, period=2, slow_learning_rate=0.6, consensus=0.8)
  matrices, x, momentum = mixing(random_pairs(), 6), np.zeros((6, 3)), np.zeros((6, 3))
  for key, got in zip(keys, rounds_of(method, targets, keys), strict=True):
    w = matrices[int(jax.random.randint(key, (), 0, 5))]
    local = x
    for _ in range(2):
      local = local - 0.3 * (local - targets)
    momentum = 0.5 * momentum + 0.6 * w @ (local - x) + 0.8 * (w @ x - x)
    x = x + momentum
    np.testing.assert_allclose(got, x, atol=1e-6)


def test_the_deviations_contract_up_to_the_stated_consensus_step():
  """The second moments of (phi, delta) for many workers, one pair drawn for each."""

  def radius(a: float, c: float) -> float:
    square, cross = [c * c / 2, -a * c, a * a], np.array([-c / 2, a, 0])  # E delta'^2, E phi delta'
    matrix = np.stack([[1, 0, 0] + 2 * cross + square, cross + square, np.asarray(square)])
    return np.abs(np.linalg.eigvals(matrix)).max()

  for a in (0.0, 0.3, 0.5, 0.9):
    limit = 2 * (1 - a * a)
    assert radius(a, 0.99 * limit) < 1 < radius(a, 1.01 * limit)
    assert radius(a, 1e-3) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "links"), [(2, 1), (5, 4 / 5), (8, 1), (16, 1)])
def test_a_worker_sends_two_trees_for_any_number_of_workers(workers, links):
  job = Job(
    noloco(optax.sgd(0.1), PAIRS, period=2),
    regression(),
    {"data": workers},
    np.full(workers, 240 // workers),
    None,
  )
  found = traffic.of_method(job, inference.layout_of(job), 3)
  np.testing.assert_allclose(found.sent, 2 * links * 21 * 4)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"slow_momentum": 1.0}, r"slow_momentum=1.0 is not in \[0, 1\)"),
    ({"consensus": 0.0}, "consensus=0.0 is not above 0"),
    ({"consensus": 1.5}, "consensus=1.5 is not below .* = 1.5; the workers' models would drift"),
  ],
)
def test_ranges_are_checked_when_built(arguments, words):
  with pytest.raises(ValueError, match=words):
    noloco(optax.sgd(0.1), PAIRS, **arguments)
