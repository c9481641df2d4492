"""Orders the ends of what workers do by a clock, which reads seconds or any other amount."""

import heapq
import math

# Times up to this factor apart are equal, because sums are rounded.
SAME = 1 + 1e-14


class Ends:
  """A priority queue of workers, each of which ends when the clock has advanced by some amount.

  A worker that stops before its end leaves its entry in the heap until the entry is the first.
  """

  def __init__(self):
    self._heap: list[tuple[float, int, float, float]] = []  # end, worker, start, amount
    self._entries: dict[int, tuple[float, int, float, float]] = {}

  def __contains__(self, worker: int) -> bool:
    return worker in self._entries

  def start(self, worker: int, amount: float, now: float) -> None:
    """Adds a worker, which is not in the queue."""
    entry = self._entries[worker] = (now + amount, worker, now, amount)
    heapq.heappush(self._heap, entry)

  def stop(self, worker: int, now: float) -> float:
    """Removes a worker before its end; returns the amount that is left."""
    _, _, start, amount = self._entries.pop(worker)
    return max(amount - (now - start), 0.0)

  def first(self) -> float:
    """Returns the first end; infinity if the queue is empty."""
    heap, entries = self._heap, self._entries
    while heap:
      entry = heap[0]
      if entries.get(entry[1]) is entry:
        return entry[0]
      heapq.heappop(heap)
    return math.inf

  def pop(self) -> int:
    """Removes and returns the worker whose end `first` has returned."""
    worker = heapq.heappop(self._heap)[1]
    del self._entries[worker]
    return worker

  def ended(self, now: float) -> list[int]:
    """Removes and returns the workers that end now."""
    heap, entries, until, ended = self._heap, self._entries, now * SAME, []
    while heap and heap[0][0] <= until:
      entry = heapq.heappop(heap)
      worker = entry[1]
      if entries.get(worker) is entry:
        del entries[worker]
        ended.append(worker)
    return ended
