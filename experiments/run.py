"""Trains a model with a method on a task: the one command.

    python experiments/run.py --task="digits()" --method="data_parallel(adam(1e-3), mean())"

Running the same command again resumes, or shows the result. --replay=FOLDER computes a run of
--executor=server again from its trace. Exit codes: 0 done, or saved after
SIGTERM; 1 replicas differ; 2 a flag that cannot be; 3 no checkpoint is whole; 4 not finite; 5 the
disk is full; 130 saved after Ctrl-C; 143 terminated before there was anything to save.
"""

import contextlib
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from research.core import blame, paths, streams
from research.core.text import one_line, quoted, shortened, whole_number
from research.training import environment
from research.training.config import Config, UsageError, flag

FLAGS = flags.FLAGS


TEXTS = {
  "task": "What to learn: digits(), mnist(), least_squares(...), libsvm('a9a'), tinyshakespeare(), "
  "text('PATH'), stream('PATH'); search: pagerank(), rank(), bm25(), cranfield(); finance: "
  "frontier('port1'), cvar(); medicine: breast_cancer(), diabetes(); recommending: movielens(), "
  "movielens_als(), movielens_federated().",
  "model": "linear(), logistic(), mlp(hidden=[128]), cnn(), resnet(); empty: the task's own.",
  "method": "How to optimize: data_parallel(OPTIMIZER, AGGREGATOR, period=1) or averaged(METHOD); "
  "optimizers and schedules are optax's, by name.",
  "executor": "How workers run: simulate (vmap), spmd (shard_map), pmap, or server (processes that "
  "push to a parameter server, on Ray).",
  "mesh": "Places by axis: data (workers), slice (groups of workers), within a worker stage, fsdp, "
  "expert, seq, model.",
  "partition": "Examples by worker: iid(), in_order(), sorted(), dirichlet(0.3), shards(2).",
  "batch_size": "Examples per step over all workers, or 'all'.",
  "clock": "Virtual time of workers that differ in speed, such as exponential(1.0); empty: none.",
  "local_phase": "How `simulate` runs what workers do alone: vmap, map (one after the other), or "
  "auto: what is faster.",
  "server_mode": "When a server makes an update: async (of each push), ssp (the same, nobody more "
  "than --bound ahead), sync (of one push per worker), elastic (of who is there), "
  "hogwild (in shared memory, no server).",
  "slowdown": "How many times longer a server's workers take, by number: {0: 4}; for studies.",
  "ray_address": "Of a Ray cluster that is there; empty: starts one in this process.",
  "node_ip": "Where a Ray that is started listens; beyond the loopback only if this says so.",
  "out": "Folder of the run; empty: runs/TASK-METHOD-HASH of the flags.",
  "data_dir": "Where data files lie, before $RESEARCH_DATA_DIR and the user's cache.",
}
# name -> (text, least)
NUMBERS = {
  "zero": ("What is cut along fsdp: 1 the optimizer's state, 2 gradients too, 3 all.", 1),
  "population": ("Clients, as many of which as there are workers are served per round; 0: all.", 0),
  "sampling_rate": (
    "Each client of the population takes part in a round with this probability, on one of the "
    "mesh's workers; 0: one client of each worker's own.",
    0.0,
  ),
  "dropout": ("A worker's round is lost with this probability before it is sent.", 0.0),
  "steps": ("Local steps.", 1),
  "rounds": ("Rounds of local steps and one exchange, in place of --steps if positive.", 0),
  "epochs": ("Passes over the training data, in place of --steps if positive.", 0.0),
  "seed": ("Of the initial model, the order of examples and the method's randomness.", 0),
  "clip_norm": ("Clips each worker's mini-batch gradients to this norm; 0: no.", 0.0),
  "tolerance": ("Stops when an evaluation finds the full gradient's norm below it; 0: no.", 0.0),
  "delta": ("Of the (epsilon, delta) of differential privacy that `noisy` spends.", 0.0),
  "virtual_seconds": ("Runs for so long on --clock, in place of --steps if positive.", 0.0),
  "steps_per_dispatch": ("At most so many steps run before the host looks again.", 1),
  "log_every": ("Steps per row of metrics.jsonl.", 1),
  "eval_every": ("Steps between evaluations; 0: only at the end.", 0),
  "checkpoint_every": ("Steps between checkpoints; 0: only at the end.", 0),
  "checkpoint_seconds": ("At least so many seconds between checkpoints.", 0.0),
  "workers": ("Worker processes of --executor=server; 0: as many as --mesh says.", 0),
  "shards": ("Server processes, each with some of the model's leaves.", 1),
  "bound": ("Of --server_mode=ssp: pieces of work between the fastest worker and the slowest.", 0),
  "round_seconds": ("Of --server_mode=elastic: how long a round's local steps go on.", 0.0),
  "restarts": ("So many processes of --executor=server may die, and are started again.", 0),
  "check_every": ("Steps between comparisons of the devices' copies; 0: only at the end.", 0),
}
SWITCHES = {
  "overlap": "A server's workers compute while their last push is on the way (async, ssp).",
  "x64": "Computes in float64 what is at JAX's default, such as pagerank() and frontier().",
  "allow_changes": "Goes on with a run whose flags were different.",
  "tensorboard": "Writes TensorBoard events too (needs tensorboardX).",
  "profile": "Traces the second dispatch into OUT/profile.",
}


