"""Simulates a server on a network that serves each worker as soon as its message arrives.

A worker computes, sends its message, and computes again when it has the server's reply. All uploads
share the server's link, and so do all downloads. An absent worker pauses, and continues when it
returns.
"""

import math
from collections.abc import Callable

import numpy as np

from research.sim.churn import Timeline
from research.sim.clock import Trace, staleness_of
from research.sim.ends import SAME, Ends
from research.sim.network import Links
from research.sim.shared_link import SharedLink

_COMPUTE, _UPLOAD, _FLIGHT, _DOWNLOAD, _RETURN = range(5)  # the phases of a worker's cycle


class Served:
  """The events of W workers and one server, in the order of time."""

  def __init__(
    self,
    links: Links,
    rate: float,
    up: float,
    down: float,
    computing: Callable[[int], float],
    timeline: Timeline,
  ):
    """Starts all workers at time 0, when they have the initial model.

    Args:
      links: the network; the server is at the hub of region 0.
      rate: the rate of the server's link in each direction, in bytes per second.
      up: size of a message in bytes.
      down: size of a reply in bytes.
      computing: returns the seconds of a worker's next piece of work.
      timeline: the presence of the workers.
    """
    workers = len(links.region)
    self._computing, self._timeline = computing, timeline
    self._delay = links.to_hub(np.arange(workers), 0).tolist()
    self._alone = Ends()  # the ends of phases in which nothing is shared
    self._upload, self._download = SharedLink(links.upload, rate), SharedLink(links.download, rate)
    self._phases = (self._alone, self._upload, self._alone, self._download, self._alone)
    self._sizes = {_UPLOAD: up, _DOWNLOAD: down}
    self._phase = [_COMPUTE] * workers
    self._now, self._changes = 0.0, Ends()  # presences and absences
    for worker, until in enumerate(timeline.until.tolist()):
      self._changes.start(worker, until, 0.0)
    self._change = self._changes.first()
    self._on = timeline.on.tolist()
    self._count, self._talking = sum(self._on), 0  # present workers; those that do not compute
    self._left: dict[int, float] = {}  # seconds or bytes of each absent worker's phase
    self._owners: list[int] = []
    self._seconds: list[float] = []
    self._shares: list[float] = []  # share of the workers' time that was not computing, so far
    self._present: list[int] = []
    self._busy, self._waiting = 0.0, 0.0  # worker-seconds of presence, and of communication
    for worker in range(workers):
      self._go(worker, computing(worker))

  def trace(self, events: int) -> tuple[Trace, np.ndarray, np.ndarray]:
    """Returns the first E messages that arrive, with the state of the network at each.

    Args:
      events: E.

    Returns:
      The messages; the share of the workers' time of presence in which they did not compute, from
      the start to each message, [E]; and the number of workers that are present, [E].

    Raises:
      ValueError: if the workers leave for good before E messages have arrived.
    """
    while len(self._owners) < events:
      self._go_on()
    owners = np.array(self._owners[:events], np.int32)
    seconds = np.array(self._seconds[:events])
    state = np.array(self._shares[:events]), np.array(self._present[:events])
    return Trace(owners, staleness_of(owners), seconds), *state

  def _go_on(self) -> None:
    """Moves to the next time at which a phase ends, or a worker joins or leaves."""
    alone, upload, download = self._alone.first(), self._upload.first(), self._download.first()
    now = min(alone, upload, download, self._change)
    if now == math.inf:
      raise ValueError(f"no worker is present after {self._now:g} s")
    self._busy += (now - self._now) * self._count
    self._waiting += (now - self._now) * self._talking
    self._now, until = now, now * SAME
    ended = self._alone.ended(now) if alone <= until else []
    if upload <= until:
      ended += self._upload.ended(now)
    if download <= until:
      ended += self._download.ended(now)
    if self._change <= now:
      self._change_presence(ended)
    for worker in sorted(ended):
      self._next_phase(worker)

  def _go(self, worker: int, left: float) -> None:
    """Starts or continues a phase of a worker, of which some seconds or bytes are left."""
    if self._on[worker]:
      self._phases[self._phase[worker]].start(worker, left, self._now)
    else:
      self._left[worker] = left

  def _change_presence(self, ended: list[int]) -> None:
    """Pauses the workers that leave now, and continues those that join.

    Args:
      ended: the workers whose phases end now, which have nothing to pause.
    """
    while self._changes.first() <= self._now:
      changed = []
      while self._changes.first() <= self._now:
        changed.append(self._changes.pop())
      changed.sort()
      self._timeline.switch(np.array(changed))
      for worker in changed:
        self._changes.start(worker, float(self._timeline.until[worker]), 0.0)
        if self._on[worker]:
          self._leave(worker, worker in ended)
        else:
          self._join(worker)
    self._change = self._changes.first()

  def _leave(self, worker: int, has_ended: bool) -> None:
    phase = self._phase[worker]
    self._on[worker] = False
    self._count -= 1
    self._talking -= phase != _COMPUTE
    if not has_ended:
      self._left[worker] = self._phases[phase].stop(worker, self._now)

  def _join(self, worker: int) -> None:
    self._on[worker] = True
    self._count += 1
    self._talking += self._phase[worker] != _COMPUTE
    if worker in self._left:
      self._go(worker, self._left.pop(worker))

  def _next_phase(self, worker: int) -> None:
    phase = self._phase[worker] = (self._phase[worker] + 1) % 5
    if self._on[worker] and phase in (_COMPUTE, _UPLOAD):
      self._talking += 1 if phase == _UPLOAD else -1
    if phase == _DOWNLOAD:
      self._owners.append(worker)
      self._seconds.append(self._now)
      self._shares.append(self._waiting / self._busy)
      self._present.append(self._count)
    if phase in (_FLIGHT, _RETURN):
      self._go(worker, self._delay[worker])
    elif phase == _COMPUTE:
      self._go(worker, self._computing(worker))
    else:
      self._go(worker, self._sizes[phase])
