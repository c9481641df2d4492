"""Defines the other vehicles, which drive by IDM and MOBIL; each scenario has its own class.

highway-env's intersection environment changes the parameters of its vehicle class. Because each
scenario has its own class, this change does not affect the traffic of the other scenarios.
"""

from typing import Any

from highway_env.vehicle.behavior import IDMVehicle


class Traffic(IDMVehicle):
  """Drives a vehicle that can collide only with the ego, as in highway-env's fast highway.

  Otherwise, two vehicles that collide with each other would block a crossing for the rest of the
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
