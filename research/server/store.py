"""Saves and restores a server's parameters, optimizer state and counts, all of one version."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.server.actors import Snapshot
from research.training.checkpoint import integrity
from research.training.checkpoint.checkpoint import CheckpointError, SaveError
from research.training.checkpoint.manager import KEEP
from research.training.reports import report

_STATE, _ABOUT = "state.npz", "server.json"


class ShardStore:
  """Manages the checkpoints of a server's run, in folders named by version.

  The class implements `CheckpointStore` for the hook `Save`; an update counts as `period` steps.
  """

  def __init__(
    self, folder: Path, names: Sequence[str], parts: Sequence[Sequence[int]], period: int = 1
  ):
    """Opens the checkpoints of a model and its shards.

    Args:
      folder: the folder of the checkpoints.
      names: the names of the model's leaves.
      parts: the leaves of each shard.
      period: number of local steps per update.
    """
    self._folder, self._names, self._period = folder, list(names), period
    self._parts = [list(part) for part in parts]
    self.saved_at = 0.0

  def save(self, step: int, state: Snapshot, now: float) -> None:
    """Writes checkpoints/VERSION atomically, and keeps the last few.

    Raises:
      SaveError: if the checkpoint cannot be written; earlier checkpoints are kept.
    """
    assert step == state.version * self._period, "a snapshot is of the run's step"
    self.saved_at = now
    place, folder = state, self._folder
    goal, scratch = folder / str(place.version), folder / f".{place.version}"
    states = place.states or {}
    arrays: dict[str, Any] = {f"params {i}": _plain(x) for i, x in enumerate(place.params.values())}
    arrays |= {f"state {n} {i}": _plain(x) for n in states for i, x in enumerate(states[n])}
    dtypes = {f"params {i}": str(x.dtype) for i, x in enumerate(place.params.values())}
    about = {"version": place.version, "names": list(place.params), "counted": place.counted}
    about |= {"parts": self._parts, "dtypes": dtypes}
    about |= {"states": {n: len(states[n]) for n in states}}
    try:
      shutil.rmtree(scratch, ignore_errors=True)
      scratch.mkdir(parents=True)
      np.savez(scratch / _STATE, **arrays)
      report.write_json(scratch / _ABOUT, about)
      shutil.rmtree(goal, ignore_errors=True)
      scratch.rename(goal)
      integrity.list_files(folder)
    except OSError as error:
      shutil.rmtree(scratch, ignore_errors=True)
      reason = error.strerror or str(error)
      raise SaveError(f"no checkpoint can be saved in {folder}: {reason}") from error
    for version in self._versions()[:-KEEP]:
      shutil.rmtree(folder / str(version))

  def latest(self) -> int | None:
    """Returns the newest saved step, or None without a checkpoint."""
    found = self._versions()
    return found[-1] * self._period if found else None

  def restore(self, like: Any, warn: Callable[[str], None]) -> tuple[int, Snapshot] | None:
    """Restores the newest intact checkpoint; damaged checkpoints are renamed and skipped.

    If the checkpoint was saved with other shards, the optimizer starts with a new state.

    Args:
      like: unused.
      warn: called with the text of a warning.

    Returns:
      The step and the checkpoint, or None if there is no checkpoint.

    Raises:
      CheckpointError: if the checkpoint belongs to another model, or checkpoints exist but none is
        intact.
    """
    del like
    folder, found = self._folder, self._versions()
    for version in reversed(found):
      path = folder / str(version)
      try:
        if not integrity.is_whole(path):
          raise ValueError("files are missing or not as they were written")
        about = json.loads((path / _ABOUT).read_text())
        place = _read(path, about)
        if place.version != version:
          raise ValueError(f"it is version {place.version}, renamed")
      except (OSError, ValueError, KeyError) as error:
        warn(f"checkpoint {version} is damaged and was renamed to {version}.damaged: {error}")
        shutil.rmtree(folder / f"{version}.damaged", ignore_errors=True)
        path.rename(folder / f"{version}.damaged")
        continue
      if list(place.params) != self._names:
        raise CheckpointError(f"checkpoint {version} in {folder} is of another model")
      if about["parts"] != self._parts:
        warn(
          f"checkpoint {version} was saved with other shards: the server's optimizer is "
          "reinitialized"
        )
        place = place._replace(states=None)
      return version * self._period, place
    if found or (folder.is_dir() and list(folder.glob("*.damaged"))):
      raise CheckpointError(f"none of the checkpoints in {folder} is intact")
    return None

  def wait(self) -> None:
    """Does nothing, because no checkpoint is written in the background."""

  def close(self) -> None:
    """Does nothing, because no file is open."""

  def _versions(self) -> list[int]:
    """Returns the versions of the existing checkpoints, ascending."""
    found = self._folder.glob("[0-9]*") if self._folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def _read(path: Path, about: Mapping[str, Any]) -> Snapshot:
  with np.load(path / _STATE) as file:
    params = {
      name: file[f"params {i}"].view(about["dtypes"][f"params {i}"])
      for i, name in enumerate(about["names"])
    }
    states = {
      int(n): [file[f"state {n} {i}"] for i in range(count)] for n, count in about["states"].items()
    }
  return Snapshot(about["version"], params, states, about["counted"])


def _plain(x: np.ndarray) -> np.ndarray:
  """Converts arrays of dtypes that numpy's files do not support to raw bits."""
  return x if x.dtype.kind in "biufc" else x.view(f"u{x.dtype.itemsize}")
