"""What a run is asked for: flags with their defaults, and the error of a wrong one."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from research.core import blame
from research.core.spec import parse
from research.core.text import quoted


class UsageError(ValueError):
  """A flag that cannot be: one line with the flag, its value, the legal set, the nearest name."""


class Config(NamedTuple):
  """What a run is asked for: numbers, switches and specs; `experiments/run.py --help` lists them.

  `assemble` resolves it to a Problem of objects, once. Where a Python program hands over objects,
  the fields of their specs are labels.
  """

  task: str = "digits()"
  model: str = ""
  method: str = "data_parallel(sgd(0.1, momentum=0.9), mean())"
  executor: str = "simulate"
  mesh: str = "data:8"
  zero: int = 3
  population: int = 0
  sampling_rate: float = 0.0
  dropout: float = 0.0
  clock: str = ""
  partition: str = "iid()"
  batch_size: int | str = 256
  steps: int = 400
  epochs: float = 0.0
  rounds: int = 0
  virtual_seconds: float = 0.0
  seed: int = 0
  clip_norm: float = 0.0
  tolerance: float = 0.0
  delta: float = 1e-5
  local_phase: str = "auto"
  steps_per_dispatch: int = 100
  log_every: int = 10
  eval_every: int = 50
  checkpoint_every: int = 100
  checkpoint_seconds: float = 1.0
  check_every: int = 100
  out: str = ""
  data_dir: str = ""
  x64: bool = False
  allow_changes: bool = False
  diagnostics: bool = False
  tensorboard: bool = False
  profile: bool = False
  server_mode: str = "async"
  workers: int = 0
  shards: int = 1
  bound: int = 2
  round_seconds: float = 1.0
  overlap: bool = True
  slowdown: str = ""
  restarts: int = 100
  ray_address: str = ""
  node_ip: str = "127.0.0.1"

  def named(self) -> dict[str, Any]:
    """What a result is known by."""
    return {name: getattr(self, name) for name in NAMED}


def called(spec: str) -> str:
  """The name that a spec calls; "" of what is no spec, such as the label of an object."""
  try:
    return parse(spec).name
  except ValueError:
    return ""


NAMED = ("task", "model", "method", "executor", "mesh", "seed")
# Flags of --executor=server alone: elsewhere they say nothing.
OF_SERVER = ("server_mode", "workers", "shards", "bound", "round_seconds", "overlap", "slowdown")


@contextlib.contextmanager
def flag(name: str, value: Any) -> Iterator[None]:
  """Says which flag it is that a refusal is about; other errors pass (see `blame`)."""
  try:
    yield
  except UsageError:
    raise
  except (ValueError, OSError, OverflowError, MemoryError) as error:
    if not blame.is_refusal(error):
      raise
    reason = str(error) or "too large for this machine's memory"
    raise UsageError(f"--{name}={quoted(value)}: {reason}") from error
