"""Predicts the time of a local step from its messages and the constants of a network.

Collectives follow the alpha-beta model (Hockney 1994) for bandwidth-optimal algorithms (Thakur et
al. 2005). A collective among W workers is a sequence of `hops` messages:

    all-reduce  2 (W-1) hops on a ring      all-gather, reduce-scatter  W-1 hops on a ring
    all-to-all    W-1 pairwise exchanges    permute                     1 hop

A step is the computation of the slowest worker, the encoding of messages, the work of hosts on each
message, and the time of the link:

    host = hops message     link = hops latency + max(byte sent, 8 sent / rate - credit)
    credit = min(full, computing + host) + min(hops full, encoding)     full = 8 burst / rate

The hosts copy and the link transmits at the same time, so the slower one counts. The credit is that
of a token bucket, which fills while the workers compute, until it is full, and while they encode
between the messages of an exchange. If the method allows its exchange to overlap with local steps,
the link's time counts only as far as they do not hide it (`exposed`); the work of hosts on messages
is never hidden. Every leaf of the tree is one message, unless the program fuses leaves. Every
worker's link is full duplex, and an exchange loads both directions alike. A library that uses tree
algorithms for short messages needs fewer hops for such messages.

References:
  Hockney, 1994, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel
  Computing 20(3). Thakur, Rabenseifner and Gropp, 2005, "Optimization of collective communication
  operations in MPICH", Int. J. of High Performance Computing Applications 19(1).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from research.analysis import waiting
from research.analysis.network import Network


class Load(NamedTuple):
  """What one worker sends per local step."""

  sent: float  # bytes
  hops: float  # messages that follow one another

  def host(self, network: Network) -> float:
    """Returns the seconds of a host's work on messages."""
    return self.hops * network.message

  def link(
    self, network: Network, idle: float = 0.0, between: float = 0.0, period: float = 1
  ) -> float:
    """Returns the seconds of the link.

    Args:
      network: the network.
      idle: seconds per local step for which the link is idle before an exchange.
      between: seconds per local step for which it is idle between the messages of an exchange.
      period: local steps from one exchange to the next.
    """
    rate = network.bits_per_second
    full = 8 * network.burst / rate if math.isfinite(rate) else 0.0
    saved = min(full / period, idle) + min(self.hops * full, between)
    carried = max(self.sent * network.byte, 8 * self.sent / rate - saved)
    return self.hops * network.latency + carried


class Step(NamedTuple):
  """The parts of a predicted local step, in seconds."""

  computing: float  # of the slowest worker
  encoding: float
  host: float  # work on messages
  link: float  # latency and transmission, less what an idle link has saved up
  waiting: float  # the part of `link` that local steps do not hide

  @property
  def seconds(self) -> float:
    """The time of a local step."""
    return self.computing + self.encoding + self.host + self.waiting


def load(rows: Iterable[Mapping[str, Any]], axes: Mapping[str, int]) -> Load:
  """Sums what one worker sends per local step.

  Args:
    rows: the transfers of `summary.json`, each with `operation`, `axis` ('slice+data' means over
      both axes at once), and one worker's `payload_bytes`, `sent_bytes` and `messages` per local
      step.
    axes: sizes of the mesh axes by name.
  """
  found = [_load(row, axes) for row in rows]
  return Load(sum(one.sent for one in found), sum(one.hops for one in found))


def _load(row: Mapping[str, Any], axes: Mapping[str, int]) -> Load:
  workers = math.prod(axes[name] for name in row["axis"].split("+"))
  if not row["sent_bytes"]:
    return Load(0.0, 0.0)
  # `sent_bytes` is the workers' mean; if only some send, the others wait for them.
  sent = row["payload_bytes"] if row["operation"] == "permute" else row["sent_bytes"]
  return Load(sent, row["messages"] * hops(row["operation"], workers))


def hops(operation: str, workers: int) -> int:
  """Returns the number of messages of a collective that follow one another.

  Args:
    operation: the operation of a `wire.Transfer`.
    workers: the number of workers.
  """
  return {
    "all-reduce": 2 * (workers - 1),
    "all-gather": workers - 1,
    "reduce-scatter": workers - 1,
    "all-to-all": workers - 1,
    "permute": 1,
  }[operation]


def seconds(rows: Iterable[Mapping[str, Any]], axes: Mapping[str, int], network: Network) -> float:
  """Predicts the time of transfers that follow one another, in seconds per local step.

  Args:
    rows: see `load`.
    axes: sizes of the mesh axes by name.
    network: the network, over every axis; its credit for idle links is not counted.
  """
  found = load(rows, axes)
  return found.host(network) + found.link(network)


def step(
  sent: Load,
  network: Network,
  *,
  workers: int,
  computing: float,
  encoding: float = 0.0,
  period: int = 1,
  delay: int = 0,
) -> Step:
  """Predicts the parts of a local step.

  Args:
    sent: what one worker sends per local step.
    network: the network and the machines.
    workers: the number of workers.
    computing: a worker's mean seconds of computation per local step.
    encoding: seconds of encoding and decoding per local step.
    period: local steps from one exchange to the next.
    delay: local steps that an exchange may take; 0 if the workers wait for its result.
  """
  slowest = waiting.slowest(computing, network.spread, workers, period)
  host = sent.host(network)
  link = sent.link(network, slowest + host, encoding, period)
  return Step(slowest, encoding, host, link, exposed(link, slowest, period, delay))


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
