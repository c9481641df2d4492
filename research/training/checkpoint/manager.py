"""Orbax's manager of checkpoints, as a job of several processes needs it."""

import sys
from functools import partial
from pathlib import Path

import orbax.checkpoint as ocp

from research.training.checkpoint import integrity

KEEP = 3


class Manager(ocp.CheckpointManager):
  """Orbax's, but that it leaves JAX's preemption service to `signals.watch`.

  The service wants consecutive numbers from one caller. After one of Orbax's, which are steps, a
  notice would take effect when as many dispatches are done.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def of(folder: Path) -> Manager:
  """The manager of a folder, which it makes if need be. All processes call it."""
  options = ocp.AsyncOptions(
    post_finalization_callback=partial(integrity.list_files, folder),
    barrier_sync_fn=partial(_meet, ocp.multihost.get_barrier_sync_fn()),
  )
  keep = ocp.CheckpointManagerOptions(max_to_keep=KEEP, async_options=options)
  return Manager(folder, options=keep, item_handlers=ocp.StandardCheckpointHandler())


def _meet(barrier: ocp.multihost.BarrierSyncFn, *, key: str, timeout_ms: int) -> None:
  """Waits for all processes at a barrier, unless this one's save has failed: then it says so.

  Orbax lets a process whose save failed go on to its last barrier, while the others wait for it at
  one before, until ten minutes are over.
  """
  if (error := sys.exception()) is not None:
    raise error
  barrier(key=key, timeout_ms=timeout_ms)
