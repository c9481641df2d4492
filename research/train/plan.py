"""When the rounds of a run begin and end, in local steps, and what they send by then."""

import bisect

from research.comm import wire
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
    return job.first_round + (step - job.first_step) / job.method.period

  def steps(self, rounds: int) -> int:
    """How many steps so many rounds take."""
    job = [job for job in self.jobs if job.first_round <= rounds][-1]
    return job.first_step + (rounds - job.first_round) * job.method.period

  def end(self, step: int) -> int:
    """The first end of a round that is not before a step."""
    job = self.jobs[self.stage(step)]
    period = job.method.period
    return job.first_step - (job.first_step - step) // period * period

  def next_stage(self, step: int) -> int | None:
    """The step at which the period changes next, if it does."""
    later = self.stage(step) + 1
    return self.starts[later] if later < len(self.starts) else None


class Sent:
  """What a worker's algorithm sends in a run of so many steps."""

  def __init__(self, plan: Plan, layout: layouts.Layout, steps: int):
    self.plan, self.layout = plan, layout
    last = [job.first_round for job in plan.jobs[1:]]
    ends = [*last, max(1, round(plan.rounds(steps)))]
    self._found = [
      workers.traffic(job, layout, end) if end > job.first_round else None
      for job, end in zip(plan.jobs, ends, strict=True)
    ]

  def until(self, step: int) -> float:
    """Bytes in the first so many steps."""
    rounds, total = self.plan.rounds(step), 0.0
    for number, (job, found) in enumerate(zip(self.plan.jobs, self._found, strict=True)):
      if found and rounds > job.first_round:
        stop = min(rounds, self._end(number, rounds))
        total += found.until(stop) - found.until(job.first_round)
    return total

  def transfers(self, step: int) -> list[wire.Transfer]:
    """The transfers of the first so many steps; of a later stage less those before it."""
    rounds, found = max(1, round(self.plan.rounds(step))), []
    for number, job in enumerate(self.plan.jobs):
      if rounds <= job.first_round:
        break
      stop = round(min(rounds, self._end(number, rounds)))
      found += workers.traffic(job, self.layout, stop).transfers
      if job.first_round:
        before = workers.traffic(job, self.layout, job.first_round).transfers
        found += [t._replace(times=-t.times) for t in before]
    return found

  def _end(self, number: int, rounds: float) -> float:
    later = self.plan.jobs[number + 1 :]
    return later[0].first_round if later else rounds
