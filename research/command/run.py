"""Trains a model with a method on a task.

    python experiments/run.py --task="digits()" --method="data_parallel(adam(1e-3), mean())"

If the package is installed, `distopt` is the same command. Run a command again to resume the run,
or to see the result of a complete run. --replay=FOLDER recomputes a run of --executor=server from
its trace. Exit codes: 0: done, or saved after SIGTERM; 1: replicas differ; 2: a flag is invalid; 3:
no checkpoint is readable; 4: a value is not finite; 5: the disk is full; 130: saved after Ctrl-C;
143: terminated before the run had anything to save.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from research.command.errors import exit_if_stopped, one_line_errors
from research.command.flags import config_of_flags, define_flags, launch
from research.command.start import results_folder, start
from research.core import paths
from research.training.config import Config, UsageError, flag

FLAGS = flags.FLAGS


def run() -> None:
  """Defines the flags and runs the command."""
  define_flags()
  text = "Prints the sharding of each leaf of the state and exits; the devices need not exist."
  flags.DEFINE_bool("explain_sharding", False, text)
  text = "Folder of a run with --executor=server that is recomputed from its trace."
  flags.DEFINE_string("replay", "", text)
  launch(main, __doc__)


def main(argv: list[str]) -> None:
  """Trains, replays or explains a run, according to the flags.

  Args:
    argv: unused.
  """
  del argv
  if FLAGS.explain_sharding:
    explain_sharding()
  with one_line_errors():
    config = start()
    import jax

    from research.comm import join
    from research.training import folder as folders
    from research.training.reports import report

    if FLAGS.replay:
      replay(config)
    with contextlib.suppress(ValueError):  # the code below reports errors in the flags
      folders.note_missing_modules(folders.place(config))
    summary, folder = trainer(config)(config)
    if jax.process_index() == 0:
      print(report.closing_table(summary, folder), flush=True)
    join.end_together()
  exit_if_stopped(summary)


def trainer(config: Config) -> Callable[[Config], tuple[dict[str, Any], Path]]:
  """Returns the function that trains a run, with either the training loop or a parameter server.

  Args:
    config: the configuration of the run.
  """
  if config.executor == "server":
    from research.server import driver

    return driver.train
  from research.training import loop

  return loop.train


def explain_sharding() -> NoReturn:
  """Prints the sharding of each leaf of the run's state, and exits."""
  with one_line_errors():
    from research.training.reports import explain

    explain.imitate_devices(config_of_flags())
    print(explain.explanation(start()), flush=True)
  sys.exit(0)


def replay(config: Config) -> NoReturn:
  """Recomputes a parameter server's run from its trace, compares the parameters, and exits.

  Args:
    config: the configuration from the flags, including --out.
  """
  from research.server import replay
  from research.training import folder as folders
  from research.training import loop

  if config.executor == "server":
    raise UsageError("--replay: is simulated; leave out --executor=server")
  with flag("replay", FLAGS.replay):
    folder = paths.local(FLAGS.replay)
  folders.note_missing_modules(folder)
  out = results_folder("out", config.out) if config.out else None
  replayed = replay.replay(folder, out)
  print(replay.table(replayed), flush=True)
  if not replayed["distance"] <= replay.TOLERANCE:
    raise loop.ReplicasDiffer(f"the parameters differ by {replayed['distance']:.3g} of the largest")
  sys.exit(0)
