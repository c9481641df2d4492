"""The configuration of a run: flags with their defaults, and the error for invalid ones."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from research.core import blame
from research.core.spec import parse
from research.core.text import quoted


class UsageError(ValueError):
  """An invalid flag: one line with the flag, its value, the legal set, and the closest match."""


def option(default: Any, text: str, least: float | None = None) -> Any:
  """Declares a field of `Config`.

  Args:
    default: its default.
    text: its description in --help.
    least: its smallest legal value, if any.
  """
  return dataclasses.field(default=default, metadata={"text": text, "least": least})


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run: numbers, switches and specs. Its fields are the command's flags.

  `assemble` resolves it to a Problem of objects. If a Python program passes objects, the fields for
  their specs hold only labels.
  """

  task: str = option(
    "digits()",
    "What to learn: digits(), mnist(), least_squares(...), libsvm('a9a'), tinyshakespeare(), "
    "text('PATH'), stream('PATH'); search: pagerank(), rank(), bm25(), cranfield(); finance: "
    "frontier('port1'), cvar(); medicine: breast_cancer(), diabetes(); recommendation: "
    "movielens(), movielens_als(), movielens_federated(); molecules: molecules('tox21').",
  )
  model: str = option(
    "", "linear(), logistic(), mlp(hidden=[128]), cnn(), resnet(); empty: the task's own."
  )
  method: str = option(
    "data_parallel(sgd(0.1, momentum=0.9), mean())",
    "How to optimize: data_parallel(OPTIMIZER, AGGREGATOR, period=1) or averaged(METHOD); "
    "optimizers and schedules are optax's, by name.",
  )
  executor: str = option(
    "simulate",
    "How workers run: simulate (vmap), spmd (shard_map), pmap, or server (processes that push"
    " to a parameter server, on Ray).",
  )
  mesh: str = option(
    "data:8",
    "Sizes by axis: data (workers), slice (groups of workers); within a worker stage, fsdp, "
    "expert, seq, model.",
  )
  zero: int = option(
    3, "What is sharded along fsdp: 1 optimizer state, 2 gradients too, 3 parameters too.", 1
  )
  population: int = option(
    0, "Clients, from which each round samples one per worker of --mesh; 0: all.", 0
  )
  sampling_rate: float = option(
    0.0,
    "Each client of the population takes part in a round with this probability, on one of the"
    " mesh's workers; 0: each worker samples one of its own clients.",
    0.0,
  )
  dropout: float = option(0.0, "Probability that a worker's round is lost before it is sent.", 0.0)
  clock: str = option(
    "", "Virtual time of workers that differ in speed, such as exponential(1.0); empty: none."
  )
  partition: str = option(
    "iid()",
    "Examples by worker: iid(), in_order(), sorted(), dirichlet(0.3), shards(2), by_scaffold().",
  )
  batch_size: int | str = option(256, "Examples per step over all workers, or 'all'.")
  steps: int = option(400, "Local steps.", 1)
  epochs: float = option(
    0.0, "Passes over the training data, in place of --steps if positive.", 0.0
  )
  rounds: int = option(
    0, "Rounds of local steps and one exchange, in place of --steps if positive.", 0
  )
  virtual_seconds: float = option(
    0.0, "Runs this long on --clock, in place of --steps if positive.", 0.0
  )
  seed: int = option(
    0, "Seeds the initial model, the order of examples and the method's randomness.", 0
  )
  clip_norm: float = option(
    0.0, "Clips each worker's mini-batch gradients to this norm; 0: no.", 0.0
  )
  tolerance: float = option(
    0.0, "Stops when an evaluation finds the full gradient's norm below it; 0: no.", 0.0
  )
  delta: float = option(
    1e-05, "Delta of the (epsilon, delta) differential privacy that `noisy` spends.", 0.0
  )
  local_phase: str = option(
    "auto",
    "How `simulate` runs the workers' local steps: vmap, map (one after the other), or auto: "
    "whichever is faster.",
  )
  steps_per_dispatch: int = option(
    100, "Maximum number of steps between two visits of the host.", 1
  )
  log_every: int = option(10, "Steps per row of metrics.jsonl.", 1)
  eval_every: int = option(50, "Steps between evaluations; 0: only at the end.", 0)
  checkpoint_every: int = option(100, "Steps between checkpoints; 0: only at the end.", 0)
  checkpoint_seconds: float = option(1.0, "Minimum seconds between two checkpoints.", 0.0)
  check_every: int = option(
    100, "Steps between comparisons of the devices' copies; 0: only at the end.", 0
  )
  out: str = option("", "Folder of the run; empty: runs/TASK-METHOD-HASH of the flags.")
  data_dir: str = option(
    "", "Folder of data files, searched before $RESEARCH_DATA_DIR and the user's cache."
  )
  x64: bool = option(
    False, "Computes in float64 where JAX's default dtype is used, as in pagerank() and frontier()."
  )
  allow_changes: bool = option(False, "Resumes a run that had different flags.")
  diagnostics: bool = option(
    False,
    "Rows have compression error, memory norm, spread of the workers' models, update norm, "
    "gradient norm and, on a clock, staleness.",
  )
  tensorboard: bool = option(False, "Also writes TensorBoard events (needs tensorboardX).")
  profile: bool = option(False, "Traces the second dispatch into OUT/profile.")
  server_mode: str = option(
    "async",
    "When a server updates: async (on each push), ssp (the same, no worker more than --bound "
    "ahead), sync (one push per worker), elastic (the workers present), hogwild (shared memory, "
    "no server).",
  )
  workers: int = option(0, "Worker processes of --executor=server; 0: the workers of --mesh.", 0)
  shards: int = option(1, "Server processes, each with some of the model's leaves.", 1)
  bound: int = option(
    2, "For --server_mode=ssp: updates between the fastest worker and the slowest.", 0
  )
  round_seconds: float = option(
    1.0, "For --server_mode=elastic: duration of a round's local steps.", 0.0
  )
  overlap: bool = option(
    True, "A server's workers compute while their last push is in flight (async, ssp)."
  )
  slowdown: str = option(
    "", "How many times longer a server's workers take, by number: {0: 4}; for studies."
  )
  restarts: int = option(
    100, "Maximum number of process restarts in a run of --executor=server.", 0
  )
  ray_address: str = option(
    "", "Address of a running Ray cluster; empty: starts one in this process."
  )
  node_ip: str = option(
    "127.0.0.1",
    "Address on which a newly started Ray listens; beyond the loopback only if set here.",
  )

  @classmethod
  def names(cls) -> list[str]:
    """The names of all fields, in order."""
    return [field.name for field in dataclasses.fields(cls)]

  @classmethod
  def defaults(cls) -> dict[str, Any]:
    """The default of each field, by name."""
    return {field.name: field.default for field in dataclasses.fields(cls)}

  def replace(self, **changes: Any) -> "Config":
    """Returns a copy with other values of some fields."""
    return dataclasses.replace(self, **changes)

  def as_dict(self) -> dict[str, Any]:
    """The values of all fields, by name."""
    return dataclasses.asdict(self)

  def named(self) -> dict[str, Any]:
    """The fields that identify a result, by name."""
    return {name: getattr(self, name) for name in NAMED}


def called(spec: str) -> str:
  """Returns the name that a spec calls; "" if the text is not a spec, such as an object's label.

  Args:
    spec: any text.
  """
  try:
    return parse(spec).name
  except ValueError:
    return ""


NAMED = ("task", "model", "method", "executor", "mesh", "seed")
# Flags of --executor=server only; others ignore them.
OF_SERVER = ("server_mode", "workers", "shards", "bound", "round_seconds", "overlap", "slowdown")


@contextlib.contextmanager
def flag(name: str, value: Any) -> Iterator[None]:
  """Context that turns an error about an invalid value into a UsageError that names the flag.

  Errors in a user's code are not changed; see `blame`.

  Args:
    name: the flag.
    value: its value.

  Raises:
    UsageError: one line.
  """
  try:
    yield
  except UsageError:
    raise
  except (ValueError, OSError, OverflowError, MemoryError) as error:
    if not blame.is_refusal(error):
      raise
    reason = str(error) or "too large for this machine's memory"
    raise UsageError(f"--{name}={quoted(value)}: {reason}") from error
