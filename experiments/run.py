"""Trains a model with a method on a task: the one command.

    python experiments/run.py --task="digits()" --method="data_parallel(adam(1e-3), mean())"

Running the same command again resumes, or shows the result. Exit codes: 0 done, or saved after
SIGTERM; 1 replicas differ; 2 a flag that cannot be; 3 no checkpoint is whole; 4 not finite;
130 saved after Ctrl-C.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging

if TYPE_CHECKING:  # JAX is imported late: a wrong flag does not need it
  from research.train.assemble import Config

FLAGS = flags.FLAGS


def define_flags() -> None:
  """One flag per field of `Config`, and those that join processes."""
  string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
  string("task", "digits()", "What to learn: digits(), mnist(), least_squares(...), libsvm('a9a').")
  string(
    "model", "", "linear(), logistic(), mlp(hidden=[128]), cnn(), resnet(); empty: the task's."
  )
  string(
    "method",
    "data_parallel(sgd(0.1, momentum=0.9), mean())",
    "How to optimize: data_parallel(OPTIMIZER, AGGREGATOR, period=1) or averaged(METHOD), with any "
    "optimizer and schedule of optax by name and mean() or hierarchical_mean().",
  )
  string("executor", "simulate", "How workers run: simulate (vmap), spmd (shard_map) or pmap.")
  string("mesh", "data:8", "Places by axis: data (workers), slice (groups of workers), fsdp.")
  integer(
    "population", 0, "Clients, of which each round serves as many as there are workers; 0: all.", 0
  )
  string("partition", "iid()", "Examples by worker: iid(), sorted(), dirichlet(0.3), shards(2).")
  string("batch_size", "256", "Examples per step over all workers, or 'all'.")
  integer("steps", 400, "Local steps.", 1)
  number("epochs", 0.0, "Passes over the training data, in place of --steps if positive.", 0.0)
  integer("seed", 0, "Of the initial model, the data's order, the method's randomness.", 0)
  number(
    "clip_norm", 0.0, "Clips each worker's gradient to this norm before it is sent; 0: no.", 0.0
  )
  number(
    "tolerance", 0.0, "Stops when the full objective's gradient norm falls below it; 0: no.", 0.0
  )
  integer("steps_per_dispatch", 100, "At most so many steps run before the host looks again.", 1)
  integer("log_every", 10, "Steps per row of metrics.jsonl.", 1)
  integer("eval_every", 50, "Steps between evaluations; 0: only at the end.", 0)
  integer("checkpoint_every", 100, "Steps between checkpoints; 0: only at the end.", 0)
  number("checkpoint_seconds", 1.0, "At least so many seconds between checkpoints.", 0.0)
  integer("check_every", 100, "Steps between comparisons of the devices' copies; 0: at the end.", 0)
  string("out", "", "Folder of the run; empty: runs/TASK-METHOD-HASH of the flags.")
  string("data_dir", "", "Where data files lie, before $RESEARCH_DATA_DIR and the user's cache.")
  flags.DEFINE_bool("allow_changes", False, "Goes on with a run whose flags were different.")
  flags.DEFINE_bool("tensorboard", False, "Writes TensorBoard events too (needs tensorboardX).")
  flags.DEFINE_bool("profile", False, "Traces the second dispatch into OUT/profile.")
  string("compilation_cache", "", "Folder of compiled programs; empty: in the user's cache; 'off'.")
  string("coordinator", "", "HOST:PORT of process 0, where several processes make one job.")
  integer("processes", 0, "How many processes make the job.", 0)
  integer("process_id", -1, "This process's number.", -1)


def parse_flags(argv: list[str]) -> list[str]:
  """Reads the command line; a wrong flag ends the program with one line and exit code 2."""
  if {"--help", "-help", "-h"} & set(argv[1:]):
    program = sys.modules["__main__"]
    modules = {__name__: sys.modules[__name__], program.__name__: program}
    print(program.__doc__, *map(FLAGS.module_help, modules.values()), sep="\n")
    sys.exit(0)
  try:
    rest = FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    near = difflib.get_close_matches(error.flagname, list(FLAGS), 1)
    hint = f"did you mean '--{near[0]}'?" if near else "--help lists them all"
    fail(2, f"--{error.flagname}: unknown flag; {hint}")
  except flags.Error as error:
    fail(2, " ".join(str(error).removeprefix("flag ").split()))
  if len(rest) > 1:
    fail(2, f"unexpected argument '{rest[1]}'; flags are written --name=value")
  return rest


def fail(code: int, line: str) -> NoReturn:
  """One line on stderr, and out."""
  print(f"error: {line}", file=sys.stderr, flush=True)
  sys.exit(code)


def batch_size(text: str) -> int | str:
  """The flag's value: a positive whole number or 'all'."""
  if text != "all" and not (text.isdecimal() and int(text) > 0):
    near = difflib.get_close_matches(text, ["all"], 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    fail(2, f"--batch_size='{text}': neither a positive whole number nor 'all'{hint}")
  return text if text == "all" else int(text)


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs on disk, so that the same command starts faster the next time."""
  import jax

  if folder != "off":
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    default = cache / "distributed-optimization-jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", folder or str(default))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Turns what a run can fail with into a line on stderr and the exit code that says which."""
  from research.train import assemble, checkpoint, loop

  codes = {
    assemble.UsageError: 2,
    checkpoint.CheckpointError: 3,
    loop.NonFinite: 4,
    loop.ReplicasDiffer: 1,
  }
  try:
    yield
  except tuple(codes) as error:
    fail(codes[type(error)], str(error))


def start() -> "Config":
  """Quiet logs, the compilation cache, the other processes, and what the flags say."""
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().setLevel("CRITICAL")  # Orbax logs what it then raises
  size = batch_size(FLAGS.batch_size)
  use_compilation_cache(FLAGS.compilation_cache)
  from research.comm import mesh
  from research.train import assemble

  with assemble.flag("coordinator", FLAGS.coordinator):
    mesh.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id)
  config = assemble.Config._make(getattr(FLAGS, name) for name in assemble.Config._fields)
  return config._replace(batch_size=size)


def main(argv: list[str]) -> None:
  """The whole program: flags, processes, training, table."""
  del argv
  with one_line_errors():
    config = start()
    import jax

    from research.train import loop, report

    summary, folder = loop.train(config)
  if jax.process_index() == 0:
    print(report.closing_table(summary, folder))
  sys.exit(130 if summary["stopped_because"] == "interrupted" else 0)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=parse_flags)
