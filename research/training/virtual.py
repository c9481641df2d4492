"""Computes the virtual time at which each round ends, from a clock with the workers' speeds."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from research.sim import clock
from research.training.plan import Plan

MOST = 2**24  # maximum number of rounds whose times are computed before a run starts


class VirtualServer(NamedTuple):
  """The rounds of workers that do not wait for each other, on a virtual clock."""

  seconds: np.ndarray  # float64 [K], the end of each round
  order: np.ndarray  # int32 [K], the worker of each round
  staleness: np.ndarray  # int32 [K], number of updates since each gradient's model
  network: np.ndarray | None = None  # float64 [K], share of the time of communication so far
  present: np.ndarray | None = None  # int [K], number of workers that are present

  def at(self, rounds: float) -> float:
    """Returns the time at which a number of rounds is complete, interpolated within a round."""
    return between(self.seconds, rounds)

  def within(self, seconds: float) -> int | None:
    """Returns the number of rounds that end within a time; None if all rounds do."""
    found = int(np.searchsorted(self.seconds, seconds, side="right"))
    return found if found < len(self.seconds) else None

  def columns(self, rounds: float) -> dict[str, Any]:
    """Returns the columns of a row that follow from the network, if there is one."""
    if self.network is None or self.present is None:
      return {}
    last = max(0, math.ceil(rounds) - 1)
    share = round(float(self.network[last]), 6)
    return {"present": int(self.present[last]), "network_share": share}


class VirtualRounds:
  """The rounds of workers that wait for the slowest worker; draws times in pieces, on demand."""

  order = None
  STEPS = 2**16  # number of steps of a worker that are drawn at once; at least one round is drawn

  def __init__(self, lockstep: Callable[[], clock.Lockstep], plan: Plan):
    """Creates the times of a plan's rounds.

    Args:
      lockstep: returns a clock at second 0.
      plan: the number of steps of each round.
    """
    self._lockstep, self._plan = lockstep, plan
    self._begin()

  def at(self, rounds: float) -> float:
    """Returns the time at which a number of rounds is complete, interpolated within a round."""
    if rounds < self._first:
      self._begin()
    while rounds > self._first + len(self._ends):
      self._go_on()
    return between(self._ends, rounds - self._first, self._before)

  def within(self, seconds: float) -> int | None:
    """Returns the number of rounds that end within a time; None if more than MOST rounds do."""
    self._begin()
    while not len(self._ends) or self._ends[-1] <= seconds:
      if self._first > MOST:
        return None
      self._go_on()
    return self._first + int(np.searchsorted(self._ends, seconds, side="right"))

  def columns(self, rounds: float) -> dict[str, Any]:
    """Returns no columns, because there is no network."""
    del rounds
    return {}

  def _begin(self) -> None:
    self._draws, self._first, self._before = self._lockstep(), 0, 0.0
    self._ends = np.zeros(0)  # end times of the rounds of the current piece

  def _go_on(self) -> None:
    """Draws the times of the next rounds."""
    if len(self._ends):
      self._before = float(self._ends[-1])
    self._first += len(self._ends)
    start = self._plan.steps(self._first)
    period = self._plan.steps(self._first + 1) - start
    numbers = range(self._first, self._first + max(1, self.STEPS // period) + 1)
    self._ends = self._draws.ends(np.diff([self._plan.steps(number) for number in numbers]))


class Virtual(Protocol):
  """The virtual times of rounds."""

  @property
  def order(self) -> np.ndarray | None:
    """The worker of each round, int32 [K]; None if every round has all workers."""
    ...

  def at(self, rounds: float) -> float:
    """Returns the time at which a number of rounds is complete, interpolated within a round."""
    ...

  def within(self, seconds: float) -> int | None:
    """Returns the number of rounds that end within a time; None if all computed rounds do."""
    ...

  def columns(self, rounds: float) -> dict[str, Any]:
    """Returns further columns of the row at the end of a number of rounds."""
    ...


def between(ends: np.ndarray, rounds: float, start: float = 0.0) -> float:
  """Returns the time at which a number of rounds is complete, interpolated within a round.

  Args:
    ends: the end times of the rounds.
    rounds: a number of rounds, possibly fractional.
    start: the time at which the first round begins.
  """
  whole = int(rounds)
  before = float(ends[whole - 1]) if whole else start
  return before if whole == rounds else float(before + (rounds - whole) * (ends[whole] - before))


def played(speeds: clock.Speeds, plan: Plan, workers: int, seed: int) -> Callable[[int], Virtual]:
  """Returns a function that maps a number of rounds to their times.

  A method that serves one worker at a time receives each worker's result as soon as it is ready.
  With any other method, every round waits for the slowest worker.

  Args:
    speeds: the distribution of the workers' step times.
    plan: the rounds.
    workers: number of workers on the clock.
    seed: seeds the random step times.

  Raises:
    ValueError: if the speeds do not match the number of workers, or rounds have no common length.
  """
  method = plan.jobs[0].method
  if any(job.by_epochs for job in plan.jobs):
    raise ValueError("clients that take steps by their number of examples have no common clock")

  def run(rounds: int) -> Virtual:
    if method.one_by_one:
      if rounds > MOST:
        raise ValueError(f"{rounds:,} rounds to be ordered before the first; at most {MOST:,}")
      trace = clock.asynchronous(speeds, workers, rounds, seed, method.local_steps)
      return VirtualServer(trace.seconds, trace.owners, trace.staleness)
    return VirtualRounds(lambda: clock.Lockstep(speeds, workers, seed), plan)

  run(1)
  return run


def rounds_within(run: Callable[[int], Virtual], seconds: float) -> int:
  """Returns the number of rounds that end within a virtual time.

  Args:
    run: a result of `played`.
    seconds: the virtual time.

  Raises:
    ValueError: if no round ends within this time, or more than 2^24 rounds end within this time.
  """
  rounds = 64
  while (found := run(rounds).within(seconds)) is None:
    rounds *= 2
    if rounds > MOST:
      end = run(MOST).at(MOST)
      raise ValueError(f"{MOST:,} rounds end after {end:g} s; use a shorter time")
  if not found:
    raise ValueError(f"the first round ends only after {run(1).at(1):g} s")
  return found
