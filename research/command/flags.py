"""Defines the flags of a run (one flag per field of `Config`) and parses the command line."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from research.command.errors import fail, interrupted
from research.core import checks, streams
from research.core.text import quoted, shortened, whole_number
from research.training.config import Config

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines one flag per field of `Config`, and the flags that do not describe the run."""
  for field in dataclasses.fields(Config):
    name, text, least = field.name, field.metadata["text"], field.metadata["least"]
    default: Any = field.default
    if isinstance(default, bool):
      flags.DEFINE_bool(name, default, text)
    elif isinstance(default, float):
      flags.DEFINE_float(name, default, text, least)
    elif field.type is int:
      flags.DEFINE_integer(name, default, text, least, 2**31 - 1)
    else:
      flags.DEFINE_string(name, str(default), text)
  define_compilation_cache()
  define_import()
  flags.DEFINE_bool(
    "debug", False, "Shows the traceback of every error, including JAX's own frames."
  )
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0 in a job of several processes.")
  flags.DEFINE_integer("processes", 0, "Number of processes of the job.", 0)
  flags.DEFINE_integer("process_id", -1, "Number of this process.", -1)


def define_compilation_cache() -> None:
  """Defines --compilation_cache, also for commands without the flags of a run."""
  text = "Folder for compiled programs; empty: the user's cache; 'off': none."
  flags.DEFINE_string("compilation_cache", "", text)


def define_import() -> None:
  """Defines --import, for every command that builds objects from specs."""
  text = "Module, .py file or package folder that registers names of your own; may be repeated."
  flags.DEFINE_multi_string("import", [], text)


def launch(
  main: Callable[[list[str]], Any], doc: str | None, argv: list[str] | None = None
) -> None:
  """Parses the flags and calls a command's main function, as absl does.

  Args:
    main: the main function; its argument is a list that contains the program's name.
    doc: the text that --help prints before the flags.
    argv: the command line; None means the command line of this process.
  """
  try:
    app.run(main, argv, flags_parser=lambda argv: parse_flags(argv, doc))
  except KeyboardInterrupt:
    interrupted()


def parse_flags(argv: list[str], doc: str | None = None) -> list[str]:
  """Parses the command line; if a flag is invalid, prints an error line and exits with code 2.

  Args:
    argv: the command line, including the program's name.
    doc: the text that --help prints before the flags.
  """
  streams.prepare()
  if {"--help", "-help", "-h"} & set(argv[1:]):
    ours = [name for name in FLAGS.flags_by_module_dict() if not name.startswith("absl.")]
    print(doc, *map(FLAGS.module_help, ours), sep="\n")
    sys.exit(0)
  try:
    rest = FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    near = checks.nearest(error.flagname, FLAGS)
    hint = f"did you mean '--{near}'?" if near else "--help lists them all"
    fail(2, f"--{shortened(error.flagname)}: unknown flag; {hint}")
  except UnicodeDecodeError as error:
    fail(2, f"--flagfile: not a text in {error.encoding}; save it in UTF-8: {error}")
  except (flags.Error, ValueError, RecursionError) as error:
    fail(2, str(error).removeprefix("ERROR:: ").removeprefix("flag "))
  if len(rest) > 1:
    fail(2, f"unexpected argument {quoted(rest[1])}; flags are written --name=value")
  return rest


def batch_size(text: str) -> int | str:
  """Parses a value of --batch_size, a positive integer or 'all'."""
  size = whole_number(text)
  if text != "all" and not 0 < (size or 0) < 2**31:
    near = checks.nearest(text, ["all"])
    hint = f"; did you mean '{near}'?" if near else ""
    legal = "neither a whole number in [1, 2^31) nor 'all'"
    fail(2, f"--batch_size={quoted(text)}: {legal}{hint}")
  return size or text


def config_of_flags() -> Config:
  """Returns the configuration of the run that the flags describe."""
  config = Config(**{name: getattr(FLAGS, name) for name in Config.names()})
  return config.replace(batch_size=batch_size(FLAGS.batch_size))
