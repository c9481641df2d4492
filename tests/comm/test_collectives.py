"""Exchanges of values that are equal on all workers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subset import slow_except

from research.comm import collectives
from research.training import loop
from research.training.config import Config


def test_rows_that_are_equal_on_all_workers_are_exchanged():
  """Under `vmap` without a batch dimension, which JAX's own rule gives another shape."""
  x = jnp.arange(12.0).reshape(4, 3)
  over = lambda in_axes: jax.vmap(
    lambda x: collectives.exchange(x, ("data",)), in_axes, axis_name="data", axis_size=4
  )
  together, apart = over(None)(x), over(0)(jnp.stack([x] * 4))
  assert together.shape == (4, 4, 3)
  np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize(
  "method",
  slow_except(
    ["extra(0.1, two_phase(int8()))"],
    ["dgd(0.1, two_phase(int8()))", "extra(0.1, two_phase(int8()))", "easgd(sgd(0.1), krum(1))"],
  ),
)
def test_models_that_begin_equal_are_exchanged(method, tmp_path):
  flags = {"task": "mean_estimation(16, 4)", "mesh": "data:8", "batch_size": 8, "steps": 20}
  summary, _ = loop.train(Config(method=method, out=str(tmp_path / "run"), **flags))
  assert summary["steps"] == 20
  assert summary["train_loss"] != summary["initial_train_loss"]
