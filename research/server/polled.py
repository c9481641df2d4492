"""Runs independent processes, and polls their state from this process."""

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from research.comm import mesh as meshes
from research.core.base import Params
from research.core.part import required
from research.core.task import Data
from research.parallel import sharded
from research.server import events
from research.server import setup as setups
from research.server.actors import Snapshot
from research.server.messages import Spent
from research.server.setup import Setup
from research.server.store import ShardStore
from research.training import sources
from research.training.config import UsageError
from research.training.hooks import heartbeat
from research.training.hooks.evaluate import Evaluate
from research.training.hooks.hook import Event, Idle, Rounds
from research.training.plan import Plan
from research.training.reports import report
from research.training.reports.summary import of_any
from research.training.reports.timing import Timing
from research.training.run import BaseRun


class Update(NamedTuple):
  """An update of the model, or all updates between two polls."""

  step: int  # number of local steps after this update
  loss: float  # mean loss over the local steps of this update
  seconds: float  # time since the start of the run
  moved: float  # bytes sent by all workers so far


class Polled(BaseRun):
  """Implements the part of a server run that all server modes share.

  A dispatch consists of the updates since the previous dispatch. A dispatch ends at the newest
  update that gets a row or, if a hook's `every` or the end of the run is reached, at a snapshot of
  the model. The first update at or after a multiple of `log_every` gets a row.

  Attributes:
    state: the newest Snapshot.
  """

  state: Snapshot

  def __init__(self, setup: Setup, folder: Path, timing: Timing):
    self.folder, self.setup, self.period = folder, setup, setup.job.method.local_steps
    plan = Plan((setup.job,))
    super().__init__(setup.config, plan, setup.updates * self.period, timing)
    self.state = Snapshot(0, setups.initial(setup), None, [])
    checkpoints, names = folder / "checkpoints", list(setup.shapes)
    self.store = ShardStore(checkpoints, names, setup.parts, self.period)
    self.deaths = Counter(workers=0)
    self.refused: Counter[str] = Counter()
    self.events: list[events.Event] | None = None  # None: unknown
    self.moved = 0.0
    self.spent = np.zeros((setup.workers, len(Spent._fields)))  # sums, and number of pushes
    self.started: float | None = None  # seconds, when the first worker joined
    self._updates: list[Update] = []  # updates that no event contains yet
    self._begun: Update | None = None  # the first update that this process saw
    self._last: Update | None = None
    self._told = ""  # why the processes should stop
    self._treedef = jax.tree.structure(jax.eval_shape(setup.job.task.init, jax.random.key(0)))

  def start(self, last: Mapping[str, Any] | None) -> None:
    """Starts the processes from `state`.

    Args:
      last: the newest row of an earlier part of the run, if any.
    """
    if last:
      self.moved = last["bytes"] * self.setup.workers

  @required
  def close(self) -> None:
    """Ends the processes that were started."""
    ...

  def stop(self, reason: str) -> None:
    """Ends the run at the next poll."""
    if self.reason:
      self.reason = reason
    self._told = self._told or reason

  def params(self) -> Params:
    """Returns the newest snapshot's model; the snapshot is current whenever a hook is due."""
    return jax.device_put(self._treedef.unflatten(list(self.state.params.values())))

  def examples(self) -> tuple[Data, Data | None]:
    mesh = meshes.device_mesh({"data": 1}, jax.devices()[:1])

    def put(batch):
      one = jax.tree.map(lambda x: x[None], batch)
      size = np.asarray([sources.count(batch)])
      return sharded.place(mesh, ("data",), one, size, jax.random.key(0))

    test = self.setup.test
    return put(self.setup.job.task.train), put(test) if test else None

  def rows(self, first: int, last: int, metrics: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    del first, last
    return metrics["rows"]

  def _ago(self, then: float) -> float:
    """Converts a time of the machine's clock to seconds of the run."""
    return self.timing.elapsed() - (time.time() - then)

  def _add(self, step: int, loss: float, moved: float, then: float) -> None:
    """Adds an update that was made at time `then`."""
    self.moved += moved
    self._last = Update(step, loss, self._ago(then), self.moved)
    self._begun = self._begun or self._last
    self._updates.append(self._last)
    heartbeat.beat()

  def _event(self, whole: bool) -> Event:
    """Returns an event with the updates up to the newest row, or with all of them."""
    first, every = self.step, self.config.log_every
    steps = [update.step for update in self._updates]
    crossing = [b for a, b in itertools.pairwise([first, *steps]) if b // every > a // every]
    ends = sorted({*crossing, *steps[-1:]}) if whole else crossing
    if not ends:
      return Idle(first)
    count = steps.index(ends[-1]) + 1
    taken, self._updates = self._updates[:count], self._updates[count:]
    counts = np.diff([first, *steps[:count]])
    columns = lambda update: {
      "seconds": round(update.seconds, 4),
      "bytes": round(update.moved / self.setup.workers),
    }
    self.step = ends[-1]
    self.metrics = {
      "loss": np.repeat([update.loss for update in taken], counts),
      "finite": True,
      "rows": {update.step: columns(update) for update in taken if update.step in ends},
    }
    return Rounds(first, self.step, self.metrics)

  @property
  def _newest(self) -> int:
    """Returns the number of steps of all updates added so far."""
    return self._updates[-1].step if self._updates else self.step

  def _died(self, kind: str, text: str) -> None:
    """Counts a process that has died.

    Raises:
      UsageError: if more processes have died than may be restarted.
    """
    report.note(text)
    self.deaths[kind] += 1
    if self.deaths.total() > self.config.restarts:
      raise UsageError(f"--restarts={self.config.restarts}: {text}, once more than that")

  # ---- result

  def _rate(self) -> float:
    """Returns the updates per second, from the first to the last update that this process saw."""
    if self._begun is None or self._last is None or self._last.seconds <= self._begun.seconds:
      return 0.0
    updates = (self._last.step - self._begun.step) / self.period
    return updates / (self._last.seconds - self._begun.seconds)

  def summary(self, evaluate: Evaluate) -> dict[str, Any]:
    """Returns the contents of summary.json; without events, every update counts as one push.

    Args:
      evaluate: the hook that evaluated the run.
    """
    config, version, rate = self.config, self.state.version, self._rate()
    counted = [push for event in self.events or () if event.counted for push in event.pushes]
    pushes = version if self.events is None else len(counted)
    local_steps = version if self.events is None else sum(push.steps for push in counted)
    ages = events.staleness(self.events or ())
    in_time = config.server_mode == "elastic"  # local steps per push vary
    of_update = local_steps / max(version, 1) if in_time else self.period
    each = local_steps / max(pushes, 1)  # local steps per push
    own_steps = max(1.0, self.spent[:, -1].sum() * each)
    sent, received = self.spent[:, -3:-1].sum(0) / own_steps
    model = sum(x.size * x.dtype.itemsize for x in self.setup.shapes.values())
    return {
      **of_any(self, evaluate),
      "workers": self.setup.workers,
      "steps_per_second": round(rate * of_update, 3),
      "aggregated": "whole leaves",
      "wire": {
        "bytes_per_step_per_worker": {"push": sent, "pull": received},
        "total_bytes_per_worker": self.moved / self.setup.workers,
        "dense_bytes_per_step_per_worker": 2 * model / max(each, 1.0),
      },
      "server": {
        "mode": config.server_mode,
        "shards": config.shards,
        "updates": version,
        "pushes": pushes,
        "local_steps": local_steps,
        "started_seconds": round(self.started or 0.0, 3),
        "pushes_per_second": round(rate * pushes / version if version else 0.0, 3),
        "staleness": {str(age): count for age, count in ages.items()},
        "refused": dict(self.refused),
        "deaths": dict(self.deaths),
        "workers": [_of_worker(row) for row in self.spent],
      },
      "params_sha256": digest(self.state.params),
    }


def _of_worker(row: np.ndarray) -> dict[str, float]:
  """Averages a worker's seconds per push and idle fraction, over pushes that this process saw."""
  computing, encoding, waiting, lasted, _, _, pushes = row.tolist()
  each = max(pushes, 1)
  return {
    "pushes": int(pushes),
    "computing_seconds": round(computing / each, 6),
    "encoding_seconds": round(encoding / each, 6),
    "waiting_seconds": round(waiting / each, 6),
    "seconds_per_push": round(lasted / each, 6),
    "idle": round(waiting / max(lasted, 1e-9), 4),
  }


def digest(params: Mapping[str, np.ndarray]) -> str:
  """Computes the SHA-256 digest of the parameters, as `summary.params_sha256` does."""
  found = hashlib.sha256()
  for name, leaf in params.items():
    found.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()
