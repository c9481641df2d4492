"""Rounds that start with the previous round's exchange compute what rounds in sequence compute."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from problems import Running
from test_overlapped import UNEVEN, Hasty, Relaxed, assert_same, running, state_of

from research.aggregate.mean import mean
from research.analysis import compiled, wire
from research.core import registry
from research.methods.late import Late
from research.parallel import pipelined

EACH_KIND = ("fragments", "beyond", "memory", "eager memory", "overlap")


def same_rounds(name: str, monkeypatch, rtol: float = 0.0, **given) -> tuple[Running, Running]:
  want = running(name, "spmd", **given).rounds(1, 4, 1, 4)
  monkeypatch.setattr(pipelined, "overlaps", lambda job, layout, mesh: True)
  got = running(name, "spmd", **given).rounds(1, 4, 1, 4)
  assert_same(got.params(), want.params(), rtol)
  assert_same(jax.device_get(got.metrics), jax.device_get(want.metrics), rtol)
  # one program rounds once what two fused programs round twice
  assert_same(state_of(got), state_of(want), rtol=1e-5)
  return want, got


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_KIND)
def test_dispatches_equal_those_in_sequence(name, monkeypatch):
  """Over dispatches of two lengths, which start at different fragments."""
  same_rounds(name, monkeypatch, rtol=1e-5 if name == "eager memory" else 0.0)


@pytest.mark.slow
def test_unequal_weights_and_several_devices(monkeypatch):
  same_rounds("memory", monkeypatch, sizes=UNEVEN[:2], axes={"data": 2, "fsdp": 2})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beyond", "eager"])
def test_each_round_exchanges_once(name, monkeypatch):
  def sent(run: Running) -> dict[str, float]:
    program = run.executor.run.trace(run.state, run.data, rounds=5).lower().compile()
    return wire.by_axis(compiled.traffic(program, run.state.round.sharding.mesh))

  want = sent(running(name, "spmd"))
  monkeypatch.setattr(pipelined, "overlaps", lambda job, layout, mesh: True)
  assert sent(running(name, "spmd")) == want


def test_cpus_run_rounds_in_sequence():
  run = running("late", "spmd")
  assert not pipelined.overlaps(run.job, run.executor.layout, run.state.round.sharding.mesh)
  assert pipelined.rounds_shown(run.executor.run) == 1


CHIPS: Any = SimpleNamespace(devices=np.asarray([SimpleNamespace(platform="tpu")]))


@pytest.mark.parametrize("name", ["late", "eager"])
def test_chips_run_late_exchanges_early(name):
  run = running(name, "simulate")
  assert pipelined.overlaps(run.job, run.executor.layout, CHIPS)


def test_a_method_that_needs_its_result_at_once_runs_in_sequence():
  """It says that it is eager; the first local step of a round uses the centre."""
  run = Running(Hasty(optax.sgd(0.1), mean(), period=4), "simulate", {"data": 4}, (30,) * 4)
  assert not pipelined.overlaps(run.job, run.executor.layout, CHIPS)


@pytest.mark.slow
def test_a_method_of_another_package_whose_local_is_its_state(monkeypatch):
  aggregator = registry.build("aggregator", "error_feedback(gather_mean(top_k(0.3)))")
  method = Late(Relaxed(0.1, aggregator, period=3), 2)
  run = lambda: Running(method, "spmd", {"data": 4}, UNEVEN).rounds(4, 1)
  want = run()
  monkeypatch.setattr(pipelined, "overlaps", lambda job, layout, mesh: True)
  assert_same(run().params(), want.params())
