"""Driving: the recording, the task and its fleets, and drivers in the simulator."""

import json
import types
from typing import Any

import jax
import numpy as np
import pytest

from research.core import registry
from research.models.ego_attention import ego_attention
from research.tasks import partition
from research.tasks.driving import driving, episodes, experts, judging, recorded, scenarios, scene

OUTCOME = episodes.Outcome(False, True, 100.0, 10.0, 2.0)


def made_up(environment, name, seed, driver, expert=None):
  """An episode without a simulator: four scenes that depend on the scenario and the seed."""
  del environment, driver, expert
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(4, 1 + scene.NEIGHBOURS, scene.FEATURES)).astype(np.float32)
  x[:, 0, 1] = [*scenarios.SCENARIOS].index(name)
  return episodes.Drive(OUTCOME, x, rng.integers(0, 5, 4).astype(np.int8))


@pytest.fixture
def driven(monkeypatch):
  """The seeds that are driven."""
  seeds = []

  def drive(environment, name, seed, *rest):
    seeds.append((name, seed))
    return made_up(environment, name, seed, *rest)

  monkeypatch.setattr(scenarios, "make", lambda name: None)
  monkeypatch.setattr(episodes, "drive", drive)
  return seeds


def record(folder, names=tuple(scenarios.SCENARIOS), count=20, number=0):
  return recorded.record(folder, names, count, experts.planner, experts.planner, number)


def test_a_recording_is_resumed_and_hashed(tmp_path, driven):
  whole = record(tmp_path / "whole", count=30)
  del driven[:]
  record(tmp_path / "parts", count=10)
  assert len(driven) == 4 * 10
  block = tmp_path / "parts" / "0-merge-00000.npz"
  block.write_bytes(block.read_bytes()[:-1])  # as if the disk had been full
  with pytest.raises(ValueError, match=r"0-merge-00000\.npz is missing or not as recorded"):
    list(recorded.blocks(tmp_path / "parts"))
  del driven[:]
  assert record(tmp_path / "parts", count=30) == whole
  assert len(driven) == 4 * 20 + 10
  del driven[:]
  assert record(tmp_path / "parts", count=30) == whole
  assert driven == []


def test_rounds_and_held_out_episodes_have_seeds_of_their_own(tmp_path, driven):
  record(tmp_path, count=10)
  record(tmp_path, count=10, number=1)
  judging.judge(experts.planner, "merge", 10)
  assert len({*driven}) == len(driven)


def test_the_task_has_a_fleet_for_each_scenario(tmp_path, driven):
  record(tmp_path)
  record(tmp_path, count=10, number=1)
  model = registry.build("model", "ego_attention(width=8)")
  task = driving.driving(str(tmp_path), model=model)
  assert task.train["x"].shape == (4 * 18 * 4, 9, 10)
  assert task.test
  assert len(task.test["y"]) == 4 * 2 * 4  # every tenth episode
  for number, part in enumerate(partition.by_owner()(task.by, 4, 0)):
    assert {*task.train["x"][part][:, 0, 1]} == {float(number)}
  with pytest.raises(ValueError, match="4 owners of the examples for 3 workers"):
    partition.by_owner()(task.by, 3, 0)
  assert len(driving.driving(str(tmp_path), 1, model=model).train["y"]) == 4 * 28 * 4
  alone = driving.driving(str(tmp_path), only="roundabout", model=model)
  assert {*alone.train["x"][:, 0, 1]} == {2.0}
  assert alone.test
  assert len(alone.test["y"]) == len(task.test["y"])
  found: list[str] = []
  jax.eval_shape(lambda: found.extend(task.measure(task.init(jax.random.key(0)))))
  assert found == [f"accuracy {name}" for name in scenarios.SCENARIOS]


def test_what_a_recording_does_not_have_is_said(tmp_path, driven):
  model = registry.build("model", "mlp()")
  with pytest.raises(ValueError, match="has no recorded driving"):
    driving.driving(str(tmp_path / "none"), model=model)
  record(tmp_path, ["merge"], 10)
  with pytest.raises(ValueError, match="0 rounds of DAgger"):
    driving.driving(str(tmp_path), rounds=1, model=model)
  with pytest.raises(ValueError, match="has only merge"):
    driving.driving(str(tmp_path), only="highway", model=model)
  with pytest.raises(ValueError, match="did you mean 'highway'"):
    driving.driving(str(tmp_path), only="higway", model=model)
  (tmp_path / recorded.INDEX).write_text(json.dumps([]))
  with pytest.raises(ValueError, match="lists no blocks"):
    driving.driving(str(tmp_path), model=model)