def define_flags() -> None:
  """One flag per field of `Config`, with its default, and those that are not of the run itself."""
  default = Config._field_defaults
  for name, text in TEXTS.items():
    flags.DEFINE_string(name, str(default[name]), text)
  for name, (text, least) in NUMBERS.items():
    if isinstance(least, float):
      flags.DEFINE_float(name, default[name], text, least)
    else:
      flags.DEFINE_integer(name, default[name], text, least, 2**31 - 1)
  for name, text in SWITCHES.items():
    flags.DEFINE_bool(name, default[name], text)
  cache = "Folder of compiled programs; empty: in the user's cache; 'off': none."
  flags.DEFINE_string("compilation_cache", "", cache)
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where several make one job.")
  flags.DEFINE_integer("processes", 0, "How many processes make the job.", 0)
  flags.DEFINE_integer("process_id", -1, "This process's number.", -1)


def parse_flags(argv: list[str]) -> list[str]:
  """Reads the command line; a wrong flag ends the program with one line and exit code 2."""
  streams.prepare()
  if {"--help", "-help", "-h"} & set(argv[1:]):
    program = sys.modules["__main__"]
    ours = [name for name in FLAGS.flags_by_module_dict() if not name.startswith("absl.")]
    print(program.__doc__, *map(FLAGS.module_help, ours), sep="\n")
    sys.exit(0)
  try:
    rest = FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    near = difflib.get_close_matches(error.flagname, list(FLAGS), 1)
    hint = f"did you mean '--{near[0]}'?" if near else "--help lists them all"
    fail(2, f"--{shortened(error.flagname)}: unknown flag; {hint}")
  except UnicodeDecodeError as error:
    fail(2, f"--flagfile: not a text in {error.encoding}; save it in UTF-8: {error}")
  except (flags.Error, ValueError, RecursionError) as error:
    fail(2, str(error).removeprefix("ERROR:: ").removeprefix("flag "))
  if len(rest) > 1:
    fail(2, f"unexpected argument {quoted(rest[1])}; flags are written --name=value")
  return rest


def fail(code: int, line: str) -> NoReturn:
  """One line on stderr, and out."""
  print(one_line(f"error: {line}"), file=sys.stderr, flush=True)
  sys.exit(code)


