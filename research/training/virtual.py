"""Virtual time: when the rounds of a run would end if its workers were as fast as a clock says."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from research.sim import clock
from research.training.plan import Plan

MOST = 2**24  # rounds that are counted, or ordered, before a run begins


class Served(NamedTuple):
  """The rounds of workers that do not wait for each other, on a virtual clock."""

  seconds: np.ndarray  # float64 [K], at the end of each round
  order: np.ndarray  # int32 [K], whose rounds they are
  staleness: np.ndarray  # int32 [K], updates since the model that each was worked out on

  def at(self, rounds: float) -> float:
    """When so many rounds are done; within a round on a straight line."""
    return _between(self.seconds, rounds)

  def within(self, seconds: float) -> int | None:
    """How many rounds end within so many seconds; None: more than these."""
    found = int(np.searchsorted(self.seconds, seconds, side="right"))
    return found if found < len(self.seconds) else None


class Waiting:
  """The rounds of workers that wait for the slowest, drawn in pieces as they are asked for."""

  order = None
  STEPS = 2**16  # of a worker that are drawn at once, if a round has no more

  def __init__(self, lockstep: Callable[[], clock.Lockstep], plan: Plan):
    """`lockstep` begins anew at second 0; the plan says how many steps a round has."""
    self._lockstep, self._plan = lockstep, plan
    self._begin()

  def at(self, rounds: float) -> float:
    """When so many rounds are done; within a round on a straight line."""
    if rounds < self._first:
      self._begin()
    while rounds > self._first + len(self._ends):
      self._go_on()
    return _between(self._ends, rounds - self._first, self._before)

  def within(self, seconds: float) -> int | None:
    """How many rounds end within so many seconds; None: more than MOST."""
    self._begin()
    while not len(self._ends) or self._ends[-1] <= seconds:
      if self._first > MOST:
        return None
      self._go_on()
    return self._first + int(np.searchsorted(self._ends, seconds, side="right"))

  def _begin(self) -> None:
    self._draws, self._first, self._before = self._lockstep(), 0, 0.0
    self._ends = np.zeros(0)  # of the rounds from the first one of the piece on

  def _go_on(self) -> None:
    """The next piece."""
    if len(self._ends):
      self._before = float(self._ends[-1])
    self._first += len(self._ends)
    start = self._plan.steps(self._first)
    period = self._plan.steps(self._first + 1) - start
    numbers = range(self._first, self._first + max(1, self.STEPS // period) + 1)
    self._ends = self._draws.ends(np.diff([self._plan.steps(number) for number in numbers]))


Virtual = Served | Waiting


def _between(ends: np.ndarray, rounds: float, start: float = 0.0) -> float:
  """When so many rounds are done, of which the first begins at `start`."""
  whole = int(rounds)
  before = float(ends[whole - 1]) if whole else start
  return before if whole == rounds else float(before + (rounds - whole) * (ends[whole] - before))


def played(speeds: clock.Speeds, plan: Plan, workers: int, seed: int) -> Callable[[int], Virtual]:
  """A function of the number of rounds.

  A method that serves workers one by one takes each one's work when it is done; with all others
  every round waits for the slowest worker.

  Args:
    speeds: how long the workers' steps take.
    plan: the rounds.
    workers: how many share the clock.
    seed: seeds what the speeds draw.

  Raises:
    ValueError: if the speeds are not those of these workers, or no round has one length.
  """
  method = plan.jobs[0].method
  if any(job.by_epochs for job in plan.jobs):
    raise ValueError("clients that take steps by their number of examples have no common clock")

  def run(rounds: int) -> Virtual:
    if method.one_by_one:
      if rounds > MOST:
        raise ValueError(f"{rounds:,} rounds to be ordered before the first; at most {MOST:,}")
      trace = clock.asynchronous(speeds, workers, rounds, seed, method.local_steps)
      return Served(trace.seconds, trace.owners, trace.staleness)
    return Waiting(lambda: clock.Lockstep(speeds, workers, seed), plan)

  run(1)
  return run


def rounds_within(run: Callable[[int], Virtual], seconds: float) -> int:
  """How many rounds end within so many virtual seconds.

  Raises:
    ValueError: if not even one does, or more than 2^24 do.
  """
  rounds = 64
  while (found := run(rounds).within(seconds)) is None:
    rounds *= 2
    if rounds > MOST:
      end = run(MOST).at(MOST)
      raise ValueError(f"{MOST:,} rounds end after {end:g} s; there are to be fewer")
  if not found:
    raise ValueError(f"the first round ends only after {run(1).at(1):g} s")
  return found
