"""Defines the messages between the head and the workers, and the head's settings."""

from typing import NamedTuple

from research.server.part import Pulled

MODES = ("sync", "ssp", "async", "elastic")


class Rules(NamedTuple):
  """Settings of a head."""

  mode: str
  workers: int
  updates: int  # number of updates after which the run is over
  weights: tuple[float, ...]  # number of examples of each worker in a round
  bound: int = 2  # staleness bound of ssp
  lag: int = 1  # 2 if a worker computes while its last push is in flight
  seconds: float = 1.0  # duration of a round in elastic mode
  code: str = ""  # digest of model, payloads and source, which must be equal on all workers


class Spent(NamedTuple):
  """A worker's statistics since its last push."""

  loss: float  # mean loss over the piece of work
  computing: float  # seconds spent on the local steps
  encoding: float
  waiting: float  # seconds of waiting for replies
  lasted: float  # seconds since the last push
  sent: int  # bytes sent
  received: int


class Reply(NamedTuple):
  """The reply to a push."""

  kind: str  # "counted", "late", "refused", "rejoin", "stop"
  text: str = ""
  pulled: Pulled | None = None  # the head's own shard


class Joined(NamedTuple):
  """The reply to a worker that joins."""

  incarnation: int
  number: int  # number of the first piece of work
  first: int  # local steps counted before this piece
  round_ends: float  # seconds from now, in elastic mode
  pulled: Pulled | None
  refused: str = ""
