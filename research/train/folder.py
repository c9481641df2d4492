"""The folder of a run: whose flags it belongs to, what made it, and never another run in it."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from research import registry
from research.train.config import Config, UsageError
from research.train.report import write_json

# Flags that change neither the result nor the files of a run.
_FREE = ("out", "data_dir", "allow_changes", "tensorboard", "profile")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def identity(config: Config) -> dict[str, Any]:
  """The flags that make a run what it is."""
  return {name: value for name, value in config._asdict().items() if name not in _FREE}


def default_folder(config: Config) -> Path:
  """runs/TASK-METHOD-HASH: the same flags always mean the same folder."""
  digest = hashlib.sha256(json.dumps(identity(config)).encode()).hexdigest()[:8]
  names = (registry.parse(config.task).name, registry.parse(config.method).name)
  return Path("runs") / f"{names[0]}-{names[1]}-{digest}"


def check(config: Config) -> Path:
  """The run's folder, which may not be there yet; nothing is written.

  Raises:
    UsageError: if the folder cannot be written, holds other things than a run, or a run with other
      flags while --allow_changes does not stand.
  """
  folder = Path(config.out) if config.out else default_folder(config)
  try:
    _check(config, folder)
  except OSError as error:
    raise UsageError(f"--out='{folder}': {error.strerror}") from error
  return folder


def _check(config: Config, folder: Path) -> None:
  there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    raise UsageError(f"--out='{folder}': {there} is not a folder that can be written")
  path = folder / "config.json"
  if path.exists():
    _refuse_differences(config, folder, path)
  elif folder.exists() and any(not found.name.startswith(".") for found in folder.iterdir()):
    raise UsageError(f"--out='{folder}': holds other files and no run; name a new or empty folder")


def unchanged(config: Config, folder: Path) -> bool:
  """Whether the folder holds a run of these very flags."""
  path = folder / "config.json"
  before = json.loads(path.read_text()) if path.exists() else {}
  return all(before.get(name) == value for name, value in identity(config).items())


def _refuse_differences(config: Config, folder: Path, path: Path) -> None:
  try:
    before = json.loads(path.read_text())
  except json.JSONDecodeError:
    raise UsageError(f"--out='{folder}': its config.json is not readable") from None
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


def claim(config: Config, folder: Path) -> None:
  """Makes the folder and writes what the run is and what runs it.

  Raises:
    UsageError: if it cannot be made.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config._asdict())
    write_json(folder / "env.json", environment())
  except OSError as error:
    raise UsageError(f"--out='{folder}': {error.strerror}") from error


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