def test_attention_does_not_depend_on_the_order_or_number_of_neighbours():
  x = np.random.default_rng(0).normal(size=(2, 9, 10)).astype(np.float32)
  x[:, 6:] = 0
  module: Any = ego_attention(8)(5)
  order = [0, 3, 1, 7, 2, 5, 4, 8, 6]

  @jax.jit
  def found(x):
    params = module.init(jax.random.key(0), x)
    return [module.apply(params, seen) for seen in (x, x[:, np.array(order)], x[:, :6])]

  expected, reordered, fewer = found(x)
  np.testing.assert_allclose(reordered, expected, atol=1e-6)
  np.testing.assert_allclose(fewer, expected, atol=1e-6)
  with pytest.raises(ValueError, match="multiple of heads=3"):
    ego_attention(8, 3)


def test_intervals():
  assert judging.wilson(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)
  low = judging.wilson(0, 20)
  assert (low.value, low.low) == (0, pytest.approx(0, abs=1e-12))
  crashes, metres = np.array([1.0, 0, 0, 0] * 25), np.full(100, 200.0)
  found = judging.bootstrapped(1e5 * crashes, metres)
  assert found.value == pytest.approx(125)
  deviation = 1e5 / 200 * np.sqrt(0.25 * 0.75 / 100)
  assert found.low == pytest.approx(125 - 1.96 * deviation, abs=10)
  assert found.high == pytest.approx(125 + 1.96 * deviation, abs=10)
  both = judging.measures([OUTCOME, OUTCOME._replace(crashed=True, success=False, headway=np.nan)])
  assert both["collisions per 100 km"].value == pytest.approx(1e5 / 200)
  assert (both["speed"].value, both["headway"].value, both["success"].value) == (10, 2, 0.5)


def still(x, y, heading=0.0, speed=0.0):
  """A vehicle that stays, and what a driver 10 m/s behind it perceives."""
  ego = types.SimpleNamespace(
    position=np.zeros(2), heading=0.0, speed=10.0, target_speed=10.0, lane_index=("a", "b", 0)
  )
  path = np.stack([np.arange(0, 140, 2.0), np.zeros(70), np.zeros(70)], 1)
  place = np.tile([x, y, heading], (1, len(scene.TIMES), 1))
  place[0, :, 0] += speed * scene.TIMES
  others = np.array([[x, y, heading, speed]])
  return scene.Scene(ego, path, 0.0, (False, False), 20.0, others, place, np.array([x < 0]))


@pytest.mark.parametrize(
  ("seen", "action"),
  [
    (still(15.0, 0.0), experts.SLOWER),  # a wreck ahead
    (still(15.0, 4.0), experts.FASTER),  # on the other lane
    (still(-8.0, 0.0, speed=15.0), experts.FASTER),  # behind: it will brake
    (still(30.0, 0.0)._replace(lanes=(True, False)), experts.LEFT),
  ],
)
def test_the_planner_avoids_what_is_ahead(seen, action):
  assert experts.planner(seen) == action


def test_features_say_when_a_neighbour_is_in_the_way():
  found = scene.features(still(20.0, 0.0))
  assert found.shape == (1 + scene.NEIGHBOURS, scene.FEATURES)
  np.testing.assert_allclose(found[1], [1, 0.4, 0, -10 / 15, 0, 1, 0, 20 / 50, 0, 1], atol=1e-6)
  assert not found[2:].any()
  assert scene.headway(still(20.0, 0.0)) == pytest.approx(1.3, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_an_episode_is_a_function_of_its_seed(name):
  """Also after an episode of the intersection, which changes the class of its vehicles."""
  first = judging.judge(experts.planner, name, 1)
  judging.judge(experts.idm, "intersection", 1)
  assert judging.judge(experts.planner, name, 1) == first
  assert first[0].metres > 20
