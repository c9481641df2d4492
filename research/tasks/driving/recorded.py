"""Records driving in blocks of episodes with SHA-256 digests; recording is resumable.

A folder contains episodes.json, which lists the blocks, and one .npz file per block. The file
contains the scenes "x" [n, vehicles, features], the expert's actions "y" [n], and the episode
numbers "episode" [n].
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core import paths
from research.tasks import files
from research.tasks.driving import episodes, scenarios
from research.tasks.driving.scene import Driver

INDEX = "episodes.json"
BLOCK = 10  # episodes in a file
ROUND = 100_000  # seeds of one round of data
HELD_OUT = 1_000_000  # seeds from here on are for evaluation, never for data


def record(
  folder: Path,
  names: Sequence[str],
  count: int,
  driver: Driver,
  expert: Driver,
  number: int = 0,
  told: Callable[[int], None] = lambda episodes: None,
) -> str:
  """Drives and records the episodes that a folder does not contain yet.

  Args:
    folder: the folder of the recording, which is created if needed.
    names: the scenarios.
    count: the number of episodes per scenario, a multiple of BLOCK.
    driver: the driver of the ego vehicle: the expert, or a policy that the expert corrects
      (DAgger).
    expert: the driver whose actions are recorded.
    number: the round number: 0 if the expert drives, 1 and above for rounds of DAgger.
    told: a function that is called once per block, new or already recorded, with the block's number
      of episodes.

  Returns:
    The SHA-256 of the list of blocks.

  Raises:
    ValueError: if count is not a positive multiple of BLOCK, or the index is invalid.
  """
  if count < BLOCK or count % BLOCK or count > ROUND:
    raise ValueError(f"episodes={count} is not a multiple of {BLOCK} in [{BLOCK}, {ROUND}]")
  folder.mkdir(parents=True, exist_ok=True)
  index = _index(folder) if (folder / INDEX).exists() else {}
  for name in names:
    environment = None
    for first in range(0, count, BLOCK):
      block = f"{number}-{name}-{first:05d}.npz"
      if block not in index or _sha256(folder / block) != index[block]["sha256"]:
        environment = environment or scenarios.make(name)
        seeds = range(number * ROUND + first, number * ROUND + first + BLOCK)
        drives = [episodes.drive(environment, name, seed, driver, expert) for seed in seeds]
        index[block] = _write(folder / block, drives, first)
        with files.whole(folder / INDEX) as path:
          path.write_text(json.dumps(dict(sorted(index.items())), indent=1, allow_nan=False) + "\n")
      told(BLOCK)
  return hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()


def found(path: str) -> Path:
  """Finds a recording in the working directory, in $RESEARCH_DATA_DIR or in the user's cache.

  Args:
    path: the path of the recording's folder, absolute or relative to one of these folders.
  """
  own = paths.local(path)
  places = [own, *(folder / own for folder in _of_data())]
  return next((place for place in places if (place / INDEX).is_file()), own)


def default() -> Path:
  """Returns the default folder: "driving" in $RESEARCH_DATA_DIR or else in the user's cache.

  Raises:
    ValueError: if $RESEARCH_DATA_DIR is not set and the user has no cache folder.
  """
  places = _of_data()
  if not places:
    raise ValueError("there is no cache folder, since $HOME is not set; name a folder")
  return places[0] / "driving"


def _of_data() -> list[Path]:
  data, cache = paths.of_environment("RESEARCH_DATA_DIR"), paths.cache()
  return [folder for folder in (data, cache) if folder]


def blocks(folder: str | Path) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
  """Yields the round, the scenario and the arrays of each block in a folder.

  Args:
    folder: the folder of the recording.

  Raises:
    ValueError: if a file is missing or has changed since it was recorded.
  """
  folder = paths.local(folder)
  for block, kept in _index(folder).items():
    path = folder / block
    if not path.is_file() or _sha256(path) != kept["sha256"]:
      raise ValueError(f"{path} is missing or not as recorded; record it again")
    number, name, _ = block.split("-")
    with np.load(path) as arrays:
      yield int(number), name, dict(arrays)


def _index(folder: Path) -> dict[str, Any]:
  try:
    found = json.loads((folder / INDEX).read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{folder} has no recorded driving (no readable {INDEX}); "
      "record some: python experiments/drive.py --do=record"
    ) from error
  if not isinstance(found, dict) or not found:
    raise ValueError(f"{folder / INDEX} lists no blocks")
  return found


def _write(path: Path, drives: Sequence[episodes.Drive], first: int) -> dict[str, Any]:
  """Writes a block and returns its entry for the index."""
  lengths = [len(one.y) for one in drives]
  with files.whole(path) as partial:
    np.savez_compressed(
      partial,
      x=np.concatenate([one.x for one in drives]),
      y=np.concatenate([one.y for one in drives]),
      episode=np.repeat(np.arange(first, first + len(drives), dtype=np.int32), lengths),
    )
  return {
    "sha256": _sha256(path),
    "decisions": sum(lengths),
    "crashed": sum(one.outcome.crashed for one in drives),
    "succeeded": sum(one.outcome.success for one in drives),
  }


def _sha256(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
