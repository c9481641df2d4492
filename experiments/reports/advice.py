"""Ranks methods for a model, its workers and a network, from plain numbers.

The functions take numbers only, so that other programs, such as a page in a browser, can compute
the same ranking from the export of `advise.py --json`. A method's time to a target is relative: the
seconds in which it gets as far as the exact average of gradients does in one step,

    seconds of a step * (steps of the method / steps of the exact average, for the same loss)

The ratio of steps comes from recorded results (`evidence.py`). Methods without a recorded ratio are
ranked after the others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from research.analysis import cost, waiting
from research.analysis.network import Network

PRIORITIES = ("time", "bytes", "memory", "privacy", "faulty", "unlike")
NEEDS = {  # of priorities that exclude methods
  "privacy": "its messages contain a worker's exact gradients or models",
  "faulty": "one wrong worker can change the mean by any amount",
  "unlike": "every exchange waits for the slowest worker",
}
EXACT = "exact average"
WORTH = 0.05  # relative gain below which the exact average is preferred


class Option(NamedTuple):
  """A method with the numbers that its ranking depends on."""

  name: str
  spec: str
  serves: tuple[str, ...]  # the priorities of NEEDS that it serves
  load: cost.Load  # per local step
  encoding: float  # seconds per local step
  memory: float  # bytes of a worker's parameters and state
  period: int = 1
  delay: int = 0
  ratio: float | None = None  # steps over those of the exact average; None: not recorded
  low: float = math.nan  # range over seeds
  high: float = math.nan
  source: str = ""
  pushes: tuple[float, float] | None = None  # bytes to and from a server, if there is one
  losses: tuple[float, ...] = ()  # held-out losses on the leaderboard, one per seed


def step_of(option: Option, network: Network, workers: int, computing: float) -> cost.Step:
  """Predicts a local step of an option.

  For a server, a step is one update of every worker; the wait for the server is its queue.

  Args:
    option: the method.
    network: the network and the machines.
    workers: the number of workers.
    computing: a worker's seconds of computation per local step.
  """
  if option.pushes is None:
    return cost.step(
      option.load,
      network,
      workers=workers,
      computing=computing,
      encoding=option.encoding,
      period=option.period,
      delay=option.delay,
    )
  up, down = option.pushes
  service = 8 * max(up / network.download, down / network.upload)
  away = computing + option.encoding + 2 * network.latency + 2 * network.message
  step = workers / waiting.updates_per_second(workers, away, service)
  host = 2 * network.message
  link = step - computing - option.encoding - host
  return cost.Step(computing, option.encoding, host, link, link)


def ranked(
  options: Sequence[Option],
  network: Network,
  *,
  workers: int,
  computing: float,
  priority: str = "time",
) -> list[dict[str, Any]]:
  """Ranks the options, best first.

  Args:
    options: the methods.
    network: the network and the machines.
    workers: the number of workers.
    computing: a worker's seconds of computation per local step.
    priority: one of PRIORITIES; "bytes" and "memory" rank by these, the last three exclude methods
      that do not serve them.

  Returns:
    One row per option, with its numbers and, in `why`, the reason for its place.
  """
  rows = [_row(option, step_of(option, network, workers, computing)) for option in options]
  for row, option in zip(rows, options, strict=True):
    row["excluded"] = priority in NEEDS and priority not in option.serves
  seconds = lambda row: math.inf if row["seconds"] is None else row["seconds"]
  known = lambda row: (row["excluded"], row["seconds"] is None)
  keys = {
    "bytes": lambda row: (*known(row), row["bytes_to_target"] or 0.0, seconds(row)),
    "memory": lambda row: (*known(row), row["memory_bytes"], seconds(row)),
  }
  by_time = lambda row: (*known(row), seconds(row), row["step_seconds"])
  rows.sort(key=keys.get(priority, by_time))
  for row in rows:
    row["why"] = _why(row, rows[0], priority)
  return rows


def _row(option: Option, step: cost.Step) -> dict[str, Any]:
  """Returns the numbers of an option; times to the target are per step of the exact average."""
  times = lambda ratio: None if option.ratio is None else ratio * step.seconds
  return {
    "name": option.name,
    "spec": option.spec,
    "step_seconds": step.seconds,
    "parts": step._asdict(),
    "bytes_per_step": option.load.sent,
    "memory_bytes": option.memory,
    "ratio": option.ratio,
    "seconds": times(option.ratio),
    "seconds_low": times(option.low),
    "seconds_high": times(option.high),
    "bytes_to_target": option.ratio and option.ratio * option.load.sent,
    "source": option.source,
    "losses": list(option.losses),
  }


def _why(row: dict[str, Any], best: dict[str, Any], priority: str) -> str:
  """Says in one line why a row has its place, relative to the best one."""
  if row is best and row["excluded"]:
    return f"no method here serves the priority '{priority}'"
  if row["excluded"]:
    return NEEDS[priority]
  parts, total = row["parts"], row["step_seconds"]
  named = {"computing": "computing", "encoding": "encoding", "host": "the host's work on messages"}
  shares = {name: parts[key] for key, name in named.items()} | {"the link": parts["waiting"]}
  largest = max(shares, key=lambda name: shares[name])
  made_of = f"{shares[largest] / total:.0%} of a step is {largest}" if total else "a step is free"
  if row is best:
    return f"first: {made_of}"
  if row["ratio"] is None:
    return f"no recorded result says how many steps it needs; {made_of}"
  if priority in ("bytes", "memory"):
    key = {"bytes": "bytes_to_target", "memory": "memory_bytes"}[priority]
    times = row[key] / best[key] if best[key] else math.inf
    what = "bytes to the target" if priority == "bytes" else "memory"
    return f"{times:.2f} times the {what}"
  times = row["seconds"] / best["seconds"] if best["seconds"] else math.inf
  slower, more = total / best["step_seconds"], row["ratio"] / (best["ratio"] or 1.0)
  if slower >= more:
    return f"{times:.2f} times the time: a step takes {slower:.2f} times as long, {made_of}"
  return f"{times:.2f} times the time: it needs {more:.2f} times the steps, {made_of}"


def verdict(rows: Sequence[dict[str, Any]], priority: str = "time") -> str:
  """Returns the advice in one line.

  If time decides, a gain of at most `WORTH` is not worth compression.

  Args:
    rows: the result of `ranked`.
    priority: the priority by which they were ranked.
  """
  best = rows[0]
  if best["excluded"]:
    return best["why"]
  if priority in ("bytes", "memory"):
    least = {"bytes": "sends the fewest bytes to the target", "memory": "needs the least memory"}
    return f"use {best['name']}: it {least[priority]}"
  exact = next((row for row in rows if row["name"] == EXACT and not row["excluded"]), None)
  gain = exact["seconds"] / best["seconds"] if exact and best["seconds"] else 1.0
  if exact and gain <= 1 + WORTH:
    share = exact["parts"]["waiting"] / exact["step_seconds"] if exact["step_seconds"] else 0.0
    return (
      f"do not compress: the exact average of gradients waits for the link during {share:.0%} of "
      f"a step, and no method is more than {WORTH:.0%} faster"
    )
  near = [row["name"] for row in rows[1:] if _overlaps(best, row)]
  close = f"; within the range of the recorded runs: {', '.join(near)}" if near else ""
  times = f", {gain:.3g} times as fast as the exact average" if exact else ""
  return f"use {best['name']}{times}{close}"


def _overlaps(best: dict[str, Any], row: dict[str, Any]) -> bool:
  """Returns whether the range of a row's time reaches that of the best row."""
  low, high = row["seconds_low"], best["seconds_high"]
  return not row["excluded"] and low is not None and high is not None and low <= high
