"""Plans the rounds of a run: the local steps at which rounds begin and end, and their bytes."""

import bisect
import math

from research.analysis import wire
from research.parallel import layout as layouts
from research.parallel import traffic
from research.parallel.job import Job


class Plan:
  """The rounds of a run; their length may change between stages."""

  def __init__(self, jobs: tuple[Job, ...]):
    """Creates a plan.

    Args:
      jobs: the jobs of the stages, in order; each stage has one period of the method.
    """
    self.jobs = jobs
    self.starts = [job.first_step for job in jobs]

  def stage(self, step: int) -> int:
    """Returns the index of the stage of the round that begins at a step."""
    return bisect.bisect(self.starts, step) - 1

  def rounds(self, step: int) -> float:
    """Returns the number of rounds in a number of steps; the result may be fractional."""
    job = self.jobs[self.stage(step)]
    return job.first_round + (step - job.first_step) / job.method.local_steps

  def steps(self, rounds: int) -> int:
    """Returns the number of steps in a number of rounds."""
    job = [job for job in self.jobs if job.first_round <= rounds][-1]
    return job.first_step + (rounds - job.first_round) * job.method.local_steps

  def end(self, step: int) -> int:
    """Returns the end of the first round that ends at or after a given step."""
    job = self.jobs[self.stage(step)]
    period = job.method.local_steps
    return job.first_step - (job.first_step - step) // period * period

  def next_stage(self, step: int) -> int | None:
    """Returns the step at which the next stage starts; None in the last stage."""
    later = self.stage(step) + 1
    return self.starts[later] if later < len(self.starts) else None


class Sent:
  """Counts the bytes that a worker's algorithm sends; memory use does not grow with the run."""

  def __init__(self, plan: Plan, layout: layouts.Layout, steps: int):
    self.plan = plan
    last = [job.first_round for job in plan.jobs[1:]]
    self._ends = [*last, max(1, round(plan.rounds(steps)))]  # ends of the stages, in rounds
    self._stages = [
      Stage(traffic.by_round(job, layout), job.first_round, end) if end > job.first_round else None
      for job, end in zip(plan.jobs, self._ends, strict=True)
    ]

  def until(self, step: int) -> float:
    """Returns the bytes sent in the first `step` steps."""
    rounds = self.plan.rounds(step)
    return sum((stage.until(stop) for stage, stop in self._begun(rounds)), 0.0)

  def transfers(self, step: int) -> list[wire.Transfer]:
    """Returns the transfers in the first `step` steps."""
    rounds = max(1, round(self.plan.rounds(step)))
    return [t for stage, stop in self._begun(rounds) for t in stage.transfers(round(stop))]

  def _begun(self, rounds: float) -> list[tuple["Stage", float]]:
    """Returns the stages that have begun after a number of rounds, and each stage's end so far."""
    ends = [*self._ends[:-1], rounds]
    begun = zip(self._stages, ends, strict=True)
    return [(stage, min(rounds, end)) for stage, end in begun if stage and stage.first < rounds]


class Stage:
  """Counts the bytes sent from a stage's first round on.

  Rounds are traced in consecutive pieces; each piece is traced once, when the run reaches the
  piece. A resumed run first traces the rounds that are already complete.
  """

  PIECE = 2**16  # rounds per piece

  def __init__(self, rounds: wire.RoundTraffic, first: int, end: int):
    """Reads the rounds first, ..., end - 1.

    Args:
      rounds: the traced rounds.
      first: index of the first round.
      end: index after the last round.

    Raises:
      ValueError: if the traffic of the first or the last piece is not statically known.
    """
    self._rounds, self.first, self._end = rounds, first, end
    if end - first > self.PIECE:
      rounds.between(end - self.PIECE, end)  # rejects, for example, a counter that overflows
    self._begin()

  def until(self, rounds: float) -> float:
    """Returns the bytes from the stage's first round to round `rounds`, possibly fractional."""
    if self._rounds.each is not None:
      return (rounds - self.first) * self._rounds.each
    whole = int(rounds)
    self._go_to(math.ceil(rounds))
    inside = self._piece.sent[: whole - self._start].sum()
    part = (rounds - whole) * self._piece.sent[whole - self._start] if rounds > whole else 0.0
    return float(self._before + inside + part)

  def transfers(self, rounds: int) -> list[wire.Transfer]:
    """Returns the transfers from the stage's first round to round `rounds`."""
    if self._rounds.each is not None:
      return wire.happened(self._rounds.between(self.first, rounds).transfers)
    self._go_to(rounds)
    own = self._rounds.between(self._start, rounds).transfers
    return wire.happened(map(_together, self._transfers, own))

  def _begin(self) -> None:
    self._start, self._before = self.first, 0.0  # start of the piece, and bytes before it
    self._piece = self._read()
    self._transfers = [t._replace(times=0) for t in self._piece.transfers]  # before the piece

  def _read(self) -> wire.Traffic:
    return self._rounds.between(self._start, min(self._start + self.PIECE, self._end))

  def _go_to(self, rounds: int) -> None:
    """Moves to the piece in which round `rounds` ends."""
    if rounds < self._start:
      self._begin()
    while rounds > self._start + self.PIECE:
      self._before += float(self._piece.sent.sum())
      self._transfers = list(map(_together, self._transfers, self._piece.transfers))
      self._start += self.PIECE
      self._piece = self._read()


def _together(one: wire.Transfer, other: wire.Transfer) -> wire.Transfer:
  return one._replace(times=one.times + other.times)
