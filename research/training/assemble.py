"""Resolves a run's configuration into its parts: task, method, partition, job, executors."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.comm import mesh as meshes
from research.core import checks, registry
from research.core.method import Method
from research.core.spec import parse
from research.core.task import Batch, Executor, Task
from research.parallel.job import Job, stages
from research.sim.clock import Speeds, steady
from research.sim.network import Network, is_simulated
from research.tasks.partition import Partition
from research.training import feed, reach, sources
from research.training.config import OF_SERVER, Config, UsageError, flag
from research.training.over_network import VirtualExchanges, played_over
from research.training.plan import Plan
from research.training.virtual import Virtual, played, rounds_within

# The modules of the executors, each of which is built from a Job.
EXECUTORS = {
  "simulate": "research.parallel.simulate",
  "pmap": "research.parallel.pmap",
  "spmd": "research.parallel.spmd",
  "overlapped": "research.parallel.overlapped",
}
LEGAL = (*EXECUTORS, "server")  # the server has its own training loop

LOCAL_PHASES = ("auto", "vmap", "map")


class Problem(NamedTuple):
  """A resolved run: objects and arrays, before anything is placed on a device."""

  plan: Plan
  executors: tuple[Executor, ...]  # one per stage of the plan; states have the same structure
  examples: Batch  # numpy [P, n, ...], of `task.train`
  sizes: np.ndarray  # [P]
  test: tuple[Batch, np.ndarray] | None  # numpy [D, n, ...] and sizes [D]
  steps: int
  virtual: Virtual | None = None  # virtual time, if the run has a clock

  @property
  def job(self) -> Job:
    """The job of the first stage; the jobs of later stages differ only in their period."""
    return self.plan.jobs[0]

  @property
  def executor(self) -> Executor:
    """The executor of the first stage; all stages share data and state."""
    return self.executors[0]


class Given(NamedTuple):
  """Objects of a Python program that replace specs; None means that the spec is used."""

  task: Task | None = None
  method: Method | None = None
  partition: Partition | None = None
  speeds: Speeds | None = None  # of the virtual clock
  network: Network | None = None  # between the workers of the clock


NOTHING_GIVEN = Given()


class Setting(NamedTuple):
  """A run's configuration as objects, before data is read or devices are used."""

  axes: dict[str, int]
  method: Method
  workers: int
  owners: int
  batch_size: int | None  # examples per worker and step
  partition: Partition
  speeds: Speeds | None
  network: Network | None
  task: Task | None  # None: the task is built later from its spec, which may read files


def check(config: Config, given: Given = NOTHING_GIVEN) -> Setting:
  """Rejects invalid configurations without reading data or using devices.

  Args:
    config: the numbers, the switches, and the specs of parts that `given` does not contain.
    given: objects that replace specs.

  Returns:
    The objects built from the specs.

  Raises:
    UsageError: if a flag is invalid; the message names the flag.
  """
  if config.executor == "server":
    raise UsageError("--executor='server': is only for experiments/run.py")
  if config.executor not in EXECUTORS:
    raise UsageError(f"--executor='{config.executor}': {checks.unknown(config.executor, LEGAL)}")
  for name in OF_SERVER:
    with flag(name, getattr(config, name)):
      if getattr(config, name) != Config.defaults()[name]:
        raise ValueError("is only for --executor=server")
  check_numbers(config)
  with flag("mesh", config.mesh):
    axes = meshes.parse_mesh(config.mesh)
  with flag("zero", config.zero):
    if config.zero not in (1, 2, 3):
      raise ValueError("not 1 (shards optimizer state), 2 (gradients too) or 3 (parameters too)")
    if config.zero < 3 and ("fsdp" not in axes or config.executor != "spmd"):
      raise ValueError("needs a mesh with fsdp and --executor=spmd")
  workers = meshes.count(meshes.worker_axes(axes))
  owners = config.population or workers
  with flag("population", config.population):
    if owners < workers:
      raise ValueError(f"smaller than the cohort, the {workers} workers of --mesh='{config.mesh}'")
    if owners % workers:
      raise ValueError(f"not a multiple of the {workers} workers of --mesh='{config.mesh}'")
  with flag("sampling_rate", config.sampling_rate):
    _check_sampling(config, workers)
  with flag("dropout", config.dropout):
    if not 0 <= config.dropout < 1:
      raise ValueError("not in [0, 1)")
  with flag("delta", config.delta):
    if not 0 < config.delta < 1:
      raise ValueError("not in (0, 1)")
  with flag("local_phase", config.local_phase):
    _check_local_phase(config)
  with flag("method", config.method):
    method = given.method or registry.build("method", config.method)
  batch_size = per_worker(config, workers)
  if method.one_by_one:
    with flag("method", config.method):
      _check_one_by_one(config, axes)
    axes, owners = {"data": 1}, workers
    workers = 1
  speeds = given.speeds
  if config.clock and not speeds:
    with flag("clock", config.clock):
      speeds = registry.build("speeds", config.clock)
  network = given.network
  if config.network:
    with flag("network", config.network):
      if not network and not is_simulated(config.network):
        raise ValueError(
          "a run simulates a network such as internet(); compare.py and advise.py also take links "
          "and files of probe.py, to predict times"
        )
      network = network or registry.build("network", config.network)
      _check_network(config)
  with flag("task", config.task):
    if not given.task:
      registry.lookup(("task",), parse(config.task).name)
  with flag("partition", config.partition):
    partition = given.partition or registry.build("partition", config.partition)
  if config.model and not given.task:
    with flag("model", config.model):
      registry.build("model", config.model)
  task = given.task
  return Setting(axes, method, workers, owners, batch_size, partition, speeds, network, task)


