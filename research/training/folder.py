"""The folder of a run: its flags, its data and code, what ran it, and never another run in it."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from research.core import paths
from research.core.spec import parse
from research.training.config import NAMED, OF_SERVER, Config, UsageError, flag
from research.training.reports.report import closing_table, note, with_nan, write_json

# Flags that change neither the result nor the files of a run.
_FREE = ("out", "data_dir", "allow_changes", "diagnostics", "tensorboard", "profile")
_FREE = (*_FREE, "restarts", "ray_address", "node_ip")
# What every summary has beside the flags of NAMED.
RESULT = ("workers", "steps", "stopped_because", "evaluated_on", "params_sha256")
# Gives fingerprints by what they are of, "data" and "code"; in env.json under PRINTS.
Prints = Callable[[], Mapping[str, str]]
PRINTS = "made_of"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def identity(config: Config) -> dict[str, Any]:
  """The flags that make a run what it is."""
  idle = () if config.executor == "server" else OF_SERVER
  named = config.as_dict().items()
  return {name: value for name, value in named if name not in (*_FREE, *idle)}


def default_folder(config: Config) -> Path:
  """runs/TASK-METHOD-HASH: the same flags always mean the same folder."""
  digest = hashlib.sha256(json.dumps(identity(config)).encode()).hexdigest()[:8]
  names = (parse(config.task).name, parse(config.method).name)
  return Path("runs") / f"{names[0]}-{names[1]}-{digest}"


def check(config: Config) -> Path:
  """The run's folder, which may not be there yet; nothing is written.

  Raises:
    UsageError: if the folder cannot be written, holds other things than a run, or a run with other
      flags without --allow_changes.
  """
  with flag("out", config.out):
    folder = paths.local(config.out) if config.out else default_folder(config)
  with flag("out", str(folder)):
    if not (folder / "summary.json").exists():  # else it may be complete, and only be shown
      paths.writable(folder)
  try:
    _check(config, folder)
  except OSError as error:
    raise UsageError(f"--out='{folder}': {error.strerror}") from error
  return folder


def _check(config: Config, folder: Path) -> None:
  path = folder / "config.json"
  if path.exists():
    _refuse_differences(config, folder, path)
  elif folder.exists() and any(not found.name.startswith(".") for found in folder.iterdir()):
    raise UsageError(f"--out='{folder}': holds other files and no run; name a new or empty folder")


def _stored(path: Path) -> dict[str, Any] | None:
  """The entries of a JSON file, None if it holds none."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def unchanged(config: Config, folder: Path, made_of: Prints | None) -> bool:
  """Whether the folder holds a run of these very flags, data and code."""
  before = _stored(folder / "config.json") or {}
  same = all(before.get(name) == value for name, value in identity(config).items())
  return same and not _changed_prints(folder, made_of)


def _changed_prints(folder: Path, made_of: Prints | None) -> list[str]:
  """Which fingerprints are not those of the run in a folder; none if it has no fingerprints."""
  stored = (_stored(folder / "env.json") or {}).get(PRINTS)
  if stored is None or made_of is None:
    return []
  now = made_of()
  return [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]


def check_prints(config: Config, folder: Path, made_of: Prints) -> None:
  """Rejects a folder whose run was of other examples or of other code.

  Raises:
    UsageError: without --allow_changes.
  """
  changed = _changed_prints(folder, made_of)
  if changed and not config.allow_changes:
    raise UsageError(
      f"--out='{folder}': holds a run of other {' and '.join(changed)} under the same flags; name "
      "another folder, or go on with what is there now by --allow_changes"
    )


def _refuse_differences(config: Config, folder: Path, path: Path) -> None:
  before = _stored(path)
  if before is None:
    raise UsageError(f"--out='{folder}': its config.json is not one of a run")
  now = identity(config)
  changed = [
    f"--{name}={now[name]!r} (was {before.get(name)!r})"
    for name in now
    if now[name] != before.get(name)
  ]
  if changed and not config.allow_changes:
    raise UsageError(
      f"--out='{folder}': holds a run with other flags: {', '.join(changed)}; name another folder, "
      f"or go on with the new flags by --allow_changes"
    )


def finished(
  config: Config, folder: Path, steps: int, made_of: Prints | None = None
) -> dict[str, Any] | None:
  """The summary of a run of these flags, data and code that has nothing left to do.

  A summary that somebody has edited, such that it cannot be shown, is made again.

  Raises:
    UsageError: if the run has nothing left to do and is another one: its result is not of these.
  """
  path = folder / "summary.json"
  if not path.exists():
    return None
  summary = _result(path)
  if summary is None:
    note(f"{path} is not as a run writes it, and is made again")
    return None
  whole = summary["steps"] >= steps
  if not unchanged(config, folder, made_of):
    if whole:
      other = _changed_prints(folder, made_of) or ["flags"]
      raise UsageError(
        f"--out='{folder}': holds a run with other {' and '.join(other)} that has done its "
        f"{summary['steps']} steps; give it more --steps to go on with, or name another folder"
      )
    return None
  return summary if whole or summary["stopped_because"] == "converged" else None


def _result(path: Path) -> dict[str, Any] | None:
  """A summary that can be shown and compared, None if it is not such a one."""
  try:
    summary: dict[str, Any] = dict(with_nan(json.loads(path.read_text())))
    closing_table(summary, path.parent)
    has_all = {*NAMED, *RESULT} <= set(summary) and isinstance(summary["steps"], int)
    has_all &= "transfers" in summary["wire"] or "server" in summary
  except (OSError, ValueError, TypeError, LookupError, AttributeError):
    return None
  return summary if has_all else None


@contextlib.contextmanager
def claimed(config: Config, folder: Path) -> Iterator[None]:
  """Makes the folder and keeps other runs out of it; a new one is described, see `describe`.

  Raises:
    UsageError: if it cannot be made, or another run is in it.
  """
  with contextlib.ExitStack() as stack:
    with flag("out", str(folder)):
      folder.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context((folder / ".running").open("w"))
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError("another process is running this very run") from None
      if not (folder / "config.json").exists():
        describe(config, folder)
    yield


def describe(config: Config, folder: Path, made_of: Prints | None = None) -> None:
  """Writes what the run is and what runs it."""
  prints = {PRINTS: dict(made_of())} if made_of else {}
  write_json(folder / "config.json", config.as_dict())
  write_json(folder / "env.json", environment() | prints)


def environment() -> dict[str, Any]:
  """What ran it: commit, versions, hardware, command."""
  import jax

  devices = jax.devices()
  return {
    "commit": _commit(),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "platform": platform.platform(),
    "processor": platform.processor() or platform.machine(),
    "cores": os.cpu_count(),
    "backend": devices[0].platform,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "processes": jax.process_count(),
    "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
  }


def _commit() -> str:
  """The commit of the code, with '+changes' where files differ from it; '' outside of git."""
  git = ["git", "-C", str(Path(__file__).parent)]
  try:
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    changes = subprocess.run(
      [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
