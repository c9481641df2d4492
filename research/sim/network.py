"""Defines networks of many workers: the rates and delays of their links, and who is present."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY
from typing import NamedTuple

import numpy as np

from research.core import checks
from research.core.part import Part, required
from research.sim.churn import Always, Churn
from research.sim.regions import NAMES, round_trips

_WAYS = ("server", "ring")
_BITS = 1e6 / 8  # bytes per second of one Mbit/s


def is_simulated(text: str) -> bool:
  """Returns whether a value of --network is a spec, not a link such as 100mbit,20ms or a file."""
  return bool(re.match(r"\s*\w+\s*\(", text))


class Links(NamedTuple):
  """The links of N workers to the core of the network, which is never congested."""

  region: np.ndarray  # [N] int, the index of the region
  upload: np.ndarray  # [N], bytes per second
  download: np.ndarray  # [N], bytes per second
  slowness: np.ndarray  # [N], factor of the time of a step
  between: np.ndarray  # [R, R], one-way delay between the hubs of two regions, in seconds
  access: float  # one-way delay between a worker and the hub of its region, in seconds

  def delay(self, senders: np.ndarray, receivers: np.ndarray) -> np.ndarray:
    """Returns the one-way delays between workers, in seconds."""
    return 2 * self.access + self.between[self.region[senders], self.region[receivers]]

  def to_hub(self, workers: np.ndarray, region: int | np.ndarray) -> np.ndarray:
    """Returns the one-way delays between workers and servers at hubs of regions, in seconds."""
    return self.access + self.between[self.region[workers], region]


class Network(Part):
  """A network between workers, and when the workers are present.

  `server` is the rate of a server's link in each direction, in bytes per second; `way` is "server"
  or "ring" and says how workers run a collective; `scale` is a factor of the bytes of messages.
  """

  @property
  @required
  def presence(self) -> Churn:
    """Returns when workers join and leave."""
    ...

  @property
  @required
  def server_rate(self) -> float:
    """Returns the rate of a server's link in each direction, in bytes per second."""
    ...

  @property
  @required
  def way(self) -> str:
    """Returns how workers run a collective: by a "server", or in a "ring"."""
    ...

  @property
  def factor(self) -> float:
    """Returns the factor by which messages are longer than those of the program."""
    return 1.0

  @required
  def links(self, axes: Mapping[str, int], random: np.random.Generator) -> Links:
    """Returns the links of the workers of a mesh.

    Args:
      axes: the sizes of the worker axes by name.
      random: the generator of all random draws.
    """
    ...


class Internet(Network, name="internet"):
  """Workers in several regions, with links to the internet as homes and data centres have them.

      upload_i = upload exp(spread z_i),   download_i = download exp(spread z_i),   z_i normal

  Each worker has one link in each direction to the hub of its region, and hubs have published
  round-trip times to each other (`sim/regions.py`). Only the links of the workers and servers can
  be congested; flows share them by max-min fairness. With a mesh of slices, the workers of a slice
  are in one region, and the slices go round the regions; without slices, the region of a worker is
  drawn. The defaults of upload and download are the medians of fixed broadband in the United
  States in the second quarter of 2020. The other defaults are assumptions; with the default of the
  spread, a tenth of the workers have links that are more than 4.7 times slower than the median.

  Args:
    regions: names of regions; see `sim/regions.py`.
    upload: median upload rate in Mbit/s.
    download: median download rate in Mbit/s.
    spread: standard deviation of the logarithm of the rates, at least 0; a worker's two rates are
      fast or slow together.
    slowest_decile: the upload rate in Mbit/s of the tenth of the workers with the slowest links,
      whose download rate changes by the same factor; 0 leaves the rates as drawn.
    datacentre: the share of workers whose links have the rates of a server.
    server: rate of a server's link in each direction, in Mbit/s.
    collective: how workers run a collective: "server" (each sends its operand to a server and
      receives the result), or "ring" (each sends to the next worker, as in a ring all-reduce).
    access: one-way delay between a worker and the hub of its region, in seconds.
    unequal: standard deviation of the logarithm of a worker's time per step, at least 0; the median
      worker has the times of the clock.
    churn: when workers join and leave.
    scale: the factor by which messages are longer than those of the program; a small model then
      stands for a larger one that trains alike.

  Raises:
    ValueError: if a region is unknown or a number is out of range.

  Reference: Ookla, Q2 2020 Speedtest United States market report (86.04 Mbit/s down, 11.86 Mbit/s
    up); round-trip times: see `sim/regions.py`.
  """

  regions: Sequence[str] = ("eastus", "westeurope", "southeastasia")
  _: KW_ONLY
  upload: float = 11.86
  download: float = 86.04
  spread: float = 1.2
  slowest_decile: float = 0.0
  datacentre: float = 0.0
  server: float = 10_000.0
  collective: str = "server"
  access: float = 0.01
  unequal: float = 0.0
  churn: Churn = Always()
  scale: float = 1.0

  def check(self):
    if not self.regions:
      raise ValueError(f"regions=[] names no region; legal: {', '.join(NAMES)}")
    round_trips(self.regions)
    for name in ("upload", "download", "server", "scale"):
      checks.in_range(name, getattr(self, name), "(0, inf)")
    for name in ("spread", "unequal"):
      checks.in_range(name, getattr(self, name), "[0, 5]")
    for name in ("slowest_decile", "access"):
      checks.in_range(name, getattr(self, name), "[0, inf)")
    checks.in_range("datacentre", self.datacentre, "[0, 1]")
    checks.one_of("collective", self.collective, _WAYS)

  @property
  def presence(self):
    return self.churn

  @property
  def server_rate(self):
    return self.server * _BITS

  @property
  def way(self):
    return self.collective

  @property
  def factor(self):
    return self.scale

  def links(self, axes, random):
    workers, regions = int(np.prod(list(axes.values()))), len(self.regions)
    # Each quantity has its own generator, so one argument does not change the others' draws.
    places, rates, homes, speeds = random.spawn(4)
    region = places.integers(0, regions, workers)
    if "slice" in axes:
      region = np.arange(workers) // axes.get("data", 1) % regions
    wide = np.exp(self.spread * rates.standard_normal(workers))
    upload, download = self.upload * wide, self.download * wide
    if self.slowest_decile:
      slow = np.argsort(upload)[: workers // 10]
      download[slow] *= self.slowest_decile / upload[slow]
      upload[slow] = self.slowest_decile
    at_home = homes.random(workers) >= self.datacentre
    of_worker = lambda rate: np.where(at_home, rate, self.server) * _BITS
    slowness = np.exp(self.unequal * speeds.standard_normal(workers))
    between = round_trips(self.regions) / 2
    return Links(region, of_worker(upload), of_worker(download), slowness, between, self.access)


internet = Internet