def check_numbers(config: Config) -> None:
  """Rejects numbers that are invalid for every executor.

  Args:
    config: the run.

  Raises:
    UsageError: if a flag is invalid; the message names the flag.
  """
  for name in ("epochs", "clip_norm", "tolerance", "checkpoint_seconds", "virtual_seconds"):
    with flag(name, getattr(config, name)):
      if not math.isfinite(getattr(config, name)):
        raise ValueError("not a finite number")
  if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
    raise UsageError('--tensorboard: needs tensorboardX: pip install -e ".[tensorboard]"')


def per_worker(config: Config, workers: int) -> int | None:
  """Returns the number of examples per worker and step; None for all of a worker's examples.

  Args:
    config: the run.
    workers: number of workers.

  Raises:
    UsageError: if the batch size is not a multiple of the number of workers.
  """
  if config.batch_size == "all":
    return None
  size = int(config.batch_size)
  with flag("batch_size", size):
    if size % workers:
      below, above = size // workers * workers, -(-size // workers) * workers
      nearest = f"{below} and {above}" if below else f"{above}"
      raise ValueError(f"does not divide among {workers} workers; nearest: {nearest}, or 'all'")
  return size // workers


def _check_one_by_one(config: Config, axes: dict[str, int]) -> None:
  if config.executor != "simulate" or config.population or set(axes) != {"data"}:
    raise ValueError(
      "serves the workers of a mesh such as data:8 one by one, with --executor=simulate and "
      "without --population"
    )


def _check_network(config: Config) -> None:
  if not config.clock:
    raise ValueError("needs --clock, the time of a local step, such as steady(1.0)")
  if config.executor != "simulate" or config.population:
    raise ValueError("needs --executor=simulate, and cannot be combined with --population")


def _check_local_phase(config: Config) -> None:
  if config.local_phase not in LOCAL_PHASES:
    raise ValueError(f"unknown; legal: {', '.join(LOCAL_PHASES)}")
  if config.local_phase != "auto" and config.executor != "simulate":
    raise ValueError("applies only to --executor=simulate; elsewhere every worker has a device")


def _check_sampling(config: Config, workers: int) -> None:
  rate, population = config.sampling_rate, config.population
  if not 0 <= rate <= 1:
    raise ValueError("not in [0, 1]")
  if not rate:
    return
  if rate < 2.0**-64:
    raise ValueError(f"below {2.0**-64:.2g}, the smallest rate that can be drawn exactly")
  if not population or config.executor != "simulate":
    raise ValueError("needs --population and --executor=simulate")
  expected = rate * population
  most = min(population, math.ceil(expected + 6 * math.sqrt(expected * (1 - rate)) + 6))
  if workers < most:
    raise ValueError(
      f"on average {expected:.0f} of {population} clients take part, and rarely up to {most}; "
      f"--mesh='{config.mesh}' has room for {workers}"
    )