def batch_size(text: str) -> int | str:
  """The flag's value: a positive whole number or 'all'."""
  size = whole_number(text)
  if text != "all" and not 0 < (size or 0) < 2**31:
    near = difflib.get_close_matches(text, ["all"], 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    legal = "neither a whole number in [1, 2^31) nor 'all'"
    fail(2, f"--batch_size={quoted(text)}: {legal}{hint}")
  return size or text


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs on disk, so that the same command starts faster the next time.

  Without a folder they are kept in the user's cache, and nowhere if there is none.

  Raises:
    UsageError: if the folder is no path.
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
  """The folder of a command's results, which can be written or made; nothing is written yet.

  Raises:
    UsageError: with the flag of that name.
  """
  with flag(name, text or default):
    return paths.writable(text or default)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Turns what a run can fail with into a line on stderr and the exit code that says which.

  A fault in a user's own code is no such thing: its traceback follows the line that names it.
  """
  before = signal.signal(signal.SIGTERM, terminated)
  try:
    environment.import_jax()
  except UsageError as error:
    fail(2, str(error))
  import jax

  from research.training import loop
  from research.training.checkpoint import checkpoint

  codes = {
    UsageError: 2,
    checkpoint.CheckpointError: 3,
    loop.NonFinite: 4,
    loop.ReplicasDiffer: 1,
  }
  try:
    yield
  except KeyboardInterrupt:
    fail(130, "interrupted before there was anything to save")
  except tuple(codes) as error:
    fail(5 if paths.is_full(error) else codes[type(error)], str(error))
  except Exception as error:  # a process of several must not stay, whatever it met
    known = foreseen(error)
    if jax.distributed.is_initialized():
      leave(error, known)
    if known:
      fail(*known)
    say_fault(error)
    raise
  finally:
    signal.signal(signal.SIGTERM, before)


def terminated(number: int, frame: Any) -> NoReturn:
  """Ends a command that is told to stop while `interrupt.watch` does not listen."""
  del frame
  os.write(2, b"error: terminated before there was anything to save\n")
  sys.exit(128 + number)


def say_fault(error: Exception) -> None:
  """One line on stderr, if a part of the user's own code failed: which one."""
  if fault := blame.fault(error):
    print(f"error: {fault}", file=sys.stderr, flush=True)


def foreseen(error: Exception) -> tuple[int, str] | None:
  """The exit code and the line of what one process may meet alone; None for a programming error."""
  import jax

  from research.training.checkpoint import checkpoint

  if isinstance(error, checkpoint.SaveError):
    return 5, str(error)
  if paths.is_full(error):
    where = getattr(error, "filename", None) or FLAGS.out or "a file of the run"
    return 5, f"the disk is full: {where}; free some space and go on"
  is_jax = isinstance(error, jax.errors.JaxRuntimeError) and any(
    words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")
  )
  too_many = isinstance(error, OverflowError) and not blame.fault(error)  # bytes for 64 bits
  if is_jax or too_many or isinstance(error, MemoryError):
    return 2, f"the model, its state or its data do not fit the memory: {str(error)[:200]}"
  return None


def leave(error: Exception, known: tuple[int, str] | None) -> NoReturn:
  """Ends one process of several: JAX would have it wait for the others, which wait for it."""
  if known:
    print(one_line(f"error: {known[1]}"), file=sys.stderr)
  else:
    say_fault(error)
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(known[0] if known else 1)


def told() -> Config:
  """What the flags say of the run."""
  config = Config._make(getattr(FLAGS, name) for name in Config._fields)
  return config._replace(batch_size=batch_size(FLAGS.batch_size))


def start() -> Config:
  """Quiet logs, the compilation cache, the other processes, and what the flags say."""
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().setLevel("CRITICAL")  # Orbax logs what it then raises
  config = told()
  use_compilation_cache(FLAGS.compilation_cache)
  from research.comm import join

  address = FLAGS.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  with flag("coordinator", address), environment.starting():
    join.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id)
  return config


def explain_sharding() -> NoReturn:
  """Prints where the leaves of the run's state would lie, and ends."""
  with one_line_errors():
    from research.training.reports import explain

    explain.imitate_devices(told())
    print(explain.explanation(start()), flush=True)
  sys.exit(0)


def trainer(config: Config) -> Callable[[Config], tuple[dict[str, Any], Path]]:
  """What trains by these flags: the loop, or a server."""
  if config.executor == "server":
    from research.server import driver

    return driver.train
  from research.training import loop

  return loop.train


def replay(config: Config) -> NoReturn:
  """Computes a server's run again from its trace, and holds the parameters against each other."""
  from research.server import replay
  from research.training import loop

  if config.executor == "server":
    raise UsageError("--replay: is simulated; leave out --executor=server")
  with flag("replay", FLAGS.replay):
    folder = paths.local(FLAGS.replay)
  out = results_folder("out", config.out) if config.out else None
  found = replay.replay(folder, out)
  print(replay.table(found), flush=True)
  if not found["distance"] <= replay.TOLERANCE:
    raise loop.ReplicasDiffer(f"the parameters differ by {found['distance']:.3g} of the largest")
  sys.exit(0)


def main(argv: list[str]) -> None:
  """The whole program: flags, processes, training, table."""
  del argv
  if FLAGS.explain_sharding:
    explain_sharding()
  with one_line_errors():
    config = start()
    import jax

    from research.training.reports import report

    if FLAGS.replay:
      replay(config)
    summary, folder = trainer(config)(config)
    if jax.process_index() == 0:
      print(report.closing_table(summary, folder), flush=True)
  sys.exit(130 if summary["stopped_because"] == "interrupted" else 0)


if __name__ == "__main__":
  define_flags()
  text = "Prints where each leaf of the run's state would lie, and ends; needs no such devices."
  flags.DEFINE_bool("explain_sharding", False, text)
  text = "Folder of a run with --executor=server, to be computed again from its trace."
  flags.DEFINE_string("replay", "", text)
  app.run(main, flags_parser=parse_flags)
