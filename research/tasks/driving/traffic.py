"""The other vehicles: IDM and MOBIL, with a class for each scenario.

highway-env's intersection changes the parameters of its vehicles' class. With a class per scenario,
this does not change the traffic of the others.
"""

from typing import Any

from highway_env.vehicle.behavior import IDMVehicle


class Traffic(IDMVehicle):
  """A vehicle that can collide only with the ego, as in highway-env's fast highway.

  Otherwise the wrecks of others would block crossings for the rest of an episode.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.check_collisions = False


class Highway(Traffic):
  """On the highway."""


class Merge(Traffic):
  """On the highway and its access ramp."""


class Roundabout(Traffic):
  """In the roundabout and on the roads to it."""


class Intersection(Traffic):
  """On the crossing roads."""
