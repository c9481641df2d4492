"""Computes the virtual time of rounds whose workers exchange over a simulated network."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.comm import mesh as meshes
from research.parallel.job import Job
from research.sim import clock
from research.sim.network import Links, Network
from research.sim.served import Served
from research.training.exchanges import Exchanges, Program, pull_bytes, push_bytes, traced
from research.training.plan import Plan
from research.training.virtual import MOST, VirtualServer, between

_MOST_PRESENT = 2**31  # maximum number of rounds times workers whose presence is stored
_AT_ONCE = 2**22  # number of step times that are drawn at once


class VirtualExchanges(NamedTuple):
  """Rounds in which workers compute, and then exchange over a network."""

  seconds: np.ndarray  # float64 [K], the end of each round
  network: np.ndarray  # float64 [K], time in which workers waited for exchanges, so far
  counts: np.ndarray  # int [K], number of workers that take part in each round
  present: np.ndarray | None  # bool [K, W], which workers take part; None: all in every round

  order = None

  def at(self, rounds: float) -> float:
    """Returns the time at which a number of rounds is complete, interpolated within a round."""
    return between(self.seconds, rounds)

  def within(self, seconds: float) -> int | None:
    """Returns the number of rounds that end within a time; None if all rounds do."""
    found = int(np.searchsorted(self.seconds, seconds, side="right"))
    return found if found < len(self.seconds) else None

  def columns(self, rounds: float) -> dict[str, Any]:
    """Returns the columns of a row that follow from the network."""
    last = max(0, math.ceil(rounds) - 1)
    share = float(self.network[last] / self.seconds[last]) if self.seconds[last] else 0.0
    return {"present": int(self.counts[last]), "network_share": round(share, 6)}


class Rounds:
  """Computes rounds one after the other; a longer run begins with the rounds of a shorter one.

  In a round, every worker that is present at its start computes. The exchange begins when the
  slowest of the workers that stay for that long has finished. A worker that leaves before it has
  finished, or before it can have sent its own messages at the full rate of its link, is absent:
  nobody waits for it, and the exchange takes the time of the others. Without others, the round is
  empty. If nobody is present, the next round begins when a worker returns.
  """

  def __init__(
    self,
    programs: Sequence[Program],
    network: Network,
    links: Links,
    speeds: clock.Speeds,
    seed: int,
  ):
    """Creates the rounds.

    Args:
      programs: the traced programs of the stages of the run.
      network: the network.
      links: the links of the workers.
      speeds: the distribution of the workers' step times.
      seed: seeds the step times and the times of presence.
    """
    self._plan, self._links = Plan(tuple(program.job for program in programs)), links
    self._workers, self._constant = len(links.region), network.presence.constant
    # Two generators, so that the times of presence do not depend on the draws of the links.
    self._timeline = network.presence.timeline(self._workers, _random(seed, "presence"))
    self._pieces = clock.Pieces(speeds, self._workers, seed)
    self._exchanges = [Exchanges(program, network, links, seed) for program in programs]
    self._drawn, self._first = np.zeros((0, self._workers)), 0
    self._now, self._waited = 0.0, 0.0
    self._rows: list[tuple[float, float, int]] = []
    self._present: list[np.ndarray] = []

  def __call__(self, rounds: int) -> VirtualExchanges:
    """Returns the first K rounds.

    Raises:
      ValueError: if there are too many rounds, or the workers leave for good before their end.
    """
    if rounds * self._workers > _MOST_PRESENT or rounds > MOST:
      raise ValueError(
        f"{rounds:,} rounds of {self._workers:,} workers on a network; at most {MOST:,} rounds, "
        f"and {_MOST_PRESENT:,} rounds times workers"
      )
    while len(self._rows) < rounds:
      self._go_on(len(self._rows))
    seconds, network, counts = map(np.array, zip(*self._rows[:rounds], strict=True))
    present = None
    if not self._constant:
      bits = np.stack(self._present[:rounds])
      present = np.unpackbits(bits, axis=1, count=self._workers).astype(bool)
    return VirtualExchanges(seconds, network, counts, present)

  def _go_on(self, number: int) -> None:
    start = self._start()
    on, leaves = self._timeline.on.copy(), self._timeline.until
    computes = self._computing(number)
    computing = float(np.minimum(computes, leaves - start)[on].max())
    stage = sum(job.first_round <= number for job in self._plan.jobs) - 1
    job, exchanges = self._plan.jobs[stage], self._exchanges[stage]
    stays = on & (leaves > start + computes)
    stays &= leaves > start + computing + exchanges.sending(number)
    talking = exchanges.seconds(number, stays) if stays.any() else 0.0
    hidden = min(job.method.hidden_steps, job.method.local_steps) / job.method.local_steps
    waited = max(0.0, talking - hidden * computing)
    self._now = start + computing + waited
    self._waited += waited
    self._rows.append((self._now, self._waited, int(stays.sum())))
    if not self._constant:
      self._present.append(np.packbits(stays))

  def _start(self) -> float:
    """Returns when the next round begins: now, or when the first worker returns."""
    start = self._now
    self._timeline.advance(start)
    while not self._timeline.on.any():
      start = float(self._timeline.until.min())
      if not np.isfinite(start):
        raise ValueError(f"no worker is present after {self._now:g} s")
      self._timeline.advance(start)
    return start

  def _computing(self, number: int) -> np.ndarray:
    """Returns how long each worker computes in a round, [W]."""
    if number >= self._first + len(self._drawn):
      self._first = number
      steps = self._plan.steps(number + 1) - self._plan.steps(number)
      count = max(1, _AT_ONCE // (steps * self._workers))
      ends = [self._plan.steps(number + i) for i in range(count + 1)]
      of_worker = [self._pieces.of_worker(i, np.diff(ends)) for i in range(self._workers)]
      self._drawn = np.stack(of_worker, 1) * self._links.slowness
    return self._drawn[number - self._first]


def played_over(
  network: Network, speeds: clock.Speeds, plan: Plan, workers: int, seed: int
) -> Callable[[int], VirtualServer | VirtualExchanges]:
  """Returns a function that maps a number of rounds to their times.

  Args:
    network: the network.
    speeds: the distribution of the workers' step times.
    plan: the rounds.
    workers: number of workers.
    seed: seeds the network, the step times and the times of presence.

  Raises:
    ValueError: if the speeds or the times of presence are not those of the workers, if rounds have
      no common length, or if it is not known what workers send to whom.
  """
  job = plan.jobs[0]
  if any(job.by_epochs for job in plan.jobs):
    raise ValueError("clients that take steps by their number of examples have no common clock")
  axes = {"data": workers} if job.method.one_by_one else meshes.worker_axes(job.axes)
  links = network.links(axes, _random(seed, "links"))
  if job.method.one_by_one:
    return _served(network, links, speeds, job, seed)
  absent = None if network.presence.constant else np.ones((1, workers), bool)
  programs = [traced(job._replace(present=absent)) for job in plan.jobs]
  rounds = Rounds(programs, network, links, speeds, seed)
  rounds(1)
  return rounds


def _served(
  network: Network, links: Links, speeds: clock.Speeds, job: Job, seed: int
) -> Callable[[int], VirtualServer]:
  """Returns the rounds of a server that serves one worker at a time."""
  workers, period = len(links.region), job.method.local_steps
  pieces = clock.Pieces(speeds, workers, seed)
  ahead: Mapping[int, list[float]] = {i: [] for i in range(workers)}

  def computing(worker: int) -> float:
    if not ahead[worker]:
      drawn = pieces.of_worker(worker, [period] * 16) * links.slowness[worker]
      ahead[worker].extend(drawn[::-1].tolist())
    return ahead[worker].pop()

  served = Served(
    links,
    network.server_rate,
    push_bytes(job, network.factor),
    pull_bytes(job, network.factor),
    computing,
    network.presence.timeline(workers, _random(seed, "presence")),
  )

  def run(rounds: int) -> VirtualServer:
    if rounds > MOST:
      raise ValueError(f"{rounds:,} rounds to be ordered before the first; at most {MOST:,}")
    trace, shares, present = served.trace(rounds)
    return VirtualServer(trace.seconds, trace.owners, trace.staleness, shares, present)

  run(1)
  return run


def _random(seed: int, purpose: str) -> np.random.Generator:
  return np.random.default_rng([seed, *purpose.encode()])
