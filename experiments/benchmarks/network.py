"""Compares the predicted times of traffic patterns with TCP flows between simulated hosts.

This is bench.py's suite network. The hosts are network namespaces whose links the kernel limits in
both directions (launch/netlab.py). The flows of a pattern start at the same time, and last about
five seconds; the predictions are those of `research.sim` for the payload's share of a link's rate.

    python -m experiments.benchmarks.network star

runs one pattern once, in a process that does not use JAX, and prints the ends of its flows.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.hosts import ROOT, run, tell
from launch import netlab

PAYLOAD = 1448 / 1514  # bytes of payload in a full Ethernet frame with timestamps
MOST = 0.15  # the largest deviation that passes
HOSTS = 8
PROGRAM = str(ROOT / "experiments" / "benchmarks" / "flows.py")


class Pattern(NamedTuple):
  """Flows between hosts that start at the same time."""

  rates: Sequence[int]  # rate of each host's link in both directions, in Mbit/s
  flows: Sequence[tuple[int, int, int]]  # (sender, receiver, bytes)
  hops: int = 0  # pieces in which a ring passes on its messages; 0: the flows are independent


_RING = [(i, (i + 1) % HOSTS) for i in range(HOSTS)]
_UNEQUAL = [80, 20, 60, 40, 100, 30, 50, 90]
_MEGABYTE = 10**6


def _of(pairs: Sequence[tuple[int, int]], megabytes: float) -> list[tuple[int, int, int]]:
  return [(i, j, int(megabytes * _MEGABYTE)) for i, j in pairs]


def _random(seed: int) -> list[tuple[int, int]]:
  """Draws two different receivers for each host."""
  random = np.random.default_rng(seed)
  others = lambda i: random.permutation([j for j in range(HOSTS) if j != i])[:2].tolist()
  return [(i, j) for i in range(HOSTS) for j in others(i)]


PATTERNS = {
  "star": Pattern([100] * HOSTS, _of([(i, 0) for i in range(1, HOSTS)], 8.5)),
  "star back": Pattern([100] * HOSTS, _of([(0, i) for i in range(1, HOSTS)], 8.5)),
  "star, unequal links": Pattern(
    [150, 5, 10, 15, 20, 60, 80, 100], _of([(i, 0) for i in range(1, HOSTS)], 3)
  ),
  "two stars": Pattern(
    [100, 20, 30, 60, 50, 50, 50, 50], _of([(1, 0), (2, 0), (3, 0), (5, 4), (6, 4), (7, 4)], 10)
  ),
  "ring": Pattern([50] * HOSTS, _of(_RING, 30)),
  "ring, unequal links": Pattern(_UNEQUAL, _of(_RING, 12)),
  "ring all-reduce": Pattern([50] * HOSTS, _of(_RING, 30), 2 * (HOSTS - 1)),
  "ring all-reduce, unequal links": Pattern(_UNEQUAL, _of(_RING, 12), 2 * (HOSTS - 1)),
  "pairs": Pattern([50] * HOSTS, _of([(i, i ^ 1) for i in range(HOSTS)], 30)),
  "pairs, unequal links": Pattern(_UNEQUAL, _of([(i, i ^ 1) for i in range(HOSTS)], 12)),
  "two random receivers": Pattern([50] * HOSTS, _of(_random(0), 6)),
  "two random receivers, unequal links": Pattern(_UNEQUAL, _of(_random(1), 4)),
}


def predicted(pattern: Pattern) -> tuple[float, list[float] | None]:
  """Predicts when the last flow ends, and when each flow ends if the flows are independent."""
  from research.sim import exchange, fair
  from research.sim.network import Links

  rate = np.array(pattern.rates) * 1e6 / 8 * PAYLOAD
  zeros = np.zeros(HOSTS, int)
  links = Links(zeros, rate, rate, np.ones(HOSTS), np.zeros((1, 1)), 0.0)
  senders, receivers, sizes = map(np.array, zip(*pattern.flows, strict=True))
  if pattern.hops:
    return exchange.around_ring(links, senders, sizes[0], pattern.hops), None
  routes = np.stack([senders, HOSTS + receivers], 1)
  ends = fair.end_times(routes, sizes, np.concatenate([rate, rate]))
  return float(ends.max()), ends.tolist()


def once(pattern: Pattern) -> list[float]:
  """Runs the flows once, on new hosts; returns the end of each flow in seconds."""
  shapes = [netlab.ShapedLink(f"{rate}mbit", "64kb") for rate in pattern.rates]
  with netlab.network(shapes) as (_, hosts):
    return _ends(pattern, hosts)


def _ends(pattern: Pattern, hosts: Sequence[netlab.Host]) -> list[float]:
  from research.training.reports import report

  processes: list[Any] = []
  for number, host in enumerate(hosts):
    given = {
      "number": number,
      "address": host.address,
      "incoming": sum(to == number for _, to, _ in pattern.flows),
      "sends": [[hosts[to].address, size] for of, to, size in pattern.flows if of == number],
      "hops": pattern.hops,
    }
    line = host.command([sys.executable, PROGRAM, report.as_json(given)])
    pipe = subprocess.PIPE
    processes.append(subprocess.Popen(line, text=True, stdin=pipe, stdout=pipe))
  try:
    _say(processes, "ready", lambda: "connect")
    _say(processes, "connected", lambda: str(time.monotonic() + 0.3))
    ends = [json.loads(process.stdout.readline()) for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return [ends[to][str(of)] for of, to, _ in pattern.flows]


def _say(processes: Sequence[Any], after: str, line: Callable[[], str]) -> None:
  """Waits until all processes have printed a line, and then sends a line to all of them."""
  for process in processes:
    if (heard := process.stdout.readline().strip()) != after:
      raise RuntimeError(f"a host printed '{heard}', not '{after}'")
  text = line()
  for process in processes:
    process.stdin.write(text + "\n")
    process.stdin.flush()


def network(repeats: int) -> list[dict[str, Any]]:
  """Measures every pattern several times; returns medians, predictions and deviations."""
  rows = []
  for name, pattern in PATTERNS.items():
    line = [sys.executable, "-m", "experiments.benchmarks.network", name]
    turns = [json.loads(run(line)) for _ in range(repeats)]
    last, each = predicted(pattern)
    took = statistics.median(max(turn) for turn in turns)
    row = {"pattern": name, **pattern._asdict(), "turns": turns, "predicted": last}
    row |= {"measured": took, "deviation": last / took - 1}
    if each is not None:
      middle = [statistics.median(ends) for ends in zip(*turns, strict=True)]
      row["of_flows"] = [want / got - 1 for want, got in zip(each, middle, strict=True)]
    tell(f"{name}: {took:.3f} s, predicted {last:.3f}")
    rows.append(row)
  return rows


def network_table(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table of predicted and measured times."""
  lines = [
    "| pattern | links, Mbit/s | flows | measured, s | predicted, s | deviation | "
    "largest deviation of one flow |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    rates = [f"{rate}" if n == 1 else f"{n} x {rate}" for rate, n in _runs(row["rates"])]
    one = max(row.get("of_flows", []), key=abs, default=None)
    cells = [row["pattern"], ", ".join(rates), str(len(row["flows"]))]
    cells += [f"{row['measured']:.2f}", f"{row['predicted']:.2f}", f"{row['deviation']:+.1%}"]
    cells.append("" if one is None else f"{one:+.1%}")
    lines.append("| " + " | ".join(cells) + " |")
  worst = max((abs(row["deviation"]) for row in rows), default=0.0)
  verdict = "within" if worst <= MOST else "NOT within"
  lines.append(f"\nThe largest deviation of a pattern is {worst:.1%}, {verdict} {MOST:.0%}.")
  return lines


def _runs(rates: Sequence[int]) -> list[tuple[int, int]]:
  return [(rate, len(list(group))) for rate, group in itertools.groupby(rates)]


if __name__ == "__main__":
  print(json.dumps(once(PATTERNS[sys.argv[1]])))
