"""Predicts the time of collectives from a link's bandwidth and latency.

This is the alpha-beta model (Hockney 1994) for bandwidth-optimal algorithms (Thakur et al. 2005). A
collective among W workers takes the latency of `hops` sequential messages, plus the time to
transmit all its bytes:

    seconds = messages * (hops * latency + 8 * sent / rate)

    all-reduce  2 (W-1) hops on a ring      all-gather, reduce-scatter  W-1 hops on a ring
    all-to-all    W-1 pairwise exchanges    permute                     1 hop

Every worker has one full-duplex link. Transfers never overlap with each other; they overlap with
computation if the method allows it (`exposed`). Every leaf of the tree is one message, unless the
program fuses leaves. A library that uses tree algorithms for short messages needs fewer hops for
such messages.

References:
  Hockney, 1994, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel
  Computing 20(3). Thakur, Rabenseifner and Gropp, 2005, "Optimization of collective communication
  operations in MPICH", Int. J. of High Performance Computing Applications 19(1).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from research.core.text import QUOTED, one_line

_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}  # per second
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class LinkSpeed(NamedTuple):
  """Bandwidth and latency of a worker's link, in each direction."""

  bits_per_second: float
  latency_seconds: float  # one-way latency of a message


def parse_link(spec: str) -> LinkSpeed:
  """Parses '100mbit,20ms', or '100mbit' for zero latency.

  Args:
    spec: bandwidth and optional latency, separated by a comma.

  Raises:
    ValueError: for an unknown unit, an invalid number, zero bandwidth, or extra parts.
  """
  rate, comma, latency = (part.strip() for part in spec.partition(","))
  bits = _quantity(rate, _BITS, "a bandwidth such as 100mbit")
  if bits == 0:
    raise ValueError(f"'{one_line(rate, QUOTED)}' is not a bandwidth above zero")
  return LinkSpeed(bits, _quantity(latency, _SECONDS, "a latency such as 20ms") if comma else 0.0)


def _quantity(text: str, units: Mapping[str, float], wanted: str) -> float:
  found = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})\s*([a-z]+)", text.lower())
  value = float(found[1]) * units.get(found[2], math.nan) if found else math.nan
  if not math.isfinite(value):
    legal = f"a number and one of {', '.join(units)}"
    raise ValueError(f"'{one_line(text, QUOTED)}' is not {wanted}: {legal}")
  return value


def seconds(rows: Iterable[Mapping[str, Any]], axes: Mapping[str, int], link: LinkSpeed) -> float:
  """Predicts the time of sequential transfers, in seconds per local step.

  Args:
    rows: the transfers of `summary.json`, each with `operation`, `axis` ('slice+data' means over
      both axes at once), and one worker's `payload_bytes`, `sent_bytes` and `messages` per local
      step.
    axes: sizes of the mesh axes by name.
    link: the link of every worker, over every axis.
  """
  return sum(_seconds(row, axes, link) for row in rows)


def exposed(talking: float, computing: float, steps: int, delay: int) -> float:
  """Predicts how long workers wait if an exchange may take several local steps.

  An exchange starts after every `steps` local steps and is due `delay` steps later; exchanges run
  one after the other.

  Args:
    talking: seconds of communication per local step.
    computing: seconds of computation per local step.
    steps: local steps from one exchange to the next.
    delay: local steps that an exchange may take; 0 if the workers wait for its result.

  Returns:
    Seconds per local step.
  """
  return max(0.0, talking - min(delay, steps) / steps * computing)


def _seconds(row: Mapping[str, Any], axes: Mapping[str, int], link: LinkSpeed) -> float:
  workers = math.prod(axes[name] for name in row["axis"].split("+"))
  if not row["sent_bytes"]:
    return 0.0
  # `sent_bytes` is the workers' mean; if only some send, the others wait for them.
  sent = row["payload_bytes"] if row["operation"] == "permute" else row["sent_bytes"]
  hops = {
    "all-reduce": 2 * (workers - 1),
    "all-gather": workers - 1,
    "reduce-scatter": workers - 1,
    "all-to-all": workers - 1,
    "permute": 1,
  }[row["operation"]]
  return row["messages"] * hops * link.latency_seconds + 8 * sent / link.bits_per_second
