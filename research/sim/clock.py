"""Simulates a clock: computes when synchronous or asynchronous workers finish."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.core import checks


class Speeds(NamedTuple):
  """The distribution of each worker's local step times.

  Each worker draws its step times in sequence from its own generator. The n-th step time does not
  depend on how many are drawn at once.
  """

  draw: Callable[[np.random.Generator, int, int], np.ndarray]  # (random, worker, steps) -> seconds
  workers: int = 0  # number of workers for which the speeds are given; 0 means any number
  named: int = 0  # the largest index of a worker with a slowdown, plus one


class Trace(NamedTuple):
  """The order in which a server receives E messages, each from a single worker."""

  owners: np.ndarray  # [E] int32, the sender
  staleness: np.ndarray  # [E] int32, number of updates since the sender pulled its model
  seconds: np.ndarray  # [E] float64, times of arrival, increasing


def steady(
  seconds: float | Sequence[float], *, slowdown: Mapping[int, float] | None = None
) -> Speeds:
  """Returns constant step times.

  Args:
    seconds: the time per step, greater than 0: one number for all workers, or a list with one
      number for each of the W workers.
    slowdown: the factors by which step times are multiplied, greater than 0, by worker index; for
      example, {0: 4} makes worker 0 four times slower. Other workers have factor 1.

  Raises:
    ValueError: if a number is out of range.
  """
  of_workers = _above_zero("seconds", seconds)
  one_for_all = of_workers.ndim == 0
  draw = lambda random, worker, steps: np.full(
    steps, of_workers if one_for_all else of_workers[worker]
  )
  return _slowed(draw, slowdown, 0 if one_for_all else len(of_workers))


def exponential(
  mean: float, *, shift: float = 0.0, slowdown: Mapping[int, float] | None = None
) -> Speeds:
  """Returns step times of shift + X seconds, where X is exponential.

  Most steps are fast, but stragglers are common.

  Args:
    mean: the mean of X in seconds, greater than 0.
    shift: the minimum time of a step in seconds, at least 0.
    slowdown: the factors by which the full step times are multiplied; see `steady`.

  Raises:
    ValueError: if a number is out of range.

  Reference: Lee, Lam, Pedarsani, Papailiopoulos, Ramchandran 2018, arXiv 1512.02673 (shifted
    exponential run times).
  """
  _above_zero("mean", mean)
  checks.in_range("shift", shift, "[0, inf)")
  draw = lambda random, worker, steps: shift + mean * random.standard_exponential(steps)
  return _slowed(draw, slowdown)


def lognormal(mean: float, sigma: float, *, slowdown: Mapping[int, float] | None = None) -> Speeds:
  """Returns heavy-tailed step times of mean exp(sigma Z - sigma^2 / 2) seconds; Z is normal.

  Args:
    mean: the mean time of a step in seconds, greater than 0.
    sigma: the standard deviation of the logarithm, at least 0.
    slowdown: the factors by which step times are multiplied; see `steady`.

  Raises:
    ValueError: if a number is out of range.
  """
  _above_zero("mean", mean)
  checks.in_range("sigma", sigma, "[0, inf)")
  draw = lambda random, worker, steps: (
    mean * np.exp(sigma * random.standard_normal(steps) - sigma**2 / 2)
  )
  return _slowed(draw, slowdown)


def measured(
  seconds: Sequence[Sequence[float]], *, slowdown: Mapping[int, float] | None = None
) -> Speeds:
  """Returns step times that are drawn with replacement from measurements.

  Args:
    seconds: the measured step times in seconds, greater than 0: one list for each of the W workers,
      or one list for all workers.
    slowdown: the factors by which step times are multiplied; see `steady`.

  Raises:
    ValueError: if a list is empty or a time is out of range.
  """
  if not len(seconds) or any(np.ndim(of_worker) != 1 for of_worker in seconds):
    raise ValueError("seconds is not a list of step times for each worker, such as [[0.1, 0.2]]")
  of_workers = [_above_zero("seconds", of_worker) for of_worker in seconds]
  one_for_all = len(of_workers) == 1
  draw = lambda random, worker, steps: random.choice(
    of_workers[0 if one_for_all else worker], steps
  )
  return _slowed(draw, slowdown, 0 if one_for_all else len(of_workers))


def synchronous(
  speeds: Speeds,
  workers: int,
  steps: Sequence[int] | np.ndarray,
  seed: int,
  communication: float = 0.0,
) -> np.ndarray:
  """Computes the end times of synchronous rounds, in which all workers wait for the slowest one.

      t_k = t_{k-1} + max_i (seconds of steps_k steps of worker i) + communication

  Args:
    speeds: the distribution of the workers' step times; with the same seed, `asynchronous` draws
      equal times.
    workers: W, the number of workers.
    steps: the number of local steps per worker in each of the K rounds.
    seed: the seed of all random draws.
    communication: the time of an exchange, in seconds.

  Returns:
    The end times, float64 [K], in seconds since the start.

  Raises:
    ValueError: if a number is out of range, or `speeds` is for a different number of workers.
  """
  return Lockstep(speeds, workers, seed, communication).ends(steps)


class Pieces:
  """Draws how long each worker computes in a round; the draws are those of `synchronous`."""

  def __init__(self, speeds: Speeds, workers: int, seed: int):
    """Args and Raises: see `synchronous`."""
    _check(speeds, workers)
    self._speeds, self._generators = speeds, _generators(workers, seed)

  def of_worker(self, worker: int, steps: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the seconds of one worker in its next K rounds, float64 [K]; see `Lockstep`."""
    starts = np.cumsum([0, *steps])
    drawn = self._speeds.draw(self._generators[worker], worker, starts[-1])
    return np.add.reduceat(drawn, starts[:-1])