def assemble(config: Config, setting: Setting, devices: Sequence[Any] | None = None) -> Problem:
  """Builds every part of a run, and checks that the parts fit together.

  Args:
    config: the numbers and switches of the run.
    setting: the result of `check`.
    devices: the devices for which `spmd` compiles, possibly of another machine; None means this
      machine's devices.

  Raises:
    UsageError: if a flag is invalid; the message names the flag.
  """
  axes, method, _, owners, batch_size, partition, speeds, network, _ = setting
  task = setting.task or sources.task_of(config)
  if task.feed:
    feed.check(config, method)
  count = sources.count(task.train)
  with flag("population" if config.population else "mesh", config.population or config.mesh):
    if owners > count:
      raise ValueError(f"{owners} workers for {count} examples: each needs at least one")
  examples, sizes = sources.partitioned(config, task, owners, partition)
  total = task.feed.examples if task.feed else int(sizes.sum())
  with flag("batch_size", config.batch_size):
    if config.batch_size != "all" and int(config.batch_size) > total:
      raise ValueError(f"the task has {total} training examples; 'all' takes them all")
  job = Job(
    method,
    task,
    axes,
    feed.buffers(config, method, owners, batch_size) if task.feed and batch_size else sizes,
    batch_size,
    config.clip_norm,
    config.sampling_rate,
    config.dropout,
    zero=config.zero,
    local_phase=config.local_phase,
    diagnostics=config.log_every if config.diagnostics else 0,
    devices=devices,
  )
  with flag("method", config.method):
    plan, virtual = Plan(stages(job)), None
  if network and speeds:
    with flag("network", config.network):
      virtual = played_over(network, speeds, plan, owners, config.seed)
  elif speeds or method.one_by_one:
    with flag("clock", config.clock):
      virtual = played(speeds or steady(1.0), plan, owners, config.seed)
  steps = _steps(config, total, plan, virtual)
  with flag("steps", steps):
    played_out = virtual and virtual(round(plan.rounds(steps)))
  if played_out and played_out.order is not None:
    plan = Plan(stages(job._replace(order=played_out.order)))
  if isinstance(played_out, VirtualExchanges) and played_out.present is not None:
    plan = Plan(stages(job._replace(present=played_out.present)))
  module = importlib.import_module(EXECUTORS[config.executor])
  if config.executor == "overlapped":
    with flag("executor", config.executor):
      module.check(plan.jobs[0])
  with flag("mesh", config.mesh):
    executor = getattr(module, config.executor)
    executors = tuple(executor(job) for job in plan.jobs)
  with flag("method", config.method):
    reach.check(executors[0].layout.state_shapes, task.dimensions)
  return Problem(plan, executors, examples, sizes, sources.test_of(job, config), steps, played_out)


def _steps(
  config: Config, examples: int, plan: Plan, virtual: Callable[[int], Virtual] | None
) -> int:
  """Returns the number of local steps of the run, which is a whole number of rounds."""
  if config.virtual_seconds:
    with flag("virtual_seconds", config.virtual_seconds):
      if not virtual or config.rounds or config.epochs:
        raise ValueError("needs --clock, and cannot be combined with --rounds or --epochs")
      return plan.steps(rounds_within(virtual, config.virtual_seconds))
  if config.rounds:
    with flag("rounds", config.rounds):
      if config.epochs:
        raise ValueError("cannot be combined with --epochs")
    return plan.steps(config.rounds)
  if not config.epochs:
    with flag("steps", config.steps):
      if plan.end(config.steps) != config.steps:
        period = plan.jobs[plan.stage(config.steps)].method.local_steps
        raise ValueError(
          f"does not end with a round of {period} steps; nearest: {plan.end(config.steps)}, "
          "or use --rounds"
        )
    return config.steps
  size = examples if config.batch_size == "all" else int(config.batch_size)
  with flag("epochs", config.epochs):
    steps = round(config.epochs * examples / size)
    if steps < 1:
      raise ValueError(f"less than one step of {size} examples; an epoch has {examples}")
  return plan.end(steps)
