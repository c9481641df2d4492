"""Parses a launcher's command line: the launcher's own flags, `--`, and the job's command."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import flags

from launch.supervisor import Rules, say
from research.command.errors import fail
from research.command.flags import launch
from research.command.start import results_folder
from research.training.config import UsageError, flag

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of every launcher that supervises a job."""
  default = Rules()
  text = "Number of restarts from the last checkpoint after a process dies or hangs."
  flags.DEFINE_integer("restarts", default.restarts, text, 0)
  text = "Ends a run if none of its processes has made a step this long after the start; 0: never."
  flags.DEFINE_float("start_seconds", default.start_seconds, text, 0.0)
  text = "Ends a run if none of its processes has advanced for this long; 0: never."
  flags.DEFINE_float("hang_seconds", default.hang_seconds, text, 0.0)
  text = "Seconds between SIGTERM and SIGKILL."
  flags.DEFINE_float("grace_seconds", default.grace_seconds, text, 0.0)
  text = "Folder for the log files of the processes; empty: logs/TIME-PID."
  flags.DEFINE_string("logs", "", text)
  flags.DEFINE_integer(
    "port", 0, "Port on which process 0 listens for the others; 0: a free port.", 0, 65535
  )


def start(main: Callable[[list[str]], int], doc: str | None) -> None:
  """Runs `main` on the command after `--`, and exits with the code that it returns."""
  argv = sys.argv
  at = argv.index("--") if "--" in argv else len(argv)
  command = argv[at + 1 :]

  def supervise(rest: list[str]) -> None:
    del rest
    if not command:
      fail(2, f"no command to run: {Path(argv[0]).name} FLAGS -- python SCRIPT FLAGS")
    if not shutil.which(command[0], path=_path(os.environ)):
      fail(2, f"command not found: '{command[0]}'")
    sys.exit(main(command))

  launch(supervise, doc, argv[:at])


def rules() -> Rules:
  """Returns the restart rules that the flags describe."""
  return Rules(FLAGS.restarts, FLAGS.start_seconds, FLAGS.hang_seconds, FLAGS.grace_seconds)


def log_folder() -> Path:
  """Creates the folder for the log files, and prints its path."""
  name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
  try:
    folder = results_folder("logs", FLAGS.logs, f"logs/{name}")
    with flag("logs", str(folder)):
      folder.mkdir(parents=True, exist_ok=True)
  except UsageError as error:
    fail(2, str(error))
  say(f"logs in {folder}")
  return folder


def environment(coordinator: str, number: int, of: int) -> dict[str, str]:
  """Returns the environment of a process, in which `python` is the launcher's interpreter."""
  return {
    **os.environ,
    "PATH": _path(os.environ),
    "PYTHONUNBUFFERED": "1",
    "JAX_COORDINATOR_ADDRESS": coordinator,
    "JAX_NUM_PROCESSES": str(of),
    "JAX_PROCESS_ID": str(number),
  }


def _path(environ: Mapping[str, str]) -> str:
  return os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])


def free_port(host: str) -> int:
  """Returns the port from the flags or, by default, a port that is currently free."""
  with socket.socket() as tried:
    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      tried.bind((host, FLAGS.port))
    except OSError as error:
      fail(2, f"--port={FLAGS.port}: {error.strerror}; 0 selects a free one")
    return tried.getsockname()[1]
