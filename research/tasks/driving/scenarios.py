"""Defines the scenarios in which fleets drive: roads of highway-env with the same five actions.

Only the extra `driving` installs the simulator, which is imported when `make` is called.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np

DECISIONS = 2  # decisions per second
FRAMES = 6  # frames of the simulation per second


class Scenario(NamedTuple):
  """Describes a road, the goal on this road, and the time limit."""

  environment: str  # module and class in highway_env.envs
  limit: float  # the highest speed that the ego can choose, m/s
  seconds: float
  config: dict[str, Any]
  goal: str  # the last road of the ego; "" means to drive until the time limit


PICTURE = {"screen_width": 600, "screen_height": 300}  # pixels
CONNECTED = {"neighbour_vehicles_connected_lanes": True}
# In the order of the fleets' numbers.
SCENARIOS: dict[str, Scenario] = {
  "highway": Scenario(
    "highway_env.HighwayEnvFast",
    30.0,
    20.0,
    {"lanes_count": 3, "vehicles_count": 15, "vehicles_density": 1.2},
    "",
  ),
  "merge": Scenario("merge_env.MergeGenericEnv", 30.0, 25.0, {"vehicles_count": 6}, "d"),
  "roundabout": Scenario(
    "roundabout_env.RoundaboutGenericEnv", 15.0, 20.0, {"vehicles_count": 6}, "nxs"
  ),
  "intersection": Scenario(
    "intersection_env.IntersectionEnv",
    10.0,
    20.0,
    {"spawn_probability": 0.2, "destination": None},
    "o",
  ),
}


def make(name: str, picture: bool = False) -> Any:
  """Creates the environment of a scenario; reset it with a seed before use.

  Args:
    name: the name of the scenario, one of SCENARIOS.
    picture: whether the environment must be able to render.

  Raises:
    ModuleNotFoundError: if highway-env is not installed.
  """
  found = SCENARIOS[name]
  module, kind = found.environment.split(".")
  made = getattr(importlib.import_module(f"highway_env.envs.{module}"), kind)
  speeds = np.arange(0, found.limit + 1, 5.0)
  config = {
    "simulation_frequency": FRAMES,
    "policy_frequency": DECISIONS,
    "duration": found.seconds,
    "observation": {"type": "AttributesObservation", "attributes": ["time"]},
    "action": {"type": "DiscreteMetaAction", "target_speeds": speeds},
    "other_vehicles_type": f"research.tasks.driving.traffic.{name.capitalize()}",
    **CONNECTED,
    **found.config,
    **(PICTURE if picture else {}),
  }
  return made(config=config, render_mode="rgb_array" if picture else None)


def arrived(name: str, vehicle: Any) -> bool:
  """Returns whether the ego has reached the last road of its scenario.

  Args:
    name: the scenario.
    vehicle: the ego.
  """
  start, end, _ = vehicle.lane_index
  goal = SCENARIOS[name].goal
  if goal == "o":  # one of the intersection's four exits
    return start.startswith("il") and vehicle.lane.local_coordinates(vehicle.position)[0] > 10
  if goal == "d":
    return end == goal and vehicle.lane.local_coordinates(vehicle.position)[0] > 50
  return bool(goal) and end == goal and vehicle.lane.local_coordinates(vehicle.position)[0] > 5
