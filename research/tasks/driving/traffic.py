"""The other vehicles of each scenario: IDM and MOBIL, as classes of their own.

highway-env's intersection changes the parameters of the class of its vehicles; a class per scenario
keeps the traffic of the others as it is.
"""

from typing import Any

from highway_env.vehicle.behavior import IDMVehicle


class Traffic(IDMVehicle):
  """A vehicle that can collide with the ego alone, as in highway-env's fast highway.

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
