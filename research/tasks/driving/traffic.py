"""The other vehicles, which drive by IDM and MOBIL, with one class per scenario.

highway-env's intersection changes the parameters of its vehicles' class. Since each scenario has
its own class, this does not change the traffic of the other scenarios.
"""

from typing import Any

from highway_env.vehicle.behavior import IDMVehicle


class Traffic(IDMVehicle):
  """A vehicle that can collide only with the ego, as in highway-env's fast highway.

  Otherwise, vehicles that have collided with each other would block crossings for the rest of an
  episode.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.check_collisions = False


class Highway(Traffic):
  """A vehicle on the highway."""


class Merge(Traffic):
  """A vehicle on the highway or its access ramp."""


class Roundabout(Traffic):
  """A vehicle in the roundabout or on the roads to it."""


class Intersection(Traffic):
  """A vehicle on the crossing roads."""
