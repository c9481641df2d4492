"""The flags of a run: one per field of `Config`, and how a command line is read."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from research.command.errors import fail
from research.core import checks, streams
from research.core.text import quoted, shortened, whole_number
from research.training.config import Config

FLAGS = flags.FLAGS

TEXTS = {
  "task": "What to learn: digits(), mnist(), least_squares(...), libsvm('a9a'), tinyshakespeare(), "
  "text('PATH'), stream('PATH'); search: pagerank(), rank(), bm25(), cranfield(); finance: "
  "frontier('port1'), cvar(); medicine: breast_cancer(), diabetes(); recommendation: movielens(), "
  "movielens_als(), movielens_federated().",
  "model": "linear(), logistic(), mlp(hidden=[128]), cnn(), resnet(); empty: the task's own.",
  "method": "How to optimize: data_parallel(OPTIMIZER, AGGREGATOR, period=1) or averaged(METHOD); "
  "optimizers and schedules are optax's, by name.",
  "executor": "How workers run: simulate (vmap), spmd (shard_map), pmap, or server (processes that "
  "push to a parameter server, on Ray).",
  "mesh": "Sizes by axis: data (workers), slice (groups of workers); within a worker stage, fsdp, "
  "expert, seq, model.",
  "partition": "Examples by worker: iid(), in_order(), sorted(), dirichlet(0.3), shards(2).",
  "batch_size": "Examples per step over all workers, or 'all'.",
  "clock": "Virtual time of workers that differ in speed, such as exponential(1.0); empty: none.",
  "local_phase": "How `simulate` runs the workers' local steps: vmap, map (one after the other), "
  "or auto: whichever is faster.",
  "server_mode": "When a server updates: async (on each push), ssp (the same, no worker more than "
  "--bound ahead), sync (one push per worker), elastic (whoever is there), hogwild (shared memory, "
  "no server).",
  "slowdown": "How many times longer a server's workers take, by number: {0: 4}; for studies.",
  "ray_address": "Address of a running Ray cluster; empty: starts one in this process.",
  "node_ip": "Address on which a newly started Ray listens; beyond the loopback only if set here.",
  "out": "Folder of the run; empty: runs/TASK-METHOD-HASH of the flags.",
  "data_dir": "Folder of data files, searched before $RESEARCH_DATA_DIR and the user's cache.",
}
# name -> (text, least)
NUMBERS = {
  "zero": ("What is sharded along fsdp: 1 optimizer state, 2 gradients too, 3 parameters too.", 1),
  "population": ("Clients, from which each round samples one per worker of --mesh; 0: all.", 0),
  "sampling_rate": (
    "Each client of the population takes part in a round with this probability, on one of the "
    "mesh's workers; 0: each worker samples one of its own clients.",
    0.0,
  ),
  "dropout": ("Probability that a worker's round is lost before it is sent.", 0.0),
  "steps": ("Local steps.", 1),
  "rounds": ("Rounds of local steps and one exchange, in place of --steps if positive.", 0),
  "epochs": ("Passes over the training data, in place of --steps if positive.", 0.0),
  "seed": ("Of the initial model, the order of examples and the method's randomness.", 0),
  "clip_norm": ("Clips each worker's mini-batch gradients to this norm; 0: no.", 0.0),
  "tolerance": ("Stops when an evaluation finds the full gradient's norm below it; 0: no.", 0.0),
  "delta": ("Of the (epsilon, delta) of differential privacy that `noisy` spends.", 0.0),
  "virtual_seconds": ("Runs this long on --clock, in place of --steps if positive.", 0.0),
  "steps_per_dispatch": ("At most this many steps run before the host looks again.", 1),
  "log_every": ("Steps per row of metrics.jsonl.", 1),
  "eval_every": ("Steps between evaluations; 0: only at the end.", 0),
  "checkpoint_every": ("Steps between checkpoints; 0: only at the end.", 0),
  "checkpoint_seconds": ("Least seconds between two checkpoints.", 0.0),
  "workers": ("Worker processes of --executor=server; 0: as many as --mesh says.", 0),
  "shards": ("Server processes, each with some of the model's leaves.", 1),
  "bound": ("For --server_mode=ssp: updates between the fastest worker and the slowest.", 0),
  "round_seconds": ("For --server_mode=elastic: duration of a round's local steps.", 0.0),
  "restarts": ("Processes of --executor=server that may die and are started again.", 0),
  "check_every": ("Steps between comparisons of the devices' copies; 0: only at the end.", 0),
}
SWITCHES = {
  "overlap": "A server's workers compute while their last push is on the way (async, ssp).",
  "x64": "Computes in float64 what is at JAX's default, such as pagerank() and frontier().",
  "allow_changes": "Goes on with a run whose flags were different.",
  "diagnostics": "Rows have compression error, memory norm, spread of the workers' models, update "
  "norm, gradient norm and, on a clock, staleness.",
  "tensorboard": "Writes TensorBoard events too (needs tensorboardX).",
  "profile": "Traces the second dispatch into OUT/profile.",
}


def define_flags() -> None:
  """Defines one flag per field of `Config`, with its default, and those beside the run itself."""
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
  define_compilation_cache()
  define_import()
  flags.DEFINE_bool("debug", False, "Shows the traceback of every error, JAX's own frames too.")
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where several make one job.")
  flags.DEFINE_integer("processes", 0, "Number of processes that make the job.", 0)
  flags.DEFINE_integer("process_id", -1, "This process's number.", -1)


def define_compilation_cache() -> None:
  """Defines --compilation_cache, which commands without the flags of a run take too."""
  text = "Folder of compiled programs; empty: in the user's cache; 'off': none."
  flags.DEFINE_string("compilation_cache", "", text)


def define_import() -> None:
  """Defines --import, which every command takes that builds objects from specs."""
  text = "Module, .py file or package folder that registers names of your own; repeatable."
  flags.DEFINE_multi_string("import", [], text)


def launch(
  main: Callable[[list[str]], Any], doc: str | None, argv: list[str] | None = None
) -> None:
  """Reads the flags and calls a command's main function, as absl does.

  Args:
    main: is given the program's name alone.
    doc: what --help prints before the flags.
    argv: the command line; None: this process's.
  """
  app.run(main, argv, flags_parser=lambda argv: parse_flags(argv, doc))


def parse_flags(argv: list[str], doc: str | None = None) -> list[str]:
  """Reads the command line; a wrong flag ends the program with one line and exit code 2."""
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
  """The value of --batch_size: a positive whole number or 'all'."""
  size = whole_number(text)
  if text != "all" and not 0 < (size or 0) < 2**31:
    near = checks.nearest(text, ["all"])
    hint = f"; did you mean '{near}'?" if near else ""
    legal = "neither a whole number in [1, 2^31) nor 'all'"
    fail(2, f"--batch_size={quoted(text)}: {legal}{hint}")
  return size or text


def config_of_flags() -> Config:
  """The run that the flags describe."""
  config = Config._make(getattr(FLAGS, name) for name in Config._fields)
  return config._replace(batch_size=batch_size(FLAGS.batch_size))
