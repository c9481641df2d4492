"""Hogwild: the processes of one machine update one model in shared memory without locks.

Which values a worker reads depends on timing, so a run has no trace and cannot be replayed. The
method `hogwild` simulates the setting in which the algorithm is analyzed.

Reference: Recht, Re, Wright, Niu 2011, arXiv 1106.5730, algorithm 1.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np

from research.server import shared
from research.server.actors import Snapshot, inherited
from research.server.polled import Polled
from research.server.setup import Setup
from research.training.config import UsageError
from research.training.hooks.hook import Event
from research.training.reports.timing import Timing

_POLL = 0.05  # seconds between two polls of the memory


class HogwildRun(Polled):
  """Runs workers without servers; all steps between two polls of the memory count as one update."""

  def __init__(self, setup: Setup, folder: Path, timing: Timing):
    super().__init__(setup, folder, timing)
    self.parameters = sum(x.size for x in setup.shapes.values())
    size = shared.sizes(self.parameters, setup.workers)
    self.block = shared_memory.SharedMemory(create=True, size=size)
    self.memory: shared.Memory | None = shared.view(self.block, self.parameters, setup.workers)
    self.processes: dict[int, Any] = {}
    self._losses = 0.0  # sum over the steps added so far

  def start(self, last: Mapping[str, Any] | None) -> None:
    super().start(last)
    assert self.memory is not None
    counted, workers = self.state.counted, self.setup.workers
    if counted and len(counted) != workers:
      raise UsageError(f"--workers={workers}: hogwild resumes with the {len(counted)} that it had")
    self.memory.model[:] = np.concatenate([x.ravel() for x in self.state.params.values()])
    self.memory.steps[:] = [row[1] for row in counted] or 0
    for worker in range(workers):
      self._start_worker(worker)

  def close(self) -> None:
    """Ends all processes and frees the shared memory."""
    if self.memory is not None:
      self.memory.stop[0] = 1
    for process in self.processes.values():
      process.join(10)
      if process.is_alive():
        process.kill()
        process.join()
    self.memory = None
    self.block.close()
    with contextlib.suppress(FileNotFoundError):
      self.block.unlink()

  def advance(self, to: int) -> Event:
    """Polls the memory and restarts dead workers; the updates of dead workers are kept."""
    assert self.memory is not None
    time.sleep(_POLL)
    done = int(self.memory.steps.sum()) >= self.steps
    over = self._told or ("steps" if done else "")
    if over:
      self.memory.stop[0] = 1
      for process in self.processes.values():
        process.join()
    else:
      self._look_at_processes()
    whole = bool(over) or int(self.memory.steps.sum()) >= to
    if whole:
      self.state = self._snapshot()
    else:
      self._look()
    self.reason = over
    return self._event(whole)

  def _look(self) -> np.ndarray:
    """Records the steps since the last poll; returns each worker's total number of steps."""
    assert self.memory is not None
    taken, losses = self.memory.steps.copy(), float(self.memory.losses.sum())
    if (steps := int(taken.sum())) > self._newest:
      self._add(steps, (losses - self._losses) / (steps - self._newest), 0, time.time())
      self._losses = losses
    return taken

  def _snapshot(self) -> Snapshot:
    """Returns the model, read once without a lock."""
    taken = self._look()
    assert self.memory is not None
    sizes = np.cumsum([x.size for x in self.setup.shapes.values()])[:-1]
    parts = zip(np.split(self.memory.model.copy(), sizes), self.setup.shapes.items(), strict=True)
    params = {name: part.reshape(like.shape) for part, (name, like) in parts}
    counted = [[0, int(steps), int(steps)] for steps in taken]
    return Snapshot(int(taken.sum()), params, {}, counted)

  def _start_worker(self, worker: int) -> None:
    args = (self.config, worker, self.block.name, self.parameters, inherited())
    context = multiprocessing.get_context("spawn")
    self.processes[worker] = context.Process(target=shared.run, args=args, daemon=True)
    self.processes[worker].start()

  def _look_at_processes(self) -> None:
    for worker, process in self.processes.items():
      if process.is_alive() or not process.exitcode:
        continue
      if process.exitcode > 0:
        raise UsageError(f"worker {worker} has failed; above is why")
      self._died("workers", f"worker {worker} has died")
      self._start_worker(worker)
