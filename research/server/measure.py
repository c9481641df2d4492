"""Metrics of a server run: losses, evaluations, staleness, bytes and idle time."""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.comm import mesh as meshes
from research.parallel import sharded
from research.server import events
from research.server.messages import Spent
from research.server.setup import Setup
from research.training import metrics, sources
from research.training.hooks import finite
from research.training.hooks.finite import NonFinite
from research.training.reports import report
from research.training.reports.timing import Timing


class Measured:
  """A run's metrics, in the rows and the summary that `loop` writes too."""

  def __init__(self, setup: Setup, folder: Path, version: int, timing: Timing):
    self.setup, self.config, self.timing = setup, setup.config, timing
    self.period = setup.job.method.local_steps
    self.folder, self.evaluated_on = folder, "test" if setup.test else "train"
    updates = setup.updates * self.period
    self.progress = report.Progress(updates, self.evaluated_on, True)
    self.progress.start(version * self.period)
    self.log = report.Metrics(folder, version * self.period, self.config.tensorboard)
    timing.resume(self.log.last["seconds"] if self.log.last else 0.0)
    self.losses: list[float] = []  # since the last row
    self.next_row = self._after(version)
    self.row: dict[str, Any] | None = None  # kept back, as an evaluation may be added
    self.refused: Counter[str] = Counter()
    self.spent = np.zeros((setup.workers, len(Spent._fields)))  # sums, and number of pushes
    # bytes of all workers so far
    self.moved = self.log.last["bytes"] * setup.workers if self.log.last else 0
    self.started: float | None = None  # seconds, when the first worker joined
    self.begun: tuple[float, int] | None = None  # seconds and updates at the first update
    self.last = (timing.elapsed(), version)
    self.evaluated_at, self.found = version, {}
    self._place()

  def _place(self) -> None:
    mesh = meshes.device_mesh({"data": 1}, jax.devices()[:1])
    task, key = self.setup.job.task, jax.random.key(0)

    def put(batch):
      one = jax.tree.map(lambda x: x[None], batch)
      size = np.asarray([sources.count(batch)])
      return sharded.place(mesh, ("data",), one, size, key)

    self.train, self.test = put(task.train), put(self.setup.test) if self.setup.test else None
    self.evaluator = metrics.evaluator(task, mesh)
    self.measure = jax.jit(task.measure or (lambda params: {}))
    shapes = jax.eval_shape(task.init, key)
    self.treedef = jax.tree.structure(shapes)

  def close(self) -> None:
    self._write()
    self.progress.close()
    self.log.close()

  def _after(self, version: int) -> int:
    every = self.config.log_every
    return (version * self.period // every + 1) * every

  # ---- rows

  def take_in(self, found: Mapping[str, Any]) -> None:
    """Processes a head's report."""
    ago = lambda then: self.timing.elapsed() - (time.time() - then)
    self.refused.update(found["refused"])
    if self.started is None and found.get("since"):
      self.started = ago(found["since"])
    for worker, spent in found["spent"]:
      self.spent[worker] += (*spent[1:], 1)
    for version, loss, moved, then in found["losses"]:
      if not np.isfinite(loss):
        raise NonFinite(f"the loss is not finite at step {version * self.period}")
      self.losses.append(loss)
      self.moved += moved
      self.last = (ago(then), version)
      self.begun = self.begun or self.last
      if version * self.period >= self.next_row or version == self.setup.updates:
        self._row(version)

  def _row(self, version: int) -> None:
    self._write()
    self.row = {
      "step": version * self.period,
      "loss": float(np.mean(self.losses)),
      "seconds": round(self.last[0], 4),
      "bytes": round(self.moved / self.setup.workers),
    }
    self.losses, self.next_row = [], self._after(version)

  def _write(self) -> None:
    if self.row:
      self.log.write([self.row])
      self.progress.update(self.row)
      self.row = None

  def rewind(self, version: int) -> None:
    """Returns to a checkpoint: discards later rows."""
    self.log.close()
    self.row, self.losses, self.next_row = None, [], self._after(version)
    self.log = report.Metrics(self.folder, version * self.period, self.config.tensorboard)
    self.evaluated_at, self.found = min(self.evaluated_at, version), {}

  def evaluate(self, version: int, params: Mapping[str, np.ndarray], kept: str) -> None:
    """Evaluates a model and adds the metrics to the row of its step, or to a new row.

    Raises:
      NonFinite: if a loss or a metric is not finite.
    """
    tree = jax.device_put(self.treedef.unflatten(list(params.values())))
    gradient = self.setup.job.task.grads is not None
    train = jax.device_get(self.evaluator(tree, self.train, gradient=gradient))
    train.pop("gradient_norm", None)
    test = jax.device_get(self.evaluator(tree, self.test)) if self.test else train
    test = {**test, **jax.device_get(self.measure(tree))}
    found = {"train_loss": float(train["loss"]), "eval": {k: float(v) for k, v in test.items()}}
    step = version * self.period
    if bad := finite.wrong(found, self.evaluated_on):
      raise NonFinite(f"the {', '.join(bad)} is not finite at step {step}; {kept}")
    self.evaluated_at, self.found = version, found
    if self.row is None or self.row["step"] != step:
      self.losses = self.losses or [found["train_loss"]]
      self._row(version)
    assert self.row is not None
    self.row |= found
    self._write()

  # ---- result

  def summary(
    self,
    reason: str,
    version: int,
    happened: Sequence[events.Event] | None,
    deaths: Mapping[str, int],
  ) -> dict[str, Any]:
    """The summary of a run; without events every update counts as one push."""
    config, steps = self.config, version * self.period
    seconds, updates = (b - a for a, b in zip(self.begun or self.last, self.last, strict=True))
    counted = [push for event in happened or () if event.counted for push in event.pushes]
    pushes = version if happened is None else len(counted)
    local_steps = version if happened is None else sum(push.steps for push in counted)
    ages = events.staleness(happened or ())
    in_time = config.server_mode == "elastic"  # local steps per push vary
    of_update = local_steps / max(version, 1) if in_time else self.period
    rate = updates / seconds if seconds > 0 else 0.0
    per_update = pushes / version if version else 0.0
    each = local_steps / max(pushes, 1)  # local steps per push
    own_steps = max(1.0, self.spent[:, -1].sum() * each)
    sent, received = self.spent[:, -3:-1].sum(0) / own_steps
    model = sum(x.size * x.dtype.itemsize for x in self.setup.shapes.values())
    return {
      **config.named(),
      "workers": self.setup.workers,
      "steps": steps,
      "stopped_because": reason,
      "seconds": round(self.timing.elapsed(), 3),
      "compile_seconds": round(self.timing.compiling, 3),
      "steps_per_second": round(rate * of_update, 3),
      "aggregated": "whole leaves",
      "train_loss": self.found.get("train_loss"),
      "eval": self.found.get("eval", {}),
      "evaluated_on": self.evaluated_on,
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
        "pushes_per_second": round(rate * per_update, 3),
        "staleness": {str(age): count for age, count in ages.items()},
        "refused": dict(self.refused),
        "deaths": dict(deaths),
        "workers": [_of_worker(row) for row in self.spent],
      },
    }


def _of_worker(row: np.ndarray) -> dict[str, float]:
  """Averages over a worker's pushes that this process has seen: seconds per push, idle share."""
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
  """SHA-256 of the parameters, as `loop.params_sha256` computes it."""
  found = hashlib.sha256()
  for name, leaf in params.items():
    found.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()
