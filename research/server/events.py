"""The event log of a server run: the pushes in order, and the updates made from these pushes.

A piece of work is identified by (worker, number): number n means the worker's n-th piece, whichever
of the worker's processes computed it. A piece consists of the worker's local steps first, ...,
first + steps - 1, whose batches are a function of (seed, worker, step). A piece starts from a
pulled model, in which each shard has a version: the number of updates applied to the shard. An
update consists of one push or, in rounds, of one push per worker; all shards apply the same pushes.
These events suffice to recompute the parameters.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.training.reports import report

FILE = "trace.jsonl"


class Push(NamedTuple):
  """A piece of work that a worker has pushed."""

  worker: int
  incarnation: int  # number of the worker's process; a new process starts without private state
  number: int  # the worker's n-th piece of work, from 0
  first: int  # local steps counted for the worker before this piece
  steps: int  # local steps in this piece
  versions: tuple[int, ...]  # versions of the shards in the pulled model

  @property
  def name(self) -> tuple[int, int]:
    return self.worker, self.number


class Event(NamedTuple):
  """An update of all shards, or a push that missed its round and was not counted."""

  update: int  # number of updates before this event
  pushes: tuple[Push, ...]  # pushes in the order of the workers
  counted: bool = True

  def row(self) -> dict[str, Any]:
    """Returns the event as a line of the trace."""
    pushes = [[*push[:5], list(push.versions)] for push in self.pushes]
    return {"update": self.update, "pushes": pushes} | ({} if self.counted else {"counted": False})


def read(path: Path) -> tuple[dict[str, Any], list[Event]]:
  """Reads the header and the events of a trace; skips an incomplete last line, left by a crash.

  Raises:
    ValueError: if the file is not a trace, or a piece of work is counted twice or out of order.
  """
  if not path.is_file():
    raise ValueError(f"there is no {path}: not the folder of a run with --executor=server")
  lines = path.read_text().splitlines()
  try:
    head = json.loads(lines[0])
    shards = head["shards"]
  except (IndexError, ValueError, TypeError, KeyError):
    raise ValueError(f"{path} is not the trace of a server") from None
  start = head.get("from", 0)
  events = []
  for line in lines[1:]:
    try:
      row = json.loads(line)
    except ValueError:
      break
    pushes = tuple(Push._make((*push[:5], tuple(push[5]))) for push in row["pushes"])
    events.append(Event(row["update"], pushes, row.get("counted", True)))
  check(events, len(shards), start)
  return head, events


def check(events: Iterable[Event], shards: int, start: int = 0) -> None:
  """Rejects a trace if a push is counted twice, is skipped, or starts from a future model.

  If the trace starts at a later update `start`, each worker's first push is accepted without a
  check.

  Args:
    events: the events, in order.
    shards: number of shards.
    start: number of updates before the first event.

  Raises:
    ValueError: if an event is invalid; the message describes the first invalid event.
  """
  done: dict[int, tuple[int, int]] = {}  # worker -> number and first step of the next piece
  updates = start
  for place, event in enumerate(events):
    wrong = event.update != updates
    for push in event.pushes:
      begun = (push.number, push.first) if start else (0, 0)
      number, first = done.get(push.worker, begun)
      wrong |= len(push.versions) != shards or max(push.versions) > updates
      if event.counted:
        wrong |= (push.number, push.first) != (number, first)
        done[push.worker] = (number + 1, first + push.steps)
    updates += event.counted
    if wrong:
      raise ValueError(f"event {place} of the trace is invalid: {event}")


def staleness(events: Iterable[Event]) -> dict[int, int]:
  """Counts pushes by staleness, in updates, measured on the oldest shard of the pulled model."""
  ages = Counter(
    event.update - min(push.versions) for event in events if event.counted for push in event.pushes
  )
  return dict(sorted(ages.items()))


def until(events: Sequence[Event], update: int) -> Iterator[Event]:
  """Yields the events before update `update`."""
  return (event for event in events if event.update < update)


class Trace:
  """Appends events to the trace file of a run."""

  def __init__(self, folder: Path, shards: Sequence[Sequence[int]], update: int):
    """Keeps the events before `update`, and continues the trace from there.

    The attribute `kept` holds these events. If the file is unreadable or its shards differ, `kept`
    is empty, and the trace starts at `update` and cannot be replayed.
    """
    path, head = folder / FILE, {"shards": [list(shard) for shard in shards], "from": update}
    self.kept: list[Event] = []
    if update and path.is_file():
      try:
        before, found = read(path)
      except ValueError as error:
        report.note(f"the trace starts again: {error}")
      else:
        if before["shards"] == head["shards"] and before.get("from", 0) <= update:
          head, self.kept = before, list(until(found, update))
    new = path.with_suffix(".new")
    with new.open("w") as file:
      rows = [head, *(event.row() for event in self.kept)]
      file.writelines(report.as_json(row) + "\n" for row in rows)
    new.replace(path)
    self._file = path.open("a")

  def write(self, events: Iterable[Event]) -> None:
    self._file.writelines(report.as_json(event.row()) + "\n" for event in events)
    self._file.flush()

  def close(self) -> None:
    self._file.close()
