"""When the rounds of a run begin and end, in local steps, and what they send by then."""

import bisect
import math

from research.analysis import wire
from research.parallel import layout as layouts
from research.parallel import workers
from research.parallel.job import Job


class Plan:
  """The rounds of a run, whose length may change from stage to stage."""

  def __init__(self, jobs: tuple[Job, ...]):
    """One job for each period of the method, in order."""
    self.jobs = jobs
    self.starts = [job.first_step for job in jobs]

  def stage(self, step: int) -> int:
    """The number of the stage in which a round runs that begins at a step."""
    return bisect.bisect(self.starts, step) - 1

  def rounds(self, step: int) -> float:
    """How many rounds are done after so many steps."""
    job = self.jobs[self.stage(step)]
    return job.first_round + (step - job.first_step) / job.method.local_steps

  def steps(self, rounds: int) -> int:
    """How many steps so many rounds take."""
    job = [job for job in self.jobs if job.first_round <= rounds][-1]
    return job.first_step + (rounds - job.first_round) * job.method.local_steps

  def end(self, step: int) -> int:
    """The first end of a round that is not before a step."""
    job = self.jobs[self.stage(step)]
    period = job.method.local_steps
    return job.first_step - (job.first_step - step) // period * period

  def next_stage(self, step: int) -> int | None:
    """The step at which the period changes next, if it does."""
    later = self.stage(step) + 1
    return self.starts[later] if later < len(self.starts) else None


class Sent:
  """What a worker's algorithm sends in a run of so many steps, in memory independent of these."""

  def __init__(self, plan: Plan, layout: layouts.Layout, steps: int):
    self.plan = plan
    last = [job.first_round for job in plan.jobs[1:]]
    self._ends = [*last, max(1, round(plan.rounds(steps)))]  # of the stages, in rounds
    self._stages = [
      Stage(workers.sending(job, layout), job.first_round, end) if end > job.first_round else None
      for job, end in zip(plan.jobs, self._ends, strict=True)
    ]

  def until(self, step: int) -> float:
    """Bytes in the first so many steps."""
    rounds = self.plan.rounds(step)
    return sum((stage.until(stop) for stage, stop in self._begun(rounds)), 0.0)

  def transfers(self, step: int) -> list[wire.Transfer]:
    """The transfers of the first so many steps."""
    rounds = max(1, round(self.plan.rounds(step)))
    return [t for stage, stop in self._begun(rounds) for t in stage.transfers(round(stop))]

  def _begun(self, rounds: float) -> list[tuple["Stage", float]]:
    """The stages that have begun after so many rounds, and after how many each is left."""
    ends = [*self._ends[:-1], rounds]
    begun = zip(self._stages, ends, strict=True)
    return [(stage, min(rounds, end)) for stage, end in begun if stage and stage.first < rounds]


class Stage:
  """What is sent from a stage's first round on.

  Rounds are read in pieces, each where the one before it ends: those of a run are read once, as it
  comes to them, and a resumed run first reads those that are done.
  """

  PIECE = 2**16  # rounds that are read at once

  def __init__(self, rounds: wire.Rounds, first: int, end: int):
    """Of the rounds first, ..., end - 1.

    Raises:
      ValueError: if what is sent is no fact, as far as the first and the last rounds show.
    """
    self._rounds, self.first, self._end = rounds, first, end
    if end - first > self.PIECE:
      rounds.between(end - self.PIECE, end)  # such as a counter that no longer counts there
    self._begin()

  def until(self, rounds: float) -> float:
    """Bytes from the stage's first round on, until so many rounds are done, maybe a part of one."""
    if self._rounds.each is not None:
      return (rounds - self.first) * self._rounds.each
    whole = int(rounds)
    self._go_to(math.ceil(rounds))
    inside = self._piece.sent[: whole - self._start].sum()
    part = (rounds - whole) * self._piece.sent[whole - self._start] if rounds > whole else 0.0
    return float(self._before + inside + part)

  def transfers(self, rounds: int) -> list[wire.Transfer]:
    """The transfers from the stage's first round on, until so many rounds are done."""
    if self._rounds.each is not None:
      return wire.happened(self._rounds.between(self.first, rounds).transfers)
    self._go_to(rounds)
    own = self._rounds.between(self._start, rounds).transfers
    return wire.happened(map(_together, self._transfers, own))

  def _begin(self) -> None:
    self._start, self._before = self.first, 0.0  # of the piece, and the bytes before it
    self._piece = self._read()
    self._transfers = [t._replace(times=0) for t in self._piece.transfers]  # before it

  def _read(self) -> wire.Traffic:
    return self._rounds.between(self._start, min(self._start + self.PIECE, self._end))

  def _go_to(self, rounds: int) -> None:
    """Makes the piece that in which so many rounds end."""
    if rounds < self._start:
      self._begin()
    while rounds > self._start + self.PIECE:
      self._before += float(self._piece.sent.sum())
      self._transfers = list(map(_together, self._transfers, self._piece.transfers))
      self._start += self.PIECE
      self._piece = self._read()


def _together(one: wire.Transfer, other: wire.Transfer) -> wire.Transfer:
  return one._replace(times=one.times + other.times)
