"""Prepares a command: logging, caching, plugins, other processes and the results folder."""

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
  """Prepares this process according to its flags, and joins the other processes of the job.

  Returns:
    The configuration of the run.

  Raises:
    UsageError: if a flag is invalid; the message names the flag.
  """
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().setLevel("CRITICAL")  # Orbax also logs the errors that it raises
  config = config_of_flags()
  use_compilation_cache(FLAGS.compilation_cache)
  import_modules()
  from research.comm import join

  address = FLAGS.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  with flag("coordinator", address), environment.starting():
    join.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id)
  return config


def import_modules() -> None:
  """Imports the modules that --import names, and reports each module that registers nothing.

  If a module raises an error, its traceback is shown.

  Raises:
    UsageError: if a module does not exist, or registers a name that is already registered.
  """
  for text in FLAGS["import"].value or ():
    try:
      with flag("import", text):
        registers = plugins.load(text)
      if not registers:
        print(f"--import={quoted(text)}: the module registers no name", file=sys.stderr)
    except UsageError:
      raise
    except SystemExit as error:
      raise UsageError(f"--import={quoted(text)}: ends the program when it is imported") from error
    except Exception as error:  # a user's module may raise anything
      fault = blame.fault(error) or f"{type(error).__name__}: {error}"
      print(one_line(f"error: --import={quoted(text)}: {fault}"), file=sys.stderr)
      traceback.print_exc()
      sys.exit(2)


def use_compilation_cache(folder: str) -> None:
  """Caches compiled programs on disk, so that the next run of the same command starts faster.

  Args:
    folder: the folder of the cache; '' means the user's cache folder, if there is one; 'off' means
      no cache.

  Raises:
    UsageError: if the path is invalid or does not lead to a folder.
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
  """Returns the folder for the results of a command, after checking that it is writable.

  Args:
    name: the name of the flag.
    text: the flag's value.
    default: the folder to use if the value is ''.

  Raises:
    UsageError: if a flag is invalid; the message names the flag.
  """
  with flag(name, text or default):
    return paths.writable(text or default)
