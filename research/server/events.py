"""The event log of a server run: pushes in order, and the updates made from them.

A piece of work is identified by (worker, number): it is the worker's n-th piece, whichever of its
processes computed it. It consists of the worker's local steps first, ..., first + steps - 1, whose
batches are a function of (seed, worker, step). It starts from a pulled model, in which each shard
has a version: the number of updates applied to it. An update is made of one push or, in rounds, of
one push per worker; all shards apply the same pushes. These events suffice to recompute the
parameters.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.training.reports import report

FILE = "trace.jsonl"


class Push(NamedTuple):
  """A pushed piece of work, as a server counts it."""

  worker: int
  incarnation: int  # of the process that computed it; a new one starts without the old one's state
  number: int  # the worker's n-th piece of work, from 0
  first: int  # local steps counted for the worker before it
  steps: int  # local steps in it
  versions: tuple[int, ...]  # of the shards of the model that it started from

  @property
  def name(self) -> tuple[int, int]:
    return self.worker, self.number


class Event(NamedTuple):
  """An update of all shards, or a push that missed its round and was not counted."""

  update: int  # number of updates before it
  pushes: tuple[Push, ...]  # in the order of the workers
  counted: bool = True

  def row(self) -> dict[str, Any]:
    """The event as a line of the trace."""
    pushes = [[*push[:5], list(push.versions)] for push in self.pushes]
    return {"update": self.update, "pushes": pushes} | ({} if self.counted else {"counted": False})


def read(path: Path) -> tuple[dict[str, Any], list[Event]]:
  """Reads the header of a trace and its events; skips a last line cut short by a crash.

  Raises:
    ValueError: if it is not a trace, or a piece of work is counted twice or out of order.
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
  """Rejects a trace in which a push is counted twice, skipped, or starts from a future model.

  If the trace starts at a later update `start`, each worker's first push is accepted as it is.

  Args:
    events: in order.
    shards: number of shards.
    start: updates before the first event.

  Raises:
    ValueError: with the first invalid event.
  """
  done: dict[int, tuple[int, int]] = {}  # worker -> number and first step of its next piece
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
  """Counts pushes by staleness in updates, measured on the oldest shard that each started from."""
  ages = Counter(
    event.update - min(push.versions) for event in events if event.counted for push in event.pushes
  )
  return dict(sorted(ages.items()))


def until(events: Sequence[Event], update: int) -> Iterator[Event]:
  """The events before update `update`."""
  return (event for event in events if event.update < update)


class Trace:
  """Appends events to the trace file of a run."""

  def __init__(self, folder: Path, shards: Sequence[Sequence[int]], update: int):
    """Keeps the events before `update`, and continues from there.

    The attribute `kept` holds these events. It is empty if the file is unreadable or its shards
    differ; then the trace starts at `update` and cannot be replayed.
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
