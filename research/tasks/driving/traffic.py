"""The other vehicles of each scenario: IDM and MOBIL, as classes of their own.

highway-env's intersection changes the parameters of the class of its vehicles; a class per scenario
keeps the traffic of the others as it is.
"""

from highway_env.vehicle.behavior import IDMVehicle


class Highway(IDMVehicle):
  """On the highway."""


class Merge(IDMVehicle):
  """On the highway and its access ramp."""


class Roundabout(IDMVehicle):
  """In the roundabout and on the roads to it."""


class Intersection(IDMVehicle):
  """On the crossing roads."""
