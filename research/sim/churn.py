"""Defines when workers are present: always, for random times, or as recorded in a file."""

import csv
import io

import numpy as np

from research.core import checks, paths
from research.core.part import Part, required


class Timeline:
  """The presence of W workers as time advances.

  Attributes:
    on: whether each worker is present at the current time, bool [W].
    until: when each worker's presence or absence ends, float64 [W], in seconds.
  """

  on: np.ndarray
  until: np.ndarray

  def advance(self, seconds: float) -> None:
    """Moves to a time, which is not before the current time."""
    while (ended := np.flatnonzero(self.until <= seconds)).size:
      self.switch(ended)

  def switch(self, workers: np.ndarray) -> None:
    """Lets absent workers join and present workers leave, when their time `until` has come.

    Args:
      workers: worker numbers in increasing order.
    """
    self.on[workers] = ~self.on[workers]
    self.until[workers] = self.ends(workers)

  @required
  def ends(self, workers: np.ndarray) -> np.ndarray:
    """Returns when the presences or absences end that begin at the time `until` of some workers."""
    ...


class Churn(Part):
  """Defines when workers join and leave."""

  constant = False  # whether every worker is always present

  @required
  def timeline(self, workers: int, random: np.random.Generator) -> Timeline:
    """Returns the presence of the workers, at time 0.

    Args:
      workers: W, the number of workers.
      random: the generator of all random times.

    Raises:
      ValueError: if the times are not those of W workers.
    """
    ...

  def contents(self) -> bytes:
    """Returns the contents of the file that defines the times, if there is one."""
    return b""


class Always(Churn, name="always"):
  """Every worker is present at all times."""

  constant = True

  def timeline(self, workers, random):
    del random
    return _Recorded(np.full((workers, 1), -np.inf))


always = Always


class OnOff(Churn, name="on_off"):
  """Workers that are present and absent in turn, for exponentially distributed times.

  A worker is present at time 0 with the probability up / (up + down) that it is present at any
  time. Workers are independent of each other.

  Args:
    up: mean time of a presence in seconds, above 0.
    down: mean time of an absence in seconds, above 0.

  Raises:
    ValueError: if a time is out of range.
  """

  up: float
  down: float

  def check(self):
    checks.in_range("up", self.up, "(0, inf)")
    checks.in_range("down", self.down, "(0, inf)")

  def timeline(self, workers, random):
    return _Exponential(self.up, self.down, workers, random)


on_off = OnOff


class RecordedTimes(Churn, name="recorded"):
  """Workers that are present as recorded in a file.

  The file is CSV text with the columns worker, start and end: worker numbers from 0, and the
  seconds at which a presence starts and ends. A worker may have any number of rows.

  Args:
    path: the file, which is read when a run starts.

  Raises:
    ValueError: when a run starts, if the file cannot be read, a row is invalid, or the workers in
      the file are not those of the run.
  """

  path: str

  def contents(self):
    try:
      return paths.local(self.path).read_bytes()
    except OSError as error:
      raise ValueError(f"path='{self.path}': cannot be read: {error.strerror}") from error

  def _rows(self) -> np.ndarray:
    """Reads the rows; returns float64 [n, 3]."""
    try:
      text = self.contents().decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"path='{self.path}': is not CSV text") from error
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    found = [_row(self.path, number, row) for number, row in enumerate(rows, 2)]
    if not found:
      raise ValueError(f"path='{self.path}': has no rows below the header worker,start,end")
    return np.array(found)

  def timeline(self, workers, random):
    del random
    rows = self._rows()
    named = {int(number) for number in rows[:, 0]}
    if named != set(range(workers)):
      most = max(named)
      raise ValueError(
        f"path='{self.path}': has the times of {len(named)} workers, up to number {most}, and "
        f"there are {workers}"
      )
    spans = [rows[rows[:, 0] == number, 1:] for number in range(workers)]
    return _Recorded(_padded([_joined(own) for own in spans]))


recorded = RecordedTimes


def _row(path: str, number: int, row: dict[str, str]) -> tuple[int, float, float]:
  try:
    worker, start, end = int(row["worker"]), float(row["start"]), float(row["end"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"path='{path}': line {number} is not a worker's number and two times in seconds, below the "
      "header worker,start,end"
    ) from error
  if worker < 0 or not 0 <= start < end < np.inf:
    raise ValueError(f"path='{path}': line {number} is not worker >= 0 and 0 <= start < end")
  return worker, start, end


def _joined(spans: np.ndarray) -> list[float]:
  """Returns the times at which a worker joins and leaves in turn, with overlapping spans merged."""
  times: list[float] = []
  for start, end in spans[np.argsort(spans[:, 0])].tolist():
    if times and start <= times[-1]:
      times[-1] = max(times[-1], end)
    else:
      times += [start, end]
  return times


def _padded(rows: list[list[float]]) -> np.ndarray:
  longest = max(len(row) for row in rows)
  return np.array([row + [np.inf] * (longest - len(row)) for row in rows])


class _Recorded(Timeline):
  """Presence from the times [W, M] at which each worker joins and leaves in turn."""

  def __init__(self, times: np.ndarray):
    self._times = np.concatenate([times, np.full((len(times), 1), np.inf)], 1)
    self._passed = np.zeros(len(times), int)
    self.on, self.until = np.zeros(len(times), bool), self._times[:, 0].copy()
    self.advance(0.0)

  def ends(self, workers: np.ndarray) -> np.ndarray:
    self._passed[workers] += 1
    return self._times[workers, self._passed[workers]]


class _Exponential(Timeline):
  """Presence and absence in turn, for exponential times."""

  def __init__(self, up: float, down: float, workers: int, random: np.random.Generator):
    self._means, self._random = np.array([down, up]), random
    self.on = random.random(workers) < up / (up + down)
    self.until = self._lasts(self.on)

  def _lasts(self, on: np.ndarray) -> np.ndarray:
    return self._means[on.astype(int)] * self._random.standard_exponential(len(on))

  def ends(self, workers: np.ndarray) -> np.ndarray:
    return self.until[workers] + self._lasts(self.on[workers])
