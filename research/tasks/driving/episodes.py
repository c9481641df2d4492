"""Drives episodes in closed loop, and records the scenes and the expert's actions in them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from research.tasks.driving import scenarios
from research.tasks.driving.scene import FEATURES, NEIGHBOURS, Driver, features, headway, perceive


class Outcome(NamedTuple):
  """Describes how an episode ended."""

  crashed: bool
  success: bool  # reached the goal without a collision
  metres: float
  seconds: float
  headway: float  # mean seconds to the vehicle ahead, over decisions that have one; or nan


class Drive(NamedTuple):
  """Contains an episode's outcome, and the scene and the expert's action at every decision."""

  outcome: Outcome
  x: np.ndarray  # float32 [n, 1 + NEIGHBOURS, FEATURES]
  y: np.ndarray  # int8 [n], the expert's actions


def drive(
  environment: Any,
  name: str,
  seed: int,
  driver: Driver,
  expert: Driver | None = None,
  watch: Callable[[Any], None] = lambda environment: None,
) -> Drive:
  """Drives one episode until a collision, the goal, or the end of the scenario's time.

  Args:
    environment: an environment from `scenarios.make`.
    name: the environment's scenario.
    seed: the seed of the traffic; the seed and the driver together determine the episode.
    driver: the driver that chooses the actions.
    expert: the driver whose actions are recorded; None means `driver`.
    watch: a function that is called with the environment before every decision.
  """
  environment.reset(seed=seed)
  vehicle, rows, actions, headways = environment.vehicle, [], [], []
  metres = seconds = 0.0
  success = False
  while not (vehicle.crashed or success or seconds >= scenarios.SCENARIOS[name].seconds):
    watch(environment)
    scene = perceive(vehicle)
    action = driver(scene)
    rows.append(features(scene))
    actions.append(action if expert is None else expert(scene))
    headways.append(headway(scene))
    before = vehicle.position.copy()
    environment.step(action)
    metres += float(np.hypot(*(vehicle.position - before)))
    seconds += 1 / scenarios.DECISIONS
    success = not vehicle.crashed and scenarios.arrived(name, vehicle)
  success |= not (vehicle.crashed or scenarios.SCENARIOS[name].goal)
  near = [value for value in headways if np.isfinite(value)]
  mean = float(np.mean(near)) if near else np.nan
  outcome = Outcome(bool(vehicle.crashed), bool(success), metres, seconds, mean)
  x = np.array(rows, np.float32).reshape(-1, 1 + NEIGHBOURS, FEATURES)
  return Drive(outcome, x, np.array(actions, np.int8))
