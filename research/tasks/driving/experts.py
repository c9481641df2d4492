"""Implements expert drivers: a tree search over actions, and the simulator's IDM and MOBIL."""

import itertools

import numpy as np

from research.tasks.driving.scene import HORIZON, LANE, LENGTH, SPACING, STEP, TIMES, Driver, Scene

LEFT, IDLE, RIGHT, FASTER, SLOWER = range(5)  # the simulator's actions
ACTIONS = 5
UNIT = 5.0  # m/s between two consecutive target speeds of the ego
LAG, SIDEWAYS = 0.6, 0.7  # time constants of the ego's speed and of its lateral position, seconds
_STAGES = 4  # number of one-second stages; the action is constant within a stage
_PLANS = np.array(
  [*itertools.product(range(ACTIONS), *[(IDLE, FASTER, SLOWER)] * (_STAGES - 1))]
)  # [S, _STAGES]: only the first action changes the lane
_CIRCLES = np.array([-1.25, 1.25])  # metres along a vehicle: centres of two circles that cover it
_RADIUS = 1.6
_PACES = ((1.0, 10.0), (0.7, 1.0), (1.3, 1.0))  # relative speeds of the others, and penalties


def planner(scene: Scene) -> int:
  """Searches a tree of actions over the next four seconds and returns the best first action.

  A node is the state of the ego after it has held an action for one second. Each of the four levels
  has three actions that change or keep the speed; the first level also has the two lane changes.
  The ego's speed and offset approach their targets exponentially, and the other vehicles move as
  predicted in the scene. The value of a leaf is the mean speed of the plan, relative to the highest
  speed, minus three penalties: for a collision, which costs more if it happens earlier; for a
  headway below one second; and for a lane change. Among plans with a collision, a lower speed is
  better. A collision that would happen only if the other vehicles were 30% slower or faster counts
  a tenth. Unless the ego changes lanes, vehicles behind it in its lane are expected to brake.

  Args:
    scene: the scene that the driver perceives.
  """
  speed, along, lateral = _moves(scene)
  progress = np.mean(speed, 1) / scene.limit
  grid = np.arange(len(scene.path)) * SPACING
  x, y, heading = (np.interp(along, grid, c) for c in _unwrapped(scene.path).T)
  place = np.stack([x - lateral * np.sin(heading), y + lateral * np.cos(heading)], -1)
  changes = np.isin(_PLANS[:, 0], (LEFT, RIGHT))
  risk = _risk(scene, place, heading, speed, changes) if len(scene.others) else np.zeros(1)
  value = np.where(risk >= _PACES[0][1], -progress, progress) - risk
  value -= 0.1 * changes + 0.01 * np.isin(_PLANS[:, 0], (FASTER, SLOWER))
  possible = np.array([scene.lanes[0], True, scene.lanes[1], True, True])[_PLANS[:, 0]]
  return int(_PLANS[np.argmax(np.where(possible, value, -np.inf)), 0])