class Lockstep:
  """Computes the end times of `synchronous` incrementally, some rounds per call."""

  def __init__(self, speeds: Speeds, workers: int, seed: int, communication: float = 0.0):
    """Args and Raises: see `synchronous`."""
    checks.in_range("communication", communication, "[0, inf)")
    self._pieces, self._workers = Pieces(speeds, workers, seed), workers
    self._communication, self._now = communication, 0.0

  def ends(self, steps: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the end times of the next K rounds.

    Args:
      steps: the number of local steps per worker in each of the K rounds.

    Returns:
      The end times, float64 [K], in seconds since the start.

    Raises:
      ValueError: if there are no rounds, or a round has no steps.
    """
    checks.at_least("rounds", len(steps))
    checks.at_least("steps", np.min(steps, initial=1))
    slowest = np.zeros(len(steps))
    for worker in range(self._workers):
      np.maximum(slowest, self._pieces.of_worker(worker, steps), out=slowest)
    ends = np.cumsum([self._now, *(slowest + self._communication)])[1:]
    self._now = float(ends[-1])
    return ends


def asynchronous(
  speeds: Speeds, workers: int, events: int, seed: int, period: int = 1, communication: float = 0.0
) -> Trace:
  """Simulates a server that receives each message on arrival and replies with the current model.

  If messages arrive at the same time, the server receives them in the order of worker indices. All
  workers pull the initial model at time 0.

  Args:
    speeds: the distribution of the workers' step times; with the same seed, `synchronous` draws
      equal times.
    workers: W, the number of workers.
    events: E, the number of messages that the server receives.
    seed: the seed of all random draws.
    period: the number of local steps per message.
    communication: the round-trip time in seconds, from a worker's last step before a message to its
      first step after the reply. The server itself takes no time, and workers do not wait for each
      other.

  Returns:
    The trace of the E messages.

  Raises:
    ValueError: if a number is out of range, or `speeds` is for a different number of workers.
  """
  _check(speeds, workers, communication, events=events, period=period)
  generators = _generators(workers, seed)

  def more(worker, rounds, since):
    drawn = speeds.draw(generators[worker], worker, rounds * period)
    lasts = drawn.reshape(rounds, period).sum(1) + communication
    return np.cumsum(np.concatenate([[since], lasts]))[1:]

  done = [more(i, -(-events // workers), 0.0) for i in range(workers)]
  while True:
    seconds = np.concatenate(done)
    end = np.partition(seconds, events - 1)[events - 1]
    behind = [i for i in range(workers) if done[i][-1] < end]
    if not behind:
      break
    for i in behind:
      done[i] = np.concatenate([done[i], more(i, len(done[i]), done[i][-1])])
  owners = np.repeat(np.arange(workers, dtype=np.int32), [len(times) for times in done])
  first = np.lexsort((owners, seconds))[:events]
  return Trace(owners[first], staleness_of(owners[first]), seconds[first])


def staleness_of(owners: np.ndarray) -> np.ndarray:
  """Counts the events since the owner's previous event, or since the start.

  Args:
    owners: the owner of each event, int32 [E].

  Returns:
    The staleness of each event, int32 [E].
  """
  by_owner = np.argsort(owners, kind="stable")
  before = np.full(len(owners), -1)
  again = owners[by_owner[1:]] == owners[by_owner[:-1]]
  before[by_owner[1:][again]] = by_owner[:-1][again]
  return (np.arange(len(owners)) - before - 1).astype(np.int32)


def _generators(workers: int, seed: int) -> list[np.random.Generator]:
  """Returns one independent generator per worker."""
  return [np.random.default_rng(own) for own in np.random.SeedSequence(seed).spawn(workers)]


def _slowed(
  draw: Callable[[np.random.Generator, int, int], np.ndarray],
  slowdown: Mapping[int, float] | None,
  workers: int = 0,
) -> Speeds:
  if not isinstance(slowdown, Mapping | None) or not all(
    isinstance(worker, int) and worker >= 0 for worker in slowdown or ()
  ):
    raise ValueError(f"slowdown={slowdown} is not a factor by worker number, such as {{0: 4}}")
  factors = dict(slowdown or {})
  if factors:
    _above_zero("slowdown", list(factors.values()))
  slow = lambda random, worker, steps: factors.get(worker, 1.0) * draw(random, worker, steps)
  return Speeds(slow, workers, max(factors, default=-1) + 1)


def _above_zero(name: str, values: float | Sequence[float]) -> np.ndarray:
  """Checks that all values are positive and finite, and returns them as float64."""
  array = np.asarray(values, np.float64)
  wrong = array[~((array > 0) & (array < math.inf))]
  if wrong.size or not array.size:
    shown = f"{name}={wrong[0]:g}" if wrong.size else f"{name}=[]"
    raise ValueError(f"{shown} is not in (0, inf)")
  return array


def _check(speeds: Speeds, workers: int, communication: float = 0.0, **counts: int) -> None:
  for name, count in {"workers": workers, **counts}.items():
    checks.at_least(name, count)
  checks.in_range("communication", communication, "[0, inf)")
  if speeds.workers not in (0, workers):
    raise ValueError(f"speeds are those of {speeds.workers} workers, and there are {workers}")
  if speeds.named > workers:
    raise ValueError(f"slowdown names worker {speeds.named - 1}, and there are {workers} workers")
