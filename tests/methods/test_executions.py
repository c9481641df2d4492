"""One algorithm, every execution: simulated, pmap, shard_map, slices, fsdp and cohorts agree."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from catalogue import BASIC, EXACT, METHODS, SYNCHRONOUS, by_period
from problems import Running, distance
from side_by_side import regressions, side_by_side
from subset import slow_except

SIMULATED = {"data": 8}
# Under `simulate` and `spmd`, compression is compared in `test_composition.py`.
BY_PERIOD = by_period([name for name in BASIC if name not in ("top_k", "two_phase")])
IN_PMAP = by_period(BASIC)


def together(names: Sequence[str], steps: int, *arguments: Any, **more: Any) -> Running:
  """So many steps of the table's methods of these names."""
  methods = {name: METHODS[name] for name in names}
  (period,) = {method.local_steps for method in methods.values()}
  task = regressions(tuple(names))
  return Running(side_by_side(methods), *arguments, task=task, **more).rounds(-(-steps // period))


UNEQUAL = (30, 20, 40, 30, 10, 50, 30, 30)  # examples of each worker


@functools.cache
def simulated(names: tuple[str, ...]) -> Running:
  """Twenty steps of methods with rounds of equal length, on mini-batches."""
  return together(names, 20, "simulate", SIMULATED, UNEQUAL)


@pytest.mark.parametrize("period", BY_PERIOD)
def test_executions_agree(period):
  """With a device for each worker, in two slices; other methods in `test_method_contracts.py`."""
  agree(BY_PERIOD[period], "spmd", {"slice": 2, "data": 4})


@pytest.mark.parametrize("period", slow_except([2], IN_PMAP))
def test_executions_agree_in_pmap(period):
  agree(IN_PMAP[period], "pmap", SIMULATED)


def agree(names: tuple[str, ...], executor: str, axes: dict[str, int]) -> None:
  """Holds an execution against the simulated one."""
  want = simulated(names)
  got = together(names, 20, executor, axes, UNEQUAL)
  for name in names:
    assert distance(got.params()[name], want.params()[name]) <= 1e-5, name
  np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=1e-4)
  assert bool(got.metrics["finite"])


def test_executions_agree_on_all_examples():
  """Full batches of unequal sizes, masked: the other way of fetching examples."""
  want = Running(METHODS["momentum"], "simulate", SIMULATED, UNEQUAL, None).rounds(20)
  got = Running(METHODS["momentum"], "spmd", SIMULATED, UNEQUAL, None).rounds(20)
  assert distance(got.params(), want.params()) <= 1e-5


@pytest.mark.parametrize("name", slow_except((), ("drifting", "residual")))
def test_cohorts_agree(name):
  """Four workers serve 12 clients, one of its three each per round; private rows stay theirs."""
  sizes = (20, 10, 30) * 4
  want = Running(METHODS[name], "simulate", {"data": 4}, sizes).rounds(10)
  got = Running(METHODS[name], "spmd", {"data": 4}, sizes).rounds(10)
  assert distance(got.params(), want.params()) <= 1e-5
  private = jax.tree.leaves(want.layout.state)
  rows = [x for x, p in zip(jax.tree.leaves(want.state.method), private, strict=True) if p]
  assert all(x.shape[0] == 12 for x in rows)
  assert rows


CUT = by_period([*SYNCHRONOUS, "residual"])


@pytest.mark.slow
@pytest.mark.parametrize("period", CUT)
def test_fsdp_inside_a_worker_changes_nothing(period):
  """But that what is compressed is so by block, which a simulation of the same mesh does too."""
  names, sizes, mesh = CUT[period], (60,) * 4, {"data": 4, "fsdp": 2}
  got = together(names, 20, "spmd", mesh, sizes)
  for axes, some in (
    ({"data": 4}, [name for name in names if name in EXACT]),
    (mesh, [name for name in names if name not in EXACT]),
  ):
    if some:
      want = together(some, 20, "simulate", axes, sizes).params()
      for name in some:
        assert distance(got.params()[name], want[name]) <= 1e-5, name
  for name in names:
    state = got.state.method[name]
    weights = state.inner.params if name == "averaged" else state.params
    assert "fsdp" in weights["w"].sharding.spec


@pytest.mark.slow
def test_gradients_are_clipped_whole_where_a_mesh_cuts_them():
  arguments = ((60,) * 4, 8, 0.5)
  want = Running(METHODS["drifting"], "simulate", {"data": 4}, *arguments).rounds(20)
  got = Running(METHODS["drifting"], "spmd", {"data": 4, "fsdp": 2}, *arguments).rounds(20)
  assert distance(got.params(), want.params()) <= 1e-5
