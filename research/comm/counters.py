"""What the kernel counts of a job's bytes on the network, host by host."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PLACES = "NETWORK_COUNTERS"  # the variable in which a launcher names INTERFACE:FILE,FILE,...
NAMES = ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")
COLUMNS = (0, 1, 8, 9)  # of /proc/net/dev, after the interface's name
HEADERS = 14 + 20 + 32  # bytes of a packet that are Ethernet's, IPv4's, and TCP's with time stamps


class Counters(NamedTuple):
  """Where the counters of a job's hosts are read."""

  interface: str
  files: tuple[str, ...]  # one per host, in the form of /proc/net/dev

  def read(self) -> np.ndarray:
    """The counters now: int64 [hosts, NAMES]."""
    return np.array([_of(self.interface, file) for file in self.files], np.int64)

  def settled(self) -> np.ndarray:
    """The counters when hosts have sent what a collective has left in their sockets, or in 1 s.

    A process has its result when it has received all, not when it has sent all.
    """
    until, found = time.monotonic() + 1.0, self.read()
    while time.monotonic() < until:
      time.sleep(0.02)
      before, found = found, self.read()
      if (before == found).all():
        break
    return found


def told(environ: Mapping[str, str]) -> Counters | None:
  """Those that the launcher names (`launch/netlab.py` does), or None."""
  interface, colon, files = environ.get(PLACES, "").partition(":")
  return Counters(interface, tuple(files.split(","))) if colon else None


def _of(interface: str, file: str) -> list[int]:
  for line in Path(file).read_text().splitlines():
    name, colon, values = line.partition(":")
    if colon and name.strip() == interface:
      found = values.split()
      return [int(found[column]) for column in COLUMNS]
  raise ValueError(f"{file} has no interface '{interface}'")


def per_step(counted: np.ndarray, steps: int) -> list[dict[str, Any]]:
  """By host, what is in [hosts, NAMES] per step, and what of the bytes sent is no header."""
  means = (counted / max(1, steps)).tolist()
  rows: list[dict[str, Any]] = [dict(zip(NAMES, host, strict=True)) for host in means]
  for row in rows:
    row["tx_payload_bytes"] = row["tx_bytes"] - HEADERS * row["tx_packets"]
  return rows
