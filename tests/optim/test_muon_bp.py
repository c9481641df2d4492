"""MuonBP on one device: Muon with a rate of its own for the steps between two exchanges."""

import jax
import numpy as np
import optax
import pytest

from research.core import registry
from research.optim.muon import muon
from research.optim.muon_bp import muon_bp


def test_steps_between_exchanges_have_their_own_rate():
  draw = np.random.default_rng(0)
  params, *grads = ({"w": draw.normal(size=(4, 6)).astype(np.float32)} for _ in range(3))
  one, other = muon_bp(0.1, 0.02, period=2), muon(optax.piecewise_constant_schedule(0.1, {1: 0.2}))

  def both(states, of_step):
    pairs = [tx.update(of_step, s, params) for tx, s in zip((one, other), states, strict=True)]
    return [state for _, state in pairs], [jax.tree.leaves(updates)[0] for updates, _ in pairs]

  states, step = [tx.init(params) for tx in (one, other)], jax.jit(both)
  for of_step in grads:
    states, (got, want) = step(states, of_step)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_wrong_values_are_rejected():
  for spec in ("muon_bp(0.1, period=0)", "muon_bp(0.1, beta=-1.0)"):
    with pytest.raises(ValueError, match="muon_bp"):
      registry.build("optimizer", spec)
