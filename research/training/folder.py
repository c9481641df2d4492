"""Manages the folder of a single run, with its configuration, environment and fingerprints."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core import paths, plugins, registry
from research.core.spec import parse
from research.training.config import NAMED, OF_SERVER, Config, UsageError, flag
from research.training.reports.report import closing_table, note, with_nan, write_json

# Flags that do not affect the result of a run.
_FREE = ("out", "data_dir", "allow_changes", "diagnostics", "tensorboard", "profile")
_FREE = (*_FREE, "restarts", "ray_address", "node_ip")
# Entries of every summary, in addition to the flags in NAMED.
RESULT = ("workers", "steps", "stopped_because", "evaluated_on", "params_sha256")
# A function that returns the fingerprints "data" and "code", stored in env.json under PRINTS.
Prints = Callable[[], Mapping[str, str]]
PRINTS = "made_of"
IMPORT = "import"  # in config.json: the modules that registered names
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def identity(config: Config) -> dict[str, Any]:
  """Returns the flags that determine a run's result, by name.

  Args:
    config: the run.
  """
  idle = () if config.executor == "server" else OF_SERVER
  named = config.as_dict().items()
  return {name: value for name, value in named if name not in (*_FREE, *idle)}


def default_folder(config: Config) -> Path:
  """Returns the folder runs/TASK-METHOD-HASH, which the flags that affect the result determine.

  Args:
    config: the run.
  """
  flags = identity(config)
  if not config.network:  # such runs keep the folders that they have in earlier versions
    del flags["network"]
  digest = hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:8]
  names = (parse(config.task).name, parse(config.method).name)
  return Path("runs") / f"{names[0]}-{names[1]}-{digest}"


def place(config: Config) -> Path:
  """Returns the folder of the run's files: --out, or the default folder.

  Raises:
    UsageError: if --out is not a valid path on this machine.
  """
  with flag("out", config.out):
    return paths.local(config.out) if config.out else default_folder(config)


def check(config: Config) -> Path:
  """Checks and returns the run's folder, which may not exist yet, without writing files.

  Args:
    config: the run.

  Raises:
    UsageError: if the folder is not writable, contains files but no run, or contains a run with
      other flags and --allow_changes is not set.
  """
  folder = place(config)
  with flag("out", str(folder)):
    if not (folder / "summary.json").exists():  # a complete run only needs to be shown
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


def note_missing_modules(folder: Path) -> None:
  """Reports in one line the modules that the folder's run imported but this process has not."""
  stored = (_stored(folder / "config.json") or {}).get(IMPORT, [])
  if not _without(stored):
    return
  registry.load_installed()  # a name of an installed package needs no --import
  if missing := _without(stored):
    names = " ".join(f"--import={name}" for name in missing)
    note(f"the run in {folder} was made with {names}")


def _without(modules: Sequence[str]) -> list[str]:
  """Returns the modules that have registered nothing in this process."""
  here = {source.name for source in plugins.carried()}
  return [name for name in modules if name not in here]


def _stored(path: Path) -> dict[str, Any] | None:
  """Reads the object in a JSON file; returns None if there is no object."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def unchanged(config: Config, folder: Path, made_of: Prints | None) -> bool:
  """Returns whether the folder contains a run with the same flags, data and code.

  Args:
    config: the run.
    folder: the run's folder.
    made_of: returns the run's fingerprints; None means that fingerprints are not compared.
  """
  before = {"network": "", **(_stored(folder / "config.json") or {})}
  same = all(before.get(name) == value for name, value in identity(config).items())
  return same and not _changed_prints(folder, made_of)


def _changed_prints(folder: Path, made_of: Prints | None) -> list[str]:
  """Returns the names of fingerprints that differ from those stored in a folder."""
  stored = (_stored(folder / "env.json") or {}).get(PRINTS)
  if stored is None or made_of is None:
    return []
  now = made_of()
  return [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]


def check_prints(config: Config, folder: Path, made_of: Prints) -> None:
  """Rejects a folder whose run used other examples or other code.

  Args:
    config: the run.
    folder: the run's folder.
    made_of: returns the run's fingerprints.

  Raises:
    UsageError: if a fingerprint differs and --allow_changes is not set.
  """
  changed = _changed_prints(folder, made_of)
  if changed and not config.allow_changes:
    raise UsageError(
      f"--out='{folder}': holds a run with other {' and '.join(changed)} under the same flags; "
      "name another folder, or continue with the changes by --allow_changes"
    )


def _refuse_differences(config: Config, folder: Path, path: Path) -> None:
  before = _stored(path)
  if before is None:
    raise UsageError(f"--out='{folder}': its config.json is not one of a run")
  before, now = {"network": "", **before}, identity(config)
  changed = [
    f"--{name}={now[name]!r} (was {before.get(name)!r})"
    for name in now
    if now[name] != before.get(name)
  ]
  if changed and not config.allow_changes:
    raise UsageError(
      f"--out='{folder}': holds a run with other flags: {', '.join(changed)}; name another folder, "
      f"or continue with the new flags by --allow_changes"
    )


def finished(
  config: Config, folder: Path, steps: int, made_of: Prints | None = None
) -> dict[str, Any] | None:
  """Returns the summary of a complete run with the same flags, data and code, or None.

  If the summary was edited and cannot be shown, the result is None, so the run recomputes it.

  Args:
    config: the run.
    folder: the run's folder.
    steps: number of steps of the complete run.
    made_of: returns the run's fingerprints; None means that fingerprints are not compared.

  Raises:
    UsageError: if the folder contains a complete run with different flags, data or code.
  """
  path = folder / "summary.json"
  if not path.exists():
    return None
  summary = _result(path)
  if summary is None:
    note(f"{path} was changed, and is written again")
    return None
  whole = summary["steps"] >= steps
  if not unchanged(config, folder, made_of):
    if whole:
      other = _changed_prints(folder, made_of) or ["flags"]
      raise UsageError(
        f"--out='{folder}': holds a run with other {' and '.join(other)} that has done its "
        f"{summary['steps']} steps; give more --steps to continue, or name another folder"
      )
    return None
  return summary if whole or summary["stopped_because"] == "converged" else None


def _result(path: Path) -> dict[str, Any] | None:
  """Reads a summary; returns None if entries that are shown or compared are missing."""
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
  """Context manager that creates and locks the run's folder; `describe` fills a new folder.

  Args:
    config: the run.
    folder: the run's folder.

  Raises:
    UsageError: if the folder cannot be created, or another process has locked the folder.
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
  """Writes the run's configuration, environment and fingerprints.

  Args:
    config: the run.
    folder: the run's folder.
    made_of: returns the run's fingerprints; None means that fingerprints are not stored.
  """
  prints = {PRINTS: dict(made_of())} if made_of else {}
  modules = [source.name for source in plugins.carried()]
  write_json(folder / "config.json", config.as_dict() | ({IMPORT: modules} if modules else {}))
  write_json(folder / "env.json", environment() | prints)


def environment() -> dict[str, Any]:
  """Returns the commit, versions, hardware and command of this process."""
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
  """Returns the commit of the code, with '+changes' for modified files; '' outside of git."""
  git = ["git", "-C", str(Path(__file__).parent)]
  try:
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    changes = subprocess.run(
      [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
