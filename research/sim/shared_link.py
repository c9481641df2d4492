"""Shares one link between transfers by max-min fairness while transfers start and end.

    rate_i = min(limit_i, L),   sum_i rate_i = the link's rate, or L = infinity if it is not full

A transfer whose limit is at most the level L ends at a known time. All others have the rate L, so
their ends have the order of their ends in V = integral of L dt, the bytes that each of them has
sent since any common time. When a transfer starts or ends, only those whose limits lie between the
old and the new level change from one kind to the other.
"""

import bisect
import math

import numpy as np

from research.sim.ends import SAME, Ends


class SharedLink:
  """One direction of a link, and the transfers of up to W workers that are under way.

  Transfers may start, stop and end in any order at one time; `first` must then be called before
  the time moves on, because it computes the level.

  Attributes:
    level: L after the last call of `first`, in bytes per second.
  """

  def __init__(self, limits: np.ndarray, rate: float):
    """Creates a link without transfers.

    Args:
      limits: the highest rate of each worker's transfers, float [W], in bytes per second.
      rate: the rate of the link in bytes per second.
    """
    order = np.argsort(limits, kind="stable")
    self._limits = limits.tolist()
    self._workers, self._ranks = order.tolist(), np.argsort(order).tolist()
    # Rates by rank in integer units, so that sums are exact and equal limits are of one kind.
    shift = 53 - int(np.frexp([*limits, rate])[1].min())
    whole = lambda value: int(math.ldexp(value, shift))
    self._whole, self._rate = [whole(limits[i]) for i in order], whole(rate)
    self._unit = math.ldexp(1.0, -shift)
    self._active: list[int] = []  # ranks of the workers whose transfers are under way, increasing
    self._own, self._used = 0, 0  # the first of these have their limits as rates; sum of the limits
    self._by_time, self._by_progress = Ends(), Ends()  # transfers at their limits; at the level
    self._progress, self._at = 0.0, 0.0  # V, and the time up to which it is known
    self._first: float | None = math.inf  # when the first transfer ends; None: not known
    self.level = math.inf

  def start(self, worker: int, size: float, now: float) -> None:
    """Starts a transfer of some bytes.

    Args:
      worker: the worker, which has no other transfer.
      size: the number of bytes.
      now: the current time in seconds, not before that of an earlier call.
    """
    self._advance(now)
    rank = self._ranks[worker]
    place = bisect.bisect(self._active, rank)
    self._active.insert(place, rank)
    if place < self._own or self.level == math.inf:
      self._own += 1
      self._used += self._whole[rank]
      self._by_time.start(worker, size / self._limits[worker], now)
    else:
      self._by_progress.start(worker, size, self._progress)

  def stop(self, worker: int, now: float) -> float:
    """Stops a transfer before its end; returns the number of bytes that are left."""
    self._advance(now)
    if worker in self._by_time:
      left = self._by_time.stop(worker, now) * self._limits[worker]
    else:
      left = self._by_progress.stop(worker, self._progress)
    self._forget(worker)
    return left

  def first(self) -> float:
    """Returns the time at which the first transfer ends; infinity if none is under way."""
    if self._first is None:
      self._settle()
      self._first = min(self._by_time.first(), self._first_at_level())
    return self._first

  def ended(self, now: float) -> list[int]:
    """Removes and returns the workers whose transfers end now."""
    ended, until = self._by_time.ended(now), now * SAME
    while self._first_at_level() <= until:
      ended.append(self._by_progress.pop())
    self._advance(now)
    for worker in ended:
      self._forget(worker)
    return ended

  def _first_at_level(self) -> float:
    if self.level == math.inf:
      return math.inf
    left = self._by_progress.first() - self._progress
    return self._at + (left if left > 0 else 0.0) / self.level

  def _advance(self, now: float) -> None:
    """Moves to a time at which transfers start or end."""
    if self.level < math.inf:
      self._progress += self.level * (now - self._at)
    self._at, self._first = now, None

  def _forget(self, worker: int) -> None:
    rank = self._ranks[worker]
    place = bisect.bisect_left(self._active, rank)
    del self._active[place]
    if place < self._own:
      self._own -= 1
      self._used -= self._whole[rank]

  def _settle(self) -> None:
    """Computes the level, and each transfer's kind, after transfers have started or ended."""
    active, whole, count = self._active, self._whole, len(self._active)
    # A limit is at most L if all fit the link when those above have this limit too.
    while self._own < count:
      rank = active[self._own]
      if whole[rank] * (count - self._own) + self._used > self._rate:
        break
      self._to_limit(rank)
    while self._own:
      rank = active[self._own - 1]
      if whole[rank] * (count - self._own) + self._used <= self._rate:
        break
      self._to_level(rank)
    if self._own < count:
      self.level = (self._rate - self._used) / (count - self._own) * self._unit
    elif self.level < math.inf:
      self.level, self._progress, self._by_progress = math.inf, 0.0, Ends()

  def _to_limit(self, rank: int) -> None:
    worker = self._workers[rank]
    left = self._by_progress.stop(worker, self._progress)
    self._by_time.start(worker, left / self._limits[worker], self._at)
    self._own += 1
    self._used += self._whole[rank]

  def _to_level(self, rank: int) -> None:
    worker = self._workers[rank]
    left = self._by_time.stop(worker, self._at) * self._limits[worker]
    self._by_progress.start(worker, left, self._progress)
    self._own -= 1
    self._used -= self._whole[rank]
