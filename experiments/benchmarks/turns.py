"""Times functions in turn, so that other load on the machine affects all functions alike."""

import statistics
import time
from collections.abc import Callable, Sequence


def in_turn(measures: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
  """Calls all `measures` in turn after a warm-up turn, and reverses every other turn.

  Returns:
    The results, indexed by measure and then by turn.
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
  """Measures the wall-clock seconds of one call."""
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
  """Returns the ratio of two measurements for each turn."""
  return [a / b for a, b in zip(above, below, strict=True)]


def milliseconds(found: Sequence[float]) -> float:
  """Converts times in seconds to their median in milliseconds."""
  return 1000 * statistics.median(found)


def shown(ratios: list[float]) -> str:
  """Formats ratios as the text of a table cell."""
  return ", ".join(f"{ratio:.2f}" for ratio in ratios)
