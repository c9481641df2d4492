"""One algorithm, every execution: simulated, pmap, shard_map, slices, fsdp and cohorts agree."""

import jax
import numpy as np
import pytest
from problems import Running, distance
from table import EXACT, METHODS, NAMES

SIMULATED = {"data": 8}


def rounds_of(name: str, steps: int) -> int:
  return -(-steps // METHODS[name].period)


@pytest.mark.parametrize("name", NAMES)
def test_executions_agree(name):
  """Twenty steps on mini-batches, with workers that hold different numbers of examples."""
  sizes = (30, 20, 40, 30, 10, 50, 30, 30)
  count = rounds_of(name, 20)
  want = Running(METHODS[name], "simulate", SIMULATED, sizes).rounds(count)
  for executor, axes in (
    ("spmd", SIMULATED),
    ("pmap", SIMULATED),
    ("spmd", {"slice": 2, "data": 4}),
    ("simulate", {"slice": 2, "data": 4}),
  ):
    got = Running(METHODS[name], executor, axes, sizes).rounds(count)
    assert distance(got.params(), want.params()) <= 1e-5, (executor, axes)
    np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=1e-4)
    assert bool(got.metrics["finite"])


@pytest.mark.parametrize("executor", ["spmd", "pmap"])
def test_executions_agree_on_all_examples(executor):
  """Full batches of unequal sizes, masked: the other way of fetching examples."""
  sizes = (30, 20, 40, 30, 10, 50, 30, 30)
  want = Running(METHODS["momentum"], "simulate", SIMULATED, sizes, None).rounds(20)
  got = Running(METHODS["momentum"], executor, SIMULATED, sizes, None).rounds(20)
  assert distance(got.params(), want.params()) <= 1e-5


@pytest.mark.parametrize("name", ["momentum", "drifting", "residual"])
def test_cohorts_agree(name):
  """Four workers serve 12 clients, one of its three each per round; private rows stay theirs."""
  sizes = (20, 10, 30) * 4
  want = Running(METHODS[name], "simulate", {"data": 4}, sizes).rounds(10)
  got = Running(METHODS[name], "spmd", {"data": 4}, sizes).rounds(10)
  assert distance(got.params(), want.params()) <= 1e-5
  private = jax.tree.leaves(want.layout.state)
  rows = [x for x, p in zip(jax.tree.leaves(want.state.method), private, strict=True) if p]
  assert all(x.shape[0] == 12 for x in rows)
  assert bool(rows) == (name != "momentum")


@pytest.mark.parametrize("name", NAMES)
def test_fsdp_inside_a_worker_changes_nothing(name):
  """But that what is compressed is so by block, which a simulation of the same mesh does too."""
  count = rounds_of(name, 20)
  sizes, mesh = (60,) * 4, {"data": 4, "fsdp": 2}
  simulated = {"data": 4} if name in EXACT else mesh
  want = Running(METHODS[name], "simulate", simulated, sizes, clip_norm=0.5).rounds(count)
  got = Running(METHODS[name], "spmd", mesh, sizes, clip_norm=0.5).rounds(count)
  assert distance(got.params(), want.params()) <= 1e-5
  weights = got.state.method.inner.params if name == "averaged" else got.state.method.params
  assert "fsdp" in weights["w"].sharding.spec
