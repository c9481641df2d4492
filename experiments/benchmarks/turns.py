"""Times things in turn, so that what else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Sequence


def in_turn(measures: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
  """What each of `measures` returns, [measure][turn]; every other turn goes through them backwards.

  Each is called once before, uncounted.
  """
  found: list[list[float]] = [[] for _ in measures]
  places = list(range(len(measures)))
  for turn in range(-1, repeats):
    for place in places if turn % 2 else reversed(places):
      value = measures[place]()
      if turn >= 0:
        found[place].append(value)
  return found


def seconds(work: Callable[[], object]) -> float:
  """Of one call, by the clock."""
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
  """Turn by turn."""
  return [a / b for a, b in zip(above, below, strict=True)]


def milliseconds(found: Sequence[float]) -> float:
  """The median of seconds."""
  return 1000 * statistics.median(found)


def shown(ratios: list[float]) -> str:
  """Ratios, in a cell of a table."""
  return ", ".join(f"{ratio:.2f}" for ratio in ratios)
