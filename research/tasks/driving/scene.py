"""Computes what a driver perceives: the path ahead, and other vehicles now and in the future.

This module reads the vehicles and the road network of highway-env without importing the package.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NEIGHBOURS = 8  # number of vehicles that a driver perceives: the nearest ones
RANGE = 100.0  # metres
STEP = 0.25  # seconds between two predicted positions
HORIZON = 4.0  # seconds
TIMES = np.arange(0, HORIZON + STEP / 2, STEP)
FEATURES = 10  # per vehicle
LENGTH, WIDTH, LANE = 5.0, 2.0, 4.0  # metres: a vehicle's length and width, a lane's width
SETTLING = 1.0  # seconds in which another vehicle reaches the middle of its lane
SPACING = 2.0  # metres between two points of a path
_REACH = 140.0  # length of a path in metres
_NEAR = 2.5  # a vehicle within this many metres of the ego's path is in its way


class Scene(NamedTuple):
  """Contains the ego vehicle and its K nearest neighbours, in road coordinates and metres."""

  vehicle: Any  # the ego vehicle of the simulator
  path: np.ndarray  # [P, 3], x, y and heading along the ego's lane and route, every 2 m
  lateral: float  # offset of the ego from its path
  lanes: tuple[bool, bool]  # whether the ego can enter a lane on the left, on the right
  limit: float  # the highest speed that the ego can choose, m/s
  others: np.ndarray  # [K, 4]: x, y, heading and speed
  predicted: np.ndarray  # [K, T, 3], x, y and heading at TIMES
  follows: np.ndarray  # [K], whether a neighbour follows the ego on its lane


Driver = Callable[[Scene], int]  # chooses an action


class Way(NamedTuple):
  """Contains consecutive lanes, and the distance from the first lane's start to each lane's end."""

  lanes: list[Any]
  ends: np.ndarray
  start: float  # position of the vehicle along the first lane
  lateral: float


def perceive(vehicle: Any) -> Scene:
  """Builds the scene around a vehicle.

  The prediction assumes that every other vehicle keeps its speed and follows its route or, during a
  lane change, its target lane, which its indicators would show.

  Args:
    vehicle: the ego, an `MDPVehicle` of highway-env on its road.
  """
  road = vehicle.road
  way = _way(vehicle, _REACH)
  path = np.array([_place(way, s, 0.0) for s in np.arange(0, _REACH, SPACING)])
  near = sorted(
    (float(np.hypot(*(other.position - vehicle.position))), n)
    for n, other in enumerate(road.vehicles)
    if other is not vehicle
  )
  seen = [road.vehicles[n] for distance, n in near[:NEIGHBOURS] if distance < RANGE]
  others = [(*o.position, o.heading, o.speed) for o in seen]
  ways = [_way(other, max(other.speed, 1.0) * HORIZON) for other in seen]
  return Scene(
    vehicle,
    path,
    way.lateral,
    _beside(vehicle),
    float(vehicle.target_speeds[-1]),
    np.array(others).reshape(-1, 4),
    np.array([_predicted(*pair) for pair in zip(seen, ways, strict=True)]).reshape(
      -1, len(TIMES), 3
    ),
    np.array([_is_behind(other, way) for other in ways], bool),
  )


def features(scene: Scene) -> np.ndarray:
  """Converts a scene to float32 features [1 + NEIGHBOURS, FEATURES] of order one.

  Rows without a vehicle are zero.

  Row 0 is the ego: 1; its speed, its target speed and the highest speed; whether there is a lane on
  the left and on the right; its offset and its heading relative to its path; and how much the path
  turns within 15 and 30 m. The other rows are the neighbours, the nearest first: 1; the position
  and the relative velocity in the ego's frame; the cosine and sine of the relative heading; and the
  neighbour's row of `conflicts`.
  """
  ego, path = scene.vehicle, scene.path
  found = np.zeros((1 + NEIGHBOURS, FEATURES), np.float32)
  turn = _wrapped(path[[0, 7, 15], 2] - np.array([ego.heading, path[0, 2], path[0, 2]]))
  speeds = np.array([ego.speed, ego.target_speed, scene.limit]) / 30
  found[0] = [1, *speeds, *scene.lanes, scene.lateral / LANE, *(turn * [2, 1, 1])]
  if not len(scene.others):
    return found
  cos, sin = np.cos(ego.heading), np.sin(ego.heading)
  into = np.array([[cos, sin], [-sin, cos]])
  place = (scene.others[:, :2] - ego.position) @ into.T
  heading = scene.others[:, 2]
  velocity = scene.others[:, 3:4] * np.stack([np.cos(heading), np.sin(heading)], 1)
  velocity = (velocity - ego.speed * np.array([cos, sin])) @ into.T
  relative = heading - ego.heading
  found[1 : 1 + len(place)] = np.column_stack(
    [
      np.ones(len(place)),
      place / [50, 20],
      velocity / 15,
      np.cos(relative),
      np.sin(relative),
      conflicts(scene),
    ]
  )
  return found


def conflicts(scene: Scene) -> np.ndarray:
  """Computes where and when each neighbour is in the ego's way, [K, 3].

  A neighbour is in the way if its predicted position is within 2.5 m of the ego's path. The columns
  are the distance along the path, divided by 50 m, and the times at which the neighbour enters and
  leaves the path, divided by HORIZON. A neighbour that is never in the way has the row (2, 1, 1).
  """
  found = np.tile([2.0, 1.0, 1.0], (len(scene.others), 1))
  gaps = scene.predicted[:, :, None, :2] - scene.path[None, None, :, :2]  # [K, T, P, 2]
  distance = np.hypot(gaps[..., 0], gaps[..., 1])
  inside = distance.min(2) < _NEAR  # [K, T]
  for k in np.flatnonzero(inside.any(1)):
    times = np.flatnonzero(inside[k])
    along = distance[k, times[0]].argmin() * SPACING
    found[k] = along / 50, TIMES[times[0]] / HORIZON, TIMES[times[-1]] / HORIZON
  return found


def headway(scene: Scene) -> float:
  """Returns the time to the vehicle ahead in seconds; infinite if none is within 100 m."""
  gaps = scene.others[:, None, :2] - scene.path[None, :, :2]
  distance = np.hypot(gaps[..., 0], gaps[..., 1])
  ahead = distance.argmin(1) * SPACING
  leads = (distance.min(1) < WIDTH) & (ahead > LENGTH / 2)
  if not leads.any() or scene.vehicle.speed < 1:
    return np.inf
  return float(max(ahead[leads].min() - LENGTH, 0) / scene.vehicle.speed)


def _way(vehicle: Any, reach: float) -> Way:
  """Returns the lanes that a vehicle will follow: those of its route, or the nearest ones ahead."""
  network, index = vehicle.road.network, vehicle.target_lane_index
  route = list(vehicle.route or [])
  lanes = [network.get_lane(index)]
  start, lateral = lanes[0].local_coordinates(vehicle.position)
  ends = [lanes[0].length]
  while ends[-1] < start + reach:
    following = network.graph.get(index[1], {})
    planned = [step[1] for step in route if step[0] == index[1]]
    if not following or (route and not planned):
      break
    last = lanes[-1]
    to = planned[0] if planned else min(following, key=lambda t: _jump(last, following[t]))
    number = _nearest(last, following[to], index[2])
    index = (index[1], to, number)
    lanes.append(following[to][number])
    ends.append(ends[-1] + lanes[-1].length)
  return Way(lanes, np.array(ends), start, lateral)


def _jump(lane: Any, following: list[Any]) -> float:
  return min(other.distance(lane.position(lane.length, 0)) for other in following)


def _nearest(lane: Any, following: list[Any], number: int) -> int:
  """Returns the number of the lane that continues `lane`."""
  end = lane.position(lane.length, 0)
  distance = [abs(other.local_coordinates(end)[1]) for other in following]
  return min(range(len(following)), key=lambda n: (round(distance[n], 3), n != number))


def _place(way: Way, ahead: float, lateral: float) -> tuple[float, float, float]:
  """Returns the position and heading `ahead` metres ahead; the last lane is extended straight."""
  along = way.start + ahead
  n = min(int(np.searchsorted(way.ends, along)), len(way.lanes) - 1)
  lane = way.lanes[n]
  own = along - (way.ends[n] - lane.length)
  beyond = max(own - lane.length, 0.0)
  x, y = lane.position(own - beyond, lateral)
  heading = lane.heading_at(own - beyond)
  return x + beyond * np.cos(heading), y + beyond * np.sin(heading), heading


def _is_behind(other: Way, ego: Way) -> bool:
  """Returns whether another vehicle is behind the ego and will drive along the ego's lane."""
  places = [n for n, lane in enumerate(other.lanes) if lane is ego.lanes[0]]
  if not places:
    return False
  begins = other.ends[places[0]] - ego.lanes[0].length
  return other.start < begins + ego.start


def _predicted(other: Any, way: Way) -> np.ndarray:
  """Predicts the positions and headings [T, 3] of another vehicle at TIMES."""
  if other.crashed:
    return np.tile([*other.position, other.heading], (len(TIMES), 1))
  sideways = way.lateral * np.exp(-TIMES / SETTLING)
  pairs = zip(other.speed * TIMES, sideways, strict=True)
  return np.array([_place(way, ahead, lateral) for ahead, lateral in pairs])


def _beside(vehicle: Any) -> tuple[bool, bool]:
  """Returns whether the ego can change to the lane on its left and on its right."""
  network, index = vehicle.road.network, vehicle.target_lane_index
  count = len(network.graph[index[0]][index[1]])
  free = lambda n: (
    0 <= n < count and bool(network.get_lane((*index[:2], n)).is_reachable_from(vehicle.position))
  )
  return free(index[2] - 1), free(index[2] + 1)


def _wrapped(angle: np.ndarray) -> np.ndarray:
  return (angle + np.pi) % (2 * np.pi) - np.pi
