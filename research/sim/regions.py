"""Published round-trip times between the regions of a cloud provider.

The numbers are the 95th percentiles of the round-trip times within the 30 days that ended on July
30, 2026, in milliseconds, of the page "Azure network round-trip latency statistics", Microsoft,
https://learn.microsoft.com/azure/networking/azure-network-latency (the file
articles/networking/azure-network-latency.md of the repository MicrosoftDocs/azure-docs). Where the
page gives one number per direction, the table has the direction that the page lists first.
"""

from collections.abc import Sequence

import numpy as np

from research.core import checks

NAMES = (
  "eastus",
  "westus2",
  "brazilsouth",
  "westeurope",
  "southafricanorth",
  "centralindia",
  "southeastasia",
  "japaneast",
  "australiaeast",
)
# Row i, column j: the round trip between regions i + 1 and j in milliseconds, j <= i.
_MILLISECONDS = (
  (75,),
  (119, 179),
  (89, 153, 191),
  (226, 285, 327, 171),
  (214, 218, 320, 153, 134),
  (229, 165, 337, 181, 211, 59),
  (165, 103, 265, 242, 255, 129, 74),
  (207, 180, 298, 282, 348, 152, 98, 105),
)


def round_trips(regions: Sequence[str]) -> np.ndarray:
  """Returns the round-trip times between regions.

  Args:
    regions: names of regions, each in `NAMES`.

  Returns:
    The round-trip times in seconds, float64 [R, R], symmetric, with zeros on the diagonal.

  Raises:
    ValueError: if a name is unknown.
  """
  for name in regions:
    checks.one_of("regions", name, NAMES)
  table = np.zeros((len(NAMES), len(NAMES)))
  for row, values in enumerate(_MILLISECONDS, 1):
    table[row, : len(values)] = table[: len(values), row] = values
  places = [NAMES.index(name) for name in regions]
  return table[np.ix_(places, places)] / 1000
