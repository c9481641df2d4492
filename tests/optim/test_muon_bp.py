"""MuonBP on one device: Muon with a rate of its own for the steps between two exchanges."""

import numpy as np
import optax
import pytest

from research.core import registry
from research.optim.muon import muon
from research.optim.muon_bp import muon_bp


def test_steps_between_exchanges_have_their_own_rate():
  draw = np.random.default_rng(0)
  params, *grads = ({"w": draw.normal(size=(4, 6)).astype(np.float32)} for _ in range(4))
  one, other = muon_bp(0.1, 0.02, period=3), muon(optax.piecewise_constant_schedule(0.1, {1: 0.2}))
  states = [tx.init(params) for tx in (one, other)]
  for of_step in grads:
    got, states[0] = one.update(of_step, states[0], params)
    want, states[1] = other.update(of_step, states[1], params)
    np.testing.assert_allclose(got["w"], want["w"], rtol=0, atol=1e-6)


def test_wrong_values_are_rejected():
  for spec in ("muon_bp(0.1, period=0)", "muon_bp(0.1, beta=-1.0)"):
    with pytest.raises(ValueError, match="muon_bp"):
      registry.build("optimizer", spec)
