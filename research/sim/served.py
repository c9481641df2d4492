"""Simulates a server on a network that serves each worker as soon as its message arrives.

A worker computes, sends its message, and computes again when it has the server's reply. All uploads
share the server's link, and so do all downloads. An absent worker pauses, and continues when it
returns.
"""

from collections.abc import Callable

import numpy as np

from research.sim.churn import Timeline
from research.sim.clock import Trace, staleness_of
from research.sim.fair import water_level
from research.sim.network import Links

_COMPUTE, _UPLOAD, _FLIGHT, _DOWNLOAD, _RETURN = range(5)  # the phases of a worker's cycle
_DONE = 1e-12  # relative remainder of a phase that counts as done


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
    self._computing, self._timeline, self._rate = computing, timeline, rate
    self._delay = links.to_hub(np.arange(workers), 0)
    self._limits = {_UPLOAD: links.upload, _DOWNLOAD: links.download}
    self._orders = {phase: np.argsort(limits) for phase, limits in self._limits.items()}
    self._sizes = {_UPLOAD: up, _DOWNLOAD: down}
    self._phase = np.full(workers, _COMPUTE)
    self._left = np.array([computing(i) for i in range(workers)])  # seconds or bytes
    self._speed = np.zeros(workers)
    self._now = 0.0
    self._owners: list[int] = []
    self._seconds: list[float] = []
    self._shares: list[float] = []  # share of the workers' time that was not computing, so far
    self._present: list[int] = []
    self._busy, self._waiting = 0.0, 0.0  # worker-seconds of presence, and of communication

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
    self._set_speeds()
    moving = self._speed > 0
    seconds = np.full(len(self._left), np.inf)
    np.divide(self._left, self._speed, out=seconds, where=moving)
    turn, change = float(seconds.min()), float(self._timeline.until.min()) - self._now
    step = min(turn, change)
    if not np.isfinite(step):
      raise ValueError(f"no worker is present after {self._now:g} s")
    present = int(self._timeline.on.sum())
    self._busy += step * present
    self._waiting += step * int((self._timeline.on & (self._phase != _COMPUTE)).sum())
    self._now += step
    self._left -= np.where(moving, step * self._speed, 0)
    if change <= turn:
      self._timeline.advance(self._now)
    for worker in np.flatnonzero(moving & (seconds <= step * (1 + _DONE))).tolist():
      self._next_phase(worker)

  def _set_speeds(self) -> None:
    on = self._timeline.on
    self._speed = on.astype(np.float64)  # seconds per second; bytes per second where it is sending
    for phase, limits in self._limits.items():
      under_way = on & (self._phase == phase)
      order = self._orders[phase]
      level = water_level(limits[order[under_way[order]]], self._rate)
      self._speed[under_way] = np.minimum(limits[under_way], level)

  def _next_phase(self, worker: int) -> None:
    phase = (self._phase[worker] + 1) % 5
    self._phase[worker] = phase
    if phase == _DOWNLOAD:
      self._owners.append(worker)
      self._seconds.append(self._now)
      self._shares.append(self._waiting / self._busy)
      self._present.append(int(self._timeline.on.sum()))
    if phase in (_FLIGHT, _RETURN):
      self._left[worker] = self._delay[worker]
    elif phase == _COMPUTE:
      self._left[worker] = self._computing(worker)
    else:
      self._left[worker] = self._sizes[phase]
