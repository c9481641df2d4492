"""Constants of a network and of the machines on it, from a text or from a file of measurements.

    100mbit,20ms    bandwidth of each worker's link in each direction, and one-way latency
    net.json        a file of `experiments/probe.py`
    net.json,100mbit,20ms    the machines of the file, on another link

A constant that is not known has the value of an ideal machine: messages and bytes cost nothing
beyond the link's time. `cost.py` predicts times from these constants.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from research.core import checks, paths
from research.core.text import QUOTED, one_line

_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}  # per second
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_FILE = ".json"


class Kernel(NamedTuple):
  """Times of a compressor, or of an aggregator's own computation, in seconds per element."""

  encode: float
  decode: float


@dataclasses.dataclass(frozen=True)
class Network:
  """Constants of the links between workers, and of the workers' machines.

  Args:
    upload: bits per second that a host's link carries out of the host, without headers.
    download: bits per second that the link carries into the host, without headers.
    latency: seconds for which a message is under way, one way.
    burst: bytes that pass at once through a link that has been idle (the size of a token bucket).
    sharing: the number of workers that share a link.
    efficiency: bits of payload per bit on the wire; a rate given as a text is multiplied by it.
    message: seconds of a host's work per message of a collective.
    byte: seconds in which a host copies a byte that it sends, at most while the link transmits.
    computing: seconds of computation per local step, with all workers busy; 0 if it is unknown.
    spread: coefficient of variation of a worker's time per step.
    kernels: the compressors' times, by spec.
    workers: the number of workers with which the constants were measured; 0 if they were not.
    source: the file of the constants, or the text of the link.
  """

  upload: float = math.inf
  download: float = math.inf
  latency: float = 0.0
  burst: float = 0.0
  sharing: int = 1
  efficiency: float = 1.0
  message: float = 0.0
  byte: float = 0.0
  computing: float = 0.0
  spread: float = 0.0
  kernels: Mapping[str, Kernel] = dataclasses.field(default_factory=dict)
  workers: int = 0
  source: str = ""

  def __post_init__(self):
    for name in ("upload", "download"):
      if not getattr(self, name) > 0:  # also rejects NaN
        raise ValueError(f"{name}={getattr(self, name)} is not above 0")
    for name in ("latency", "burst", "message", "byte", "computing", "spread", "workers"):
      checks.in_range(name, getattr(self, name), "[0, inf)")
    checks.in_range("efficiency", self.efficiency, "(0, 1]")
    checks.at_least("sharing", self.sharing)

  @property
  def bits_per_second(self) -> float:
    """The rate of an exchange in which every worker sends as much as it receives."""
    return min(self.upload, self.download) / self.sharing

  def replace(self, **changes: Any) -> "Network":
    """Returns a copy with other constants.

    Args:
      **changes: fields and their new values.

    Raises:
      ValueError: if a constant is out of range.
    """
    return dataclasses.replace(self, **changes)

  def on(self, link: str) -> "Network":
    """Returns these machines on another link.

    Args:
      link: bandwidth and optional latency, such as 100mbit,20ms; the rate is that of the wire, of
        which `efficiency` is payload.

    Raises:
      ValueError: if the text is not a link.
    """
    rate, latency = parse_link(link)
    rate *= self.efficiency
    return self.replace(upload=rate, download=rate, latency=latency)

  def as_dict(self) -> dict[str, Any]:
    """Returns the constants for a JSON file; an unlimited rate is null."""
    found = dataclasses.asdict(self)
    for name in ("upload", "download"):
      found[name] = found[name] if math.isfinite(found[name]) else None
    found["kernels"] = {name: one._asdict() for name, one in self.kernels.items()}
    del found["source"]
    return found


def parse_link(spec: str) -> tuple[float, float]:
  """Parses '100mbit,20ms', or '100mbit' for zero latency.

  Args:
    spec: bandwidth and optional latency, separated by a comma.

  Returns:
    Bits per second, and seconds.

  Raises:
    ValueError: for an unknown unit, an invalid number, zero bandwidth, or extra parts.
  """
  rate, comma, latency = (part.strip() for part in spec.partition(","))
  bits = _quantity(rate, _BITS, "a bandwidth such as 100mbit")
  if bits == 0:
    raise ValueError(f"'{one_line(rate, QUOTED)}' is not a bandwidth above zero")
  return bits, _quantity(latency, _SECONDS, "a latency such as 20ms") if comma else 0.0


def _quantity(text: str, units: Mapping[str, float], wanted: str) -> float:
  found = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})\s*([a-z]+)", text.lower())
  value = float(found[1]) * units.get(found[2], math.nan) if found else math.nan
  if not math.isfinite(value):
    legal = f"a number and one of {', '.join(units)}"
    raise ValueError(f"'{one_line(text, QUOTED)}' is not {wanted}: {legal}")
  return value


def parse(text: str) -> Network:
  """Parses a value of --network: FILE, LINK or FILE,LINK; see the module's documentation.

  Args:
    text: a file name that ends in .json, or a bandwidth with an optional latency, or both.

  Raises:
    ValueError: if the text is neither, or the file cannot be read or has other contents.
  """
  end = text.find(_FILE + ",")
  if end < 0 and not text.endswith(_FILE):
    return dataclasses.replace(Network().on(text), source=text)
  place, link = (text, "") if end < 0 else (text[: end + len(_FILE)], text[end + len(_FILE) + 1 :])
  found = of_dict(_contents(place)).replace(source=text)
  return found.on(link) if link else found


def _contents(place: str) -> Any:
  try:
    return json.loads(paths.local(place).read_text())
  except OSError as error:
    raise ValueError(f"cannot read {place}: {error.strerror}") from error
  except ValueError as error:
    raise ValueError(f"{place} is not a JSON file: {one_line(error, QUOTED)}") from error


def of_dict(values: Any) -> Network:
  """Returns the network of the contents of a file; the inverse of `Network.as_dict`.

  Args:
    values: the contents, a dictionary; "constants" holds the constants if the file also contains
      the measurements.

  Raises:
    ValueError: if a constant is unknown or out of range.
  """
  values = values.get("constants", values) if isinstance(values, dict) else values
  if not isinstance(values, dict):
    raise ValueError("is not a file of experiments/probe.py: no table of constants")
  legal = [field.name for field in dataclasses.fields(Network) if field.name != "source"]
  for name in values:
    if name not in legal:
      raise ValueError(f"'{one_line(name, QUOTED)}': {checks.unknown(name, legal)}")
  try:
    rates = {n: values[n] or math.inf for n in ("upload", "download") if n in values}
    kernels = {name: Kernel(**one) for name, one in values.get("kernels", {}).items()}
    return Network(**{**values, **rates, "kernels": kernels})
  except (TypeError, AttributeError) as error:
    raise ValueError(f"is not a file of experiments/probe.py: {one_line(error, QUOTED)}") from error
