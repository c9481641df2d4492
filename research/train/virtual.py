"""Virtual time: when the rounds of a run would end if its workers were as fast as a clock says."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from research import registry
from research.comm import clock
from research.train.plan import Plan


class Virtual(NamedTuple):
  """The rounds of a run on a virtual clock."""

  seconds: np.ndarray  # float64 [K], at the end of each round
  order: np.ndarray | None = None  # int32 [K], whose rounds they are, where workers do not wait

  def at(self, rounds: float) -> float:
    """When so many rounds are done; within a round on a straight line."""
    whole = int(rounds)
    before = self.seconds[whole - 1] if whole else 0.0
    if whole == rounds:
      return float(before)
    return float(before + (rounds - whole) * (self.seconds[whole] - before))


def played(spec: str, plan: Plan, workers: int, seed: int) -> Callable[[int], Virtual]:
  """A function of the number of rounds.

  A method that serves workers one by one takes each one's work when it is done; with all others
  every round waits for the slowest worker.

  Args:
    spec: of the speeds; empty: all alike.
    plan: the rounds.
    workers: that share the clock.
    seed: of what the speeds draw.

  Raises:
    ValueError: if the speeds are not those of these workers, or no round has one length.
  """
  speeds = registry.build("speeds", spec or "steady(1.0)")
  method = plan.jobs[0].method
  if any(job.by_epochs for job in plan.jobs):
    raise ValueError("clients that take steps by their number of examples have no common clock")

  def run(rounds: int) -> Virtual:
    if method.one_by_one:
      trace = clock.asynchronous(speeds, workers, rounds, seed, method.period)
      return Virtual(trace.seconds, trace.owners)
    ends = np.array([plan.steps(number) for number in range(rounds + 1)])
    return Virtual(clock.synchronous(speeds, workers, np.diff(ends), seed))

  run(1)
  return run


def rounds_within(run: Callable[[int], Virtual], seconds: float) -> int:
  """How many rounds end within so many virtual seconds.

  Raises:
    ValueError: if not even one does, or more than 2^24 do.
  """
  rounds = 64
  while (end := run(rounds).seconds[-1]) <= seconds:
    rounds *= 2
    if rounds > 2**24:
      raise ValueError(f"{rounds:,} rounds end after {end:g} s; there are to be fewer")
  found = int(np.searchsorted(run(rounds).seconds, seconds, side="right"))
  if not found:
    raise ValueError(f"the first round ends only after {run(1).seconds[0]:g} s")
  return found
