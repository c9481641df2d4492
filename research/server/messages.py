"""What a head goes by, and what workers and it tell each other."""

from typing import NamedTuple

from research.server.part import Pulled

MODES = ("sync", "ssp", "async", "elastic")


class Rules(NamedTuple):
  """What a head goes by."""

  mode: str
  workers: int
  updates: int  # after so many it is over
  weights: tuple[float, ...]  # of the workers in a round, their numbers of examples
  bound: int = 2  # of ssp
  lag: int = 1  # 2 where a worker computes while its last push is on the way
  seconds: float = 1.0  # of a round, elastic
  code: str = ""  # what workers must have: model, payloads, source


class Spent(NamedTuple):
  """What a worker tells with a push, of the time since its last."""

  loss: float  # mean of the piece of work
  computing: float  # seconds of its local steps
  encoding: float
  waiting: float  # for replies
  lasted: float  # seconds since the last push
  sent: int  # bytes
  received: int


class Reply(NamedTuple):
  """What a push is answered with."""

  kind: str  # "counted", "late", "refused", "rejoin", "stop"
  text: str = ""
  pulled: Pulled | None = None  # of the head's own shard


class Joined(NamedTuple):
  """What a worker is told when it joins."""

  incarnation: int
  number: int  # of its first piece of work
  first: int  # local steps counted before it
  round_ends: float  # seconds from now, of elastic
  pulled: Pulled | None
  refused: str = ""