def _moves(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the speed, distance and lateral offset of each plan at TIMES[1:], each [S, T - 1]."""
  ego, count = scene.vehicle, len(_PLANS)
  speed = np.full(count, max(ego.speed, 0.0))
  target = np.full(count, float(ego.target_speed))
  along, lateral = np.zeros(count), np.full(count, scene.lateral)
  goal = LANE * ((_PLANS[:, 0] == RIGHT) * 1.0 - (_PLANS[:, 0] == LEFT))
  rows = []
  for stage in range(_STAGES):
    action, index = _PLANS[:, stage], np.round(speed / UNIT)
    change = (action == FASTER) * 1.0 - (action == SLOWER)
    target = np.where(change == 0, target, np.clip((index + change) * UNIT, 0, scene.limit))
    for _ in range(round(HORIZON / _STAGES / STEP)):
      before = speed
      speed = target + (speed - target) * np.exp(-STEP / LAG)
      along = along + STEP * (before + speed) / 2
      lateral = goal + (lateral - goal) * np.exp(-STEP / SIDEWAYS)
      rows.append((speed, along, lateral))
  speed, along, lateral = (np.stack(column, 1) for column in zip(*rows, strict=True))
  return speed, along, lateral


def _risk(
  scene: Scene, place: np.ndarray, heading: np.ndarray, speed: np.ndarray, changes: np.ndarray
) -> np.ndarray:
  """Returns each plan's penalty [S] for collisions and short headways."""
  counts = changes[:, None] | ~scene.follows[None]  # [S, K]
  way = np.stack([np.cos(heading), np.sin(heading)], -1)[:, :, None]  # [S, T, 1, 2]
  ticks = np.arange(1, len(TIMES))
  total = np.zeros(len(place))
  for pace, weight in _PACES:
    then = np.minimum(np.round(ticks * pace).astype(int), len(TIMES) - 1)
    others = scene.predicted[:, then].transpose(1, 0, 2)[None]  # [1, T, K, 3]
    theirs = np.stack([np.cos(others[..., 2]), np.sin(others[..., 2])], -1)
    between = others[..., :2] - place[:, :, None]  # [S, T, K, 2]
    hit = np.max(_touches(between, way, theirs) & counts[:, None], axis=2)
    first = np.where(hit.any(1), hit.argmax(1), hit.shape[1]) / hit.shape[1]
    total += np.where(first < 1, weight * (2 - first), 0)
    if pace == 1:
      total += _short(between, way, theirs, speed)
  return total


def _touches(between: np.ndarray, way: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Returns whether the ego is too close to each vehicle, [S, T, K]; the margin grows with time."""
  nearest = np.full(between.shape[:3], np.inf)
  for a, b in itertools.product(_CIRCLES, _CIRCLES):
    apart = between + b * theirs - a * way
    nearest = np.minimum(nearest, apart[..., 0] ** 2 + apart[..., 1] ** 2)
  room = 2 * _RADIUS + np.minimum(0.3 + 0.1 * TIMES[1:], 0.7)
  return nearest < room[:, None] ** 2


def _short(
  between: np.ndarray, way: np.ndarray, theirs: np.ndarray, speed: np.ndarray
) -> np.ndarray:
  """Returns how far the headway is below one second, in [0, 1], averaged over time, [S]."""
  ahead = np.sum(between * way, -1)
  aside = np.abs(between[..., 1] * way[..., 0] - between[..., 0] * way[..., 1])
  leads = (aside < 2) & (ahead > 0) & (np.sum(theirs * way, -1) > 0.7)
  gap = np.where(leads, (ahead - LENGTH) / np.maximum(speed, 1.0)[..., None], np.inf)
  return np.clip(1 - gap.min(2), 0, 1).mean(1)


def idm(scene: Scene) -> int:
  """Chooses the ego's action as highway-env's IDM and MOBIL vehicles would drive.

  MOBIL chooses a lane change, and IDM chooses an acceleration. An acceleration above 1 m/s^2
  becomes the action FASTER, and an acceleration below -1 m/s^2 becomes the action SLOWER.

  Args:
    scene: the scene that the driver perceives.

  Reference: Treiber, Hennecke, Helbing, 2000, arXiv:cond-mat/0002177 (IDM); Kesting, Treiber,
    Helbing, 2007, General lane-changing model MOBIL for car-following models.
  """
  from highway_env.vehicle.behavior import IDMVehicle

  ego, road = scene.vehicle, scene.vehicle.road
  double = IDMVehicle.create_from(ego)
  double.target_speed = scene.limit
  number = road.vehicles.index(ego)
  road.vehicles[number] = double
  try:
    if ego.lane_index == ego.target_lane_index and ego.speed >= 1:
      for change, is_there, lane in zip((LEFT, RIGHT), scene.lanes, (-1, 1), strict=True):
        if is_there and double.mobil((*ego.lane_index[:2], ego.lane_index[2] + lane)):
          return change
    lanes = {ego.lane_index, ego.target_lane_index}
    ahead = [road.neighbour_vehicles(double, lane)[0] for lane in lanes]
    acceleration = min(double.acceleration(double, front) for front in ahead)
  finally:
    road.vehicles[number] = ego
  if acceleration > 1 and ego.target_speed < scene.limit:
    return FASTER
  return SLOWER if acceleration < -1 else IDLE


def _unwrapped(path: np.ndarray) -> np.ndarray:
  return np.column_stack([path[:, :2], np.unwrap(path[:, 2])])


EXPERTS: dict[str, Driver] = {"planner": planner, "idm": idm}
