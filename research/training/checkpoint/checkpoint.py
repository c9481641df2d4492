"""Saves the complete TrainState with checksums, in Orbax's background threads; restores it."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from research.core.base import Array
from research.core.task import TrainState
from research.parallel import resize
from research.training.checkpoint import integrity, manager, moves
from research.training.checkpoint.noise import deaf_to_writers, quietly, silence
from research.training.together import of_first_process


class CheckpointError(Exception):
  """Reports that a run has checkpoints, but none of them can be read."""


class SaveError(Exception):
  """Reports that a checkpoint cannot be written; earlier checkpoints are kept."""


class ReadPlan(NamedTuple):
  """The plan for restoring a checkpoint."""

  mesh: str  # the mesh on which the checkpoint was saved
  wanted: dict[str, jax.ShapeDtypeStruct]  # shapes and shardings for reading all leaves
  moves: dict[str, moves.Move]  # by leaf of the state; missing leaves are reinitialized


class Checkpoints:
  """Manages the checkpoints of one run, by step. All processes of the run call every method."""

  def __init__(self, folder: Path, like: TrainState, placed: resize.Placed):
    """Opens the folder of all checkpoints, and creates it if it is missing.

    Args:
      folder: the folder of all checkpoints.
      like: a state with the shapes, dtypes and shardings of the states to save.
      placed: the placement of the state's leaves on the mesh.
    """
    self._folder, self._placed = folder, placed
    self._manager = manager.of(folder)
    self._failed = False
    self._hooks = contextlib.ExitStack()
    self._hooks.enter_context(deaf_to_writers())
    self.saved_at = 0.0
    jax.block_until_ready(integrity.checksums(moves.leaves_of(like)))

  def save(self, step: int, state: TrainState, now: float) -> None:
    """Copies the state and writes it in the background.

    Args:
      step: the number of steps of the state.
      state: the state.
      now: the current time, stored as `saved_at`.

    Raises:
      SaveError: if the previous save failed, or the new save cannot start.
    """
    self.saved_at = now
    leaves = moves.leaves_of(state)
    item = ocp.args.StandardSave({"state": leaves, "checksums": integrity.checksums(leaves)})
    lies = resize.as_json(self._placed) | {"step": step}
    with self._written():
      self._manager.save(step, args=item, custom_metadata=lies, force=True)

  def wait(self) -> None:
    """Blocks until all saves are on disk.

    Raises:
      SaveError: if a save failed.
    """
    with self._written():
      self._manager.wait_until_finished()
      integrity.list_files(self._folder)

  def close(self) -> None:
    """Waits for the last save and closes the folder.

    Raises:
      SaveError: if the save failed and the failure has not been reported.
    """
    if not self._failed:  # Orbax would wait for the failed save and raise again
      with self._written():
        self._manager.close()
      self._hooks.close()

  @contextlib.contextmanager
  def _written(self) -> Iterator[None]:
    """Context manager that converts errors of a failed save to one line."""
    try:
      with quietly():
        yield
    except Exception as error:  # a full disk raises various errors; other errors are not changed
      self._failed = True
      silence()
      free = shutil.disk_usage(self._folder).free
      full = any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "No space left"))
      if not (full or isinstance(error, OSError)):
        raise
      reason = f"the disk is full, {free:,} bytes are free" if full else _line(error)
      if isinstance(error, TimeoutError):  # Orbax also raises TimeoutError if a process has ended
        reason = "another process has not written its part"
      kept = f"checkpoint {self.latest()} is kept" if self.latest() else "there is none before it"
      raise SaveError(f"no checkpoint can be saved in {self._folder}: {reason}; {kept}") from error

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint, or None without a checkpoint."""
    return self._manager.latest_step()

  def restore(self, like: TrainState, warn: Callable[[str], None]) -> tuple[int, TrainState] | None:
    """Restores the newest intact checkpoint, in the shardings of `like`.

    The checkpoint may have been saved on another mesh. Shared leaves are restored unchanged.
    Private rows are restored owner by owner if the number of owners is unchanged; otherwise every
    owner gets the mean of all rows, except that chunks of one array are partitioned again. Shards
    are joined and sharded again. State of shards that no longer exist, such as a factor of
    PowerSGD, is reinitialized (`resize.moved`). A damaged checkpoint is renamed to STEP.damaged,
    and the previous checkpoint is tried.

    Args:
      like: a state with the shapes, dtypes and shardings to restore; provides reinitialized leaves.
      warn: a function that receives a line about each damaged checkpoint and about reinitialized
        state.

    Returns:
      The step and the state of the checkpoint; None if no checkpoint was ever saved.

    Raises:
      CheckpointError: if there are checkpoints, but none is intact, or if they contain a different
        state.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        if not of_first_process(integrity.is_whole(self._folder / str(step))):
          raise ValueError("files are missing or not as they were written")
        plan = self._plan(step, like)
        found = self._read(step, plan.wanted, like.round.sharding)
      except (CheckpointError, MemoryError):
        raise
      except Exception as error:  # a damaged file may make the reader raise anything
        reason = _line(error)
        warn(f"checkpoint {step} is damaged and was renamed to {step}.damaged: {reason}")
        self._set_aside(step)
        continue
      for line in self._changes(step, like, plan):
        warn(line)
      return step, moves.rebuilt(moves.moved(found, plan.moves, like), like)
    if steps or list(self._folder.glob("*.damaged")):
      raise CheckpointError(f"none of the checkpoints in {self._folder} is intact")
    return None

  def _plan(self, step: int, like: TrainState) -> ReadPlan:
    metadata = self._manager.item_metadata(step)
    about = self._manager.metadata(step).custom_metadata
    if metadata is None or not about:
      raise ValueError("its metadata is missing")
    if about.get("step", step) != step:
      raise ValueError(f"it is that of step {about['step']}, renamed")
    saved, here, target = resize.from_json(about), self._placed.leaves, moves.leaves_of(like)
    mesh = like.round.sharding.mesh
    wanted = {n: moves.spread(x.shape, x.dtype, mesh) for n, x in metadata["state"].items()}
    origins = {n: was for n, was in resize.origins(saved, self._placed).items() if n in target}
    if reason := moves.mismatch(wanted, target, saved, self._placed, origins):
      where = f"checkpoint {step} in {self._folder}"
      raise CheckpointError(f"{where} is of another model or method: {reason}")
    taken = {n: moves.Move(was, saved.leaves[was], here[n]) for n, was in origins.items()}
    stay = {move.name: moves.struct(target[n]) for n, move in taken.items() if move.is_none}
    return ReadPlan(saved.mesh, wanted | stay, taken)

  def _changes(self, step: int, like: TrainState, plan: ReadPlan) -> Iterator[str]:
    """Yields messages about a checkpoint from another mesh."""
    here = self._placed
    if plan.mesh != here.mesh:
      yield f"checkpoint {step}, saved on {plan.mesh}, is put on {here.mesh}"
    anew = sorted({here.leaves[name].name for name in set(moves.leaves_of(like)) - set(plan.moves)})
    if anew:
      yield f"state that belongs to the shards of {plan.mesh} is reinitialized: {_some(anew)}"

  def _read(
    self, step: int, wanted: dict[str, jax.ShapeDtypeStruct], everywhere: Sharding
  ) -> dict[str, Array]:
    sums = jax.ShapeDtypeStruct((len(wanted),), jnp.uint32, sharding=everywhere)
    with quietly():
      item = ocp.args.StandardRestore({"state": wanted, "checksums": sums})
      found = self._manager.restore(step, args=item)
    matches = np.asarray(found["checksums"]) == np.asarray(integrity.checksums(found["state"]))
    if not matches.all():
      raise ValueError(f"the checksum of {sorted(wanted)[int(np.argmin(matches))]} does not match")
    return found["state"]

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      source = self._folder / str(step)
      goal = self._folder / f"{step}.damaged"
      if goal.exists():
        shutil.rmtree(goal)
      if source.exists():
        source.rename(goal)
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices(f"set aside {step}")
    self._manager.reload()


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:160] or type(error).__name__


def _some(names: Sequence[str]) -> str:
  """Formats the first few names, and the number of remaining names."""
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
