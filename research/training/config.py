"""The configuration of a run: flags with their defaults, and the error for invalid ones."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from research.core import blame
from research.core.spec import parse
from research.core.text import quoted


class UsageError(ValueError):
  """An invalid flag; the message gives its name, its value, the legal set and the closest match."""


def option(default: Any, text: str, least: float | None = None) -> Any:
  """Declares a field of `Config`.

  Args:
    default: the default value.
    text: the description in --help.
    least: the smallest legal value; None means that there is no bound.
  """
  return dataclasses.field(default=default, metadata={"text": text, "least": least})


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run: numbers, switches and specs. The fields are the command's flags.

  `assemble` resolves a configuration to a Problem of objects. If a Python program passes objects
  instead of specs, the corresponding fields contain only labels.
  """

  task: str = option(
    "digits()",
    "Data and objective: digits(), mnist(), least_squares(...), libsvm('a9a'), tinyshakespeare(), "
    "text('PATH'), stream('PATH'); search: pagerank(), rank(), bm25(), cranfield(); finance: "
    "frontier('port1'), cvar(); medicine: breast_cancer(), diabetes(); recommendation: "
    "movielens(), movielens_als(), movielens_federated(), movielens_implicit(), "
    "movielens_implicit_federated(), movielens_bpr(); molecules: molecules('tox21').",
  )
  model: str = option(
    "", "linear(), logistic(), mlp(hidden=[128]), cnn(), resnet(); empty: the task's own."
  )
  method: str = option(
    "data_parallel(sgd(0.1, momentum=0.9), mean())",
    "Algorithm: data_parallel(OPTIMIZER, AGGREGATOR, period=1) or averaged(METHOD); "
    "optimizers and schedules are optax's, by name.",
  )
  executor: str = option(
    "simulate",
    "Executor of the workers: simulate (vmap), spmd (shard_map), pmap, overlapped (spmd, with "
    "exchanges on devices of their own), or server (processes that push to a parameter server, on "
    "Ray).",
  )
  mesh: str = option(
    "data:8",
    "Sizes by axis: data (workers), slice (groups of workers) and, within a worker, stage, fsdp, "
    "expert, seq, model.",
  )
  zero: int = option(
    3, "What is sharded along fsdp: 1 optimizer state, 2 gradients too, 3 parameters too.", 1
  )
  population: int = option(
    0, "Number of clients; each round samples one per worker of --mesh; 0: a client per worker.", 0
  )
  sampling_rate: float = option(
    0.0,
    "Each client of the population takes part in a round with this probability, on one of the"
    " mesh's workers; 0: each worker samples one of its own clients.",
    0.0,
  )
  dropout: float = option(
    0.0, "Probability that a worker drops out of a round before it sends.", 0.0
  )
  clock: str = option(
    "", "Speeds of the workers on a virtual clock, such as exponential(1.0); empty: no clock."
  )
  network: str = option(
    "",
    "Network between the workers of --clock, such as internet(churn=on_off(3600, 600)); empty: "
    "exchanges take no virtual time.",
  )
  partition: str = option(
    "iid()",
    "Examples by worker: iid(), in_order(), sorted(), dirichlet(0.3), shards(2), by_scaffold().",
  )
  batch_size: int | str = option(256, "Examples per step over all workers, or 'all'.")
  steps: int = option(400, "Number of local steps.", 1)
  epochs: float = option(
    0.0, "Passes over the training data, in place of --steps if positive.", 0.0
  )
  rounds: int = option(0, "Number of rounds, in place of --steps if positive.", 0)
  virtual_seconds: float = option(
    0.0, "Duration of the run on --clock, in place of --steps if positive.", 0.0
  )
  seed: int = option(
    0, "Seeds the initial model, the order of examples and the method's randomness.", 0
  )
  clip_norm: float = option(
    0.0, "Norm to which each worker's mini-batch gradients are clipped; 0: no clipping.", 0.0
  )
  tolerance: float = option(
    0.0,
    "Stops when the norm of the full gradient is below this value at an evaluation; 0: never.",
    0.0,
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
    100, "Maximum number of steps that the devices run without the host.", 1
  )
  log_every: int = option(10, "Steps per row of metrics.jsonl.", 1)
  eval_every: int = option(50, "Steps between evaluations; 0: only at the end.", 0)
  checkpoint_every: int = option(100, "Steps between checkpoints; 0: only at the end.", 0)
  checkpoint_seconds: float = option(1.0, "Minimum seconds between two checkpoints.", 0.0)
  check_every: int = option(
    100, "Steps between comparisons of replicated state across devices; 0: only at the end.", 0
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
    "Adds to rows: compression error, memory norm, spread of the workers' models, update norm, "
    "gradient norm and, on a clock, staleness.",
  )
  tensorboard: bool = option(False, "Also writes TensorBoard events (needs tensorboardX).")
  profile: bool = option(False, "Traces the second dispatch into OUT/profile.")
  server_mode: str = option(
    "async",
    "When a server updates: async (on each push), ssp (on each push; a worker waits if it is more "
    "than --bound ahead), sync (after one push per worker), elastic (after a fixed time), hogwild "
    "(no server, shared memory).",
  )
  workers: int = option(0, "Number of worker processes of --executor=server; 0: as in --mesh.", 0)
  shards: int = option(1, "Number of server processes, each with some of the model's leaves.", 1)
  bound: int = option(
    2, "For --server_mode=ssp: maximum lead of a worker over the slowest, in pushes.", 0
  )
  round_seconds: float = option(
    1.0, "For --server_mode=elastic: duration of a round's local steps.", 0.0
  )
  overlap: bool = option(
    True, "A server's workers compute while their last push is in flight (async, ssp)."
  )
  slowdown: str = option(
    "", "Factors by which a server's workers are slowed down, by number, such as {0: 4}."
  )
  restarts: int = option(
    100, "Maximum number of process restarts in a run of --executor=server.", 0
  )
  ray_address: str = option(
    "", "Address of a running Ray cluster; empty: starts one in this process."
  )
  node_ip: str = option(
    "127.0.0.1",
    "Address on which a newly started Ray listens; by default the loopback only.",
  )

  @classmethod
  def names(cls) -> list[str]:
    """Returns the names of all fields, in order."""
    return [field.name for field in dataclasses.fields(cls)]

  @classmethod
  def defaults(cls) -> dict[str, Any]:
    """Returns the default of each field, by name."""
    return {field.name: field.default for field in dataclasses.fields(cls)}

  def replace(self, **changes: Any) -> "Config":
    """Returns a copy in which some fields have new values."""
    return dataclasses.replace(self, **changes)

  def as_dict(self) -> dict[str, Any]:
    """Returns the values of all fields, by name."""
    return dataclasses.asdict(self)

  def named(self) -> dict[str, Any]:
    """Returns the fields that identify a result, by name."""
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
# Flags of --executor=server, which other executors ignore.
OF_SERVER = ("server_mode", "workers", "shards", "bound", "round_seconds", "overlap", "slowdown")


@contextlib.contextmanager
def flag(name: str, value: Any) -> Iterator[None]:
  """Context manager that converts an error about an invalid value to a UsageError with the flag.

  Errors in a user's code are not changed; see `blame`.

  Args:
    name: the flag.
    value: the flag's value.

  Raises:
    UsageError: if the code in the context rejects the value.
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
