"""Hogwild: the processes of one machine update one model in shared memory without locks.

Which values a worker reads depends on timing, so a run has no trace and cannot be replayed. The
method `hogwild` simulates the algorithm's analysis.

Reference: Recht, Re, Wright, Niu 2011, arXiv 1106.5730, algorithm 1.
"""

import contextlib
import multiprocessing
import time
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np

from research.server import setup as setups
from research.server import shared, store
from research.server.actors import Snapshot, inherited
from research.server.measure import Measured, digest
from research.server.setup import Setup
from research.training.config import UsageError
from research.training.hooks import heartbeat, signals
from research.training.reports import report
from research.training.reports.timing import Timing

_POLL = 0.05


class HogwildRun:
  """One run; like `driver.ServedRun`, but without servers."""

  def __init__(self, setup: Setup, folder: Path, timing: Timing):
    self.setup, self.config, self.timing = setup, setup.config, timing
    self.names = list(setup.shapes)
    self.checkpoints = folder / "checkpoints"
    found = store.restore(self.checkpoints, self.names, setup.parts, report.note)
    if found:
      report.note(f"resuming at step {found.version}")
    empty = [[0, 0, 0] for _ in range(setup.workers)]
    self.saved = found or Snapshot(0, setups.initial(setup), {}, empty)
    before = len(self.saved.counted)
    if before != setup.workers:
      raise UsageError(f"--workers={setup.workers}: hogwild goes on with the {before} that it had")
    self.measured = Measured(setup, folder, self.saved.version, timing)
    self.parameters = sum(x.size for x in setup.shapes.values())
    bytes_ = shared.sizes(self.parameters, setup.workers)
    self.block = shared_memory.SharedMemory(create=True, size=bytes_)
    self.memory: shared.Memory | None = shared.view(self.block, self.parameters, setup.workers)
    self.memory.model[:] = np.concatenate([x.ravel() for x in self.saved.params.values()])
    self.memory.steps[:] = [row[1] for row in self.saved.counted]
    self.processes: dict[int, Any] = {}
    self.deaths = {"workers": 0}
    self.seen = (self.saved.version, 0.0)  # steps, and the sum of their losses

  def close(self) -> None:
    """Ends all processes and frees the shared memory."""
    if self.memory is not None:
      self.memory.stop[0] = 1
    for process in self.processes.values():
      process.join(10)
      if process.is_alive():
        process.kill()
        process.join()
    self.measured.close()
    self.memory = None
    self.block.close()
    with contextlib.suppress(FileNotFoundError):
      self.block.unlink()

  def start(self, worker: int) -> None:
    args = (self.config, worker, self.block.name, self.parameters, inherited())
    context = multiprocessing.get_context("spawn")
    self.processes[worker] = context.Process(target=shared.run, args=args, daemon=True)
    self.processes[worker].start()

  def train(self) -> dict[str, Any]:
    """Runs until the workers together have done all steps, or a signal stops the run."""
    for worker in range(self.setup.workers):
      self.start(worker)
    reason = ""
    with signals.watch() as stopped:
      while not reason:
        time.sleep(_POLL)
        reason = self._follow() or stopped()
        if not reason:
          self._look_at_processes()
      assert self.memory is not None
      self.memory.stop[0] = 1
      for process in self.processes.values():
        process.join()
      self._follow()
      self._save()
    self.measured.evaluate(self.saved.version, self.saved.params, "the last model is kept")
    found = self.measured.summary(reason, self.saved.version, None, self.deaths)
    return found | {"params_sha256": digest(self.saved.params)}

  def _follow(self) -> str:
    """Records progress, evaluates and saves if due; returns "steps" when the run is over."""
    assert self.memory is not None
    steps, losses = int(self.memory.steps.sum()), float(self.memory.losses.sum())
    before, total = self.seen
    if steps > before:
      row = (steps, (losses - total) / (steps - before), 0, time.time())
      self.measured.take_in({"refused": {}, "spent": [], "losses": [row]})
      self.seen = (steps, losses)
      heartbeat.beat()
    due = lambda every, last: every > 0 and steps // every > last // every
    if due(self.config.eval_every, self.measured.evaluated_at):
      with self.timing.aside():
        self.measured.evaluate(steps, self._place(steps).params, "the last model is kept")
    if due(self.config.checkpoint_every, self.saved.version):
      self._save()
    return "steps" if steps >= self.setup.updates else ""

  def _place(self, steps: int) -> Snapshot:
    """A snapshot of the model from one unlocked read."""
    assert self.memory is not None
    sizes = np.cumsum([x.size for x in self.setup.shapes.values()])[:-1]
    parts = zip(np.split(self.memory.model.copy(), sizes), self.setup.shapes.items(), strict=True)
    params = {name: part.reshape(like.shape) for part, (name, like) in parts}
    counted = [[0, int(taken), int(taken)] for taken in self.memory.steps]
    return Snapshot(steps, params, {}, counted)

  def _save(self) -> None:
    assert self.memory is not None
    place = self._place(int(self.memory.steps.sum()))
    store.save(self.checkpoints, place, self.setup.parts)
    self.saved = place

  def _look_at_processes(self) -> None:
    """Restarts dead workers; the updates they made stay."""
    for worker, process in list(self.processes.items()):
      if process.is_alive() or not process.exitcode:
        continue
      if process.exitcode > 0:
        raise UsageError(f"worker {worker} has failed; above is why")
      self.deaths["workers"] += 1
      if self.deaths["workers"] > self.config.restarts:
        text = f"worker {worker} has died, once more than that"
        raise UsageError(f"--restarts={self.config.restarts}: {text}")
      self.start(worker)
