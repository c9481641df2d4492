"""What a command does before its work: quiet logs, compilation cache, other processes, folders."""

import os
import sys
import traceback
from pathlib import Path

from absl import flags, logging

from research.command.flags import config_of_flags
from research.core import blame, paths, plugins
from research.core.text import one_line, quoted
from research.training import environment
from research.training.config import Config, UsageError, flag

FLAGS = flags.FLAGS


def start() -> Config:
  """Prepares this process as its flags say and joins the job's other processes.

  Returns:
    The run that the flags describe.

  Raises:
    UsageError: one line that names the flag.
  """
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().setLevel("CRITICAL")  # Orbax logs what it then raises
  config = config_of_flags()
  use_compilation_cache(FLAGS.compilation_cache)
  import_modules()
  from research.comm import join

  address = FLAGS.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  with flag("coordinator", address), environment.starting():
    join.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id)
  return config


def import_modules() -> None:
  """Imports what --import names; an error of the module itself is shown with its traceback.

  Raises:
    UsageError: if there is no such module or file, or a name that it registers is taken.
  """
  for text in FLAGS["import"].value or ():
    try:
      with flag("import", text):
        plugins.load(text)
    except UsageError:
      raise
    except SystemExit as error:
      raise UsageError(f"--import={quoted(text)}: ends the program when it is imported") from error
    except Exception as error:  # whatever a user's module does
      fault = blame.fault(error) or f"{type(error).__name__}: {error}"
      print(one_line(f"error: --import={quoted(text)}: {fault}"), file=sys.stderr)
      traceback.print_exc()
      sys.exit(2)


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs on disk, so that the same command starts faster the next time.

  Args:
    folder: where; '' for the user's cache, if there is one; 'off' for nowhere.

  Raises:
    UsageError: if the folder is not a path or not a folder.
  """
  import jax

  if folder == "off":
    return
  if folder:
    with flag("compilation_cache", folder):
      place = paths.local(folder)
      if place.exists() and not place.is_dir():
        raise ValueError("is not a folder")
  else:
    try:
      place = paths.cache()
    except ValueError as error:
      raise UsageError(str(error)) from error
    place = place and place / "compiled"
  if place:
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def results_folder(name: str, text: str, default: str = "") -> Path:
  """The folder for a command's results, checked to be writable; nothing is written yet.

  Args:
    name: of the flag.
    text: its value.
    default: the folder if the value is ''.

  Raises:
    UsageError: with the flag of that name.
  """
  with flag(name, text or default):
    return paths.writable(text or default)
