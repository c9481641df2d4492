"""Reads the Linux kernel's network byte counters on every host of a job."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PLACES = "NETWORK_COUNTERS"  # environment variable set by launchers: INTERFACE:FILE,FILE,...
NAMES = ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")
COLUMNS = (0, 1, 8, 9)  # columns of /proc/net/dev, after the interface's name
HEADERS = 14 + 20 + 32  # header bytes of a packet: Ethernet, IPv4, TCP with timestamps


class Counters(NamedTuple):
  """Contains the paths of the files with the counters of a job's hosts."""

  interface: str
  files: tuple[str, ...]  # one file per host, in the format of /proc/net/dev

  def read(self) -> np.ndarray:
    """Reads the current counters, int64 [hosts, NAMES]."""
    return np.array([_of(self.interface, file) for file in self.files], np.int64)

  def settled(self) -> np.ndarray:
    """Reads the counters after a collective's pending data has been sent, or after at most 1 s.

    A process returns from a collective as soon as it has received all data, possibly before it has
    sent all of its own data.

    Returns:
      The counters, int64 [hosts, NAMES].
    """
    until, found = time.monotonic() + 1.0, self.read()
    while time.monotonic() < until:
      time.sleep(0.02)
      before, found = found, self.read()
      if (before == found).all():
        break
    return found


def told(environ: Mapping[str, str]) -> Counters | None:
  """Returns the counters that a launcher such as `launch/netlab.py` has configured, or None.

  Args:
    environ: the environment variables.
  """
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
  """Divides counters by the number of steps, and subtracts headers from the bytes sent.

  Args:
    counted: the increases of the counters, int64 [hosts, NAMES].
    steps: the number of steps that ran between the two readings.

  Returns:
    For each host, the counters in NAMES and `tx_payload_bytes`, each divided by the number of
    steps.
  """
  means = (counted / max(1, steps)).tolist()
  rows: list[dict[str, Any]] = [dict(zip(NAMES, host, strict=True)) for host in means]
  for row in rows:
    row["tx_payload_bytes"] = row["tx_bytes"] - HEADERS * row["tx_packets"]
  return rows
