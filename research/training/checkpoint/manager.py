"""Configures Orbax's checkpoint manager for jobs of several processes."""

import sys
from functools import partial
from pathlib import Path

import orbax.checkpoint as ocp

from research.training.checkpoint import integrity

KEEP = 3  # number of checkpoints to keep


class Manager(ocp.CheckpointManager):
  """Orbax's manager, which leaves JAX's preemption service to `signals.watch`.

  The service needs consecutive numbers from a single caller. Orbax would pass steps, while
  `signals` counts dispatches, so a preemption notice that follows a call by Orbax would take effect
  too late.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def of(folder: Path) -> Manager:
  """Returns the manager of a folder, which is created if missing; called by all processes.

  Args:
    folder: the folder of all checkpoints.
  """
  options = ocp.AsyncOptions(
    post_finalization_callback=partial(integrity.list_files, folder),
    barrier_sync_fn=partial(_meet, ocp.multihost.get_barrier_sync_fn()),
  )
  keep = ocp.CheckpointManagerOptions(max_to_keep=KEEP, async_options=options)
  return Manager(folder, options=keep, item_handlers=ocp.StandardCheckpointHandler())


def _meet(barrier: ocp.multihost.BarrierSyncFn, *, key: str, timeout_ms: int) -> None:
  """Waits for all processes at a barrier; raises instead if this process's save has failed.

  Without this function, Orbax lets a process whose save failed continue to its last barrier, while
  the other processes wait at an earlier barrier, with a timeout of ten minutes.
  """
  if (error := sys.exception()) is not None:
    raise error
  barrier(key=key, timeout_ms=timeout_ms)
