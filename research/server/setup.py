"""Builds the parts of a server run from its flags, identically in each of its processes."""

import functools
import hashlib
import importlib.util
import ipaddress
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.comm import mesh as meshes
from research.core import checks, plugins, registry, spec
from research.core.base import Params
from research.core.method import Method
from research.core.task import Batch
from research.methods._steps import LocalStepping
from research.methods.data_parallel import DataParallel
from research.optim import fitting
from research.parallel.job import Job
from research.server import work
from research.server.halves import Halves, halves
from research.server.messages import MODES as OF_SERVERS
from research.server.messages import Rules
from research.training import assemble, reach, sources
from research.training.config import Config, UsageError, flag

MODES = (*OF_SERVERS, "hogwild")
# Flags of other executors, which a server run rejects.
_ELSEWHERE = ("population", "sampling_rate", "dropout", "clock", "network", "virtual_seconds")
_ELSEWHERE = (*_ELSEWHERE, "zero", "local_phase", "diagnostics", "profile", "x64")


class Setup(NamedTuple):
  """The parts of a run, before arrays are placed on devices or processes are started."""

  config: Config
  job: Job  # the job, whose clients are the workers
  apart: Halves  # halves of the full model
  keys: work.Keys
  shapes: work.Shapes
  parts: list[list[int]]  # leaves by shard
  examples: Batch  # numpy [W, n, ...]
  test: Batch | None
  updates: int

  @property
  def workers(self) -> int:
    return len(self.job.sizes)

  def rules(self, code: str) -> Rules:
    config = self.config
    two = config.server_mode == "async" or (config.server_mode == "ssp" and config.bound > 0)
    lag = 2 if config.overlap and two else 1
    weights = tuple(map(float, self.job.sizes))
    rest = (config.bound, lag, config.round_seconds, code)
    return Rules(config.server_mode, self.workers, self.updates, weights, *rest)


def count_workers(config: Config) -> int:
  """Returns the number of workers: --workers, or the size of --mesh.

  Raises:
    UsageError: if the mesh is malformed or has an axis other than `data`.
  """
  with flag("mesh", config.mesh):
    axes = meshes.parse_mesh(config.mesh)
    if set(axes) != {"data"}:
      raise ValueError("a server's workers are those of a mesh such as data:4, or --workers=4")
  return config.workers or axes["data"]


def check(config: Config, needs_ray: bool = True) -> Method:
  """Builds the method, after rejecting flags that are invalid for any data.

  Raises:
    UsageError: if a flag is invalid; the message is one line.
  """
  legal(config)
  alone = config.server_mode == "hogwild"
  if needs_ray and not alone and importlib.util.find_spec("ray") is None:
    raise UsageError("--executor='server': needs Ray: pip install -e \".[async]\"")
  for name in _ELSEWHERE:
    if getattr(config, name) != Config.defaults()[name]:
      with flag(name, getattr(config, name)):
        raise ValueError("is not for --executor=server, whose workers are processes")
  count_workers(config)
  slowdown(config)
  with flag("method", config.method):
    method = registry.build("method", config.method)
    if method.passes or method.later:
      raise ValueError("a server's pieces of work have one length: give the method one period")
    apart = _apart(method, {"x": jax.ShapeDtypeStruct((3, 2), jnp.float32)})
    if config.server_mode == "elastic" and not isinstance(apart.method, LocalStepping):
      raise ValueError("elastic workers take local steps; use diloco or local_sgd")
    if alone:
      _check_lock_free(config, apart)
  return method


def legal(config: Config) -> None:
  """Checks each flag separately.

  Raises:
    UsageError: if a flag is invalid; the message is one line.
  """
  mode = config.server_mode
  if mode not in MODES:
    raise UsageError(f"--server_mode='{mode}': {checks.unknown(mode, MODES)}")
  assemble.check_numbers(config)
  with flag("node_ip", config.node_ip):
    if config.node_ip != "localhost":
      try:
        ipaddress.ip_address(config.node_ip)
      except ValueError as error:
        raise ValueError(str(error)) from error
  with flag("round_seconds", config.round_seconds):
    if not 0 < config.round_seconds < math.inf:
      raise ValueError("not in (0, inf)")


def _apart(method: Method, params: Params) -> Halves:
  """Splits the method into its two halves.

  Raises:
    ValueError: if the method cannot be split; the message gives the reason.
  """
  try:
    return halves(method, params)
  except ValueError as error:
    raise ValueError(f"cannot be split between a server and its workers: {error}") from error


def _check_lock_free(config: Config, apart: Halves) -> None:
  """Rejects methods that do more than add each worker's steps.

  Raises:
    ValueError: if the method is rejected; the message gives the reason.
  """
  example = {"x": jnp.zeros((3, 2))}
  holds = lambda init: bool(jax.tree.leaves(jax.eval_shape(init, example)))
  types = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  sent = work.payload_shapes(apart.link, work.shapes_of(example))
  kept = any(map(holds, (apart.init, apart.own, apart.link.init)))
  is_plain = isinstance(apart.method, DataParallel) and types(sent) == types(example)
  if kept or not is_plain:
    raise ValueError("hogwild adds gradients to one model; use plain sgd and mean()")
  if apart.correction is not None:
    raise ValueError("hogwild does not use staleness; use plain sgd and mean()")
  if apart.method.local_steps > 1 or config.shards > 1 or config.slowdown:
    raise ValueError("hogwild requires a period of one, one shard and no --slowdown")


def slowdown(config: Config) -> Mapping[int, float]:
  """Parses --slowdown: the factor by which each worker is slowed down, as in {0: 4.0}.

  Raises:
    UsageError: if the flag is malformed; the message is one line.
  """
  with flag("slowdown", config.slowdown):
    try:
      found = spec.literal(config.slowdown or "{}")
      factors = {int(worker): float(factor) for worker, factor in found.items()}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
      raise ValueError("not a factor by worker number, such as {0: 4}") from error
    for worker, factor in factors.items():
      if not (0 <= worker < count_workers(config) and 1 <= factor < math.inf):
        raise ValueError(
          f"{{{worker}: {factor:g}}} is not a worker's number and a factor from 1 on"
        )
  return factors


@functools.cache
def setup(config: Config, needs_ray: bool = True) -> Setup:
  """Builds the parts of a run, and checks that the parts fit together.

  Raises:
    UsageError: if parts do not fit together; the message is one line.
  """
  method = check(config, needs_ray)
  workers = count_workers(config)
  batch_size = assemble.per_worker(config, workers)
  task = sources.task_of(config)
  with flag("task", config.task):
    if task.feed:
      raise ValueError("streams its training examples, and a server's workers have their own")
    if task.project:
      raise ValueError("keeps its model in a convex set, which a server does not")
  with flag("workers", workers):
    count = sources.count(task.train)
    if workers > count:
      raise ValueError(f"for {count} examples: each needs at least one")
  method = fitting.method_for(method, fitting.Model(task.dimensions))
  examples, sizes = sources.partitioned(config, task, workers)
  with flag("batch_size", config.batch_size):
    if batch_size and batch_size * workers > sizes.sum():
      raise ValueError(f"the task has {sizes.sum()} training examples; 'all' takes them all")
  job = Job(method, task, {"data": workers}, sizes, batch_size, config.clip_norm)
  shapes = work.shapes_of(jax.eval_shape(task.init, jax.random.key(0)))
  with flag("method", config.method):
    structs = jax.eval_shape(task.init, jax.random.key(0))
    apart = _apart(method, structs)
    reach.check(jax.eval_shape(apart.method.init, structs), task.dimensions)
  with flag("shards", config.shards):
    parts = work.cut(shapes, config.shards)
    if config.shards > 1 and work.looks_across(method, shapes, parts):
      raise ValueError("the server's optimizer needs all leaves at once; use --shards=1")
  updates = _updates(config, method.local_steps, int(sizes.sum()), workers)
  keys = work.keys_of(config.seed)
  return Setup(config, job, apart, keys, shapes, parts, examples, task.test, updates)


def _updates(config: Config, period: int, examples: int, workers: int) -> int:
  """Returns the number of updates of `period` steps, from --rounds, --epochs or --steps."""
  if config.rounds:
    with flag("rounds", config.rounds):
      if config.epochs:
        raise ValueError("cannot be combined with --epochs")
    return config.rounds
  if config.epochs:
    size = examples if config.batch_size == "all" else int(config.batch_size)
    at_once = 1 if config.server_mode in ("sync", "elastic") else workers
    return max(1, round(config.epochs * examples / size * at_once / period))
  with flag("steps", config.steps):
    if config.steps % period:
      near = -(-config.steps // period) * period
      raise ValueError(f"does not end with a round of {period} steps; nearest: {near}")
  return config.steps // period


def code_of(setup: Setup) -> str:
  """Returns a digest of source, model, payloads and batches, equal on a worker and its server."""
  digest = hashlib.sha256(f"{_source()}{plugins.fingerprint()}".encode())
  config = setup.config
  told = (config.task, config.model, config.method, config.partition, str(config.batch_size))
  payloads = work.payload_shapes(setup.apart.link, setup.shapes)
  digest.update(json.dumps([*told, config.seed, config.clip_norm, setup.workers]).encode())
  digest.update(f"{setup.shapes}{payloads}".encode())
  return digest.hexdigest()[:12]


@functools.cache
def _source() -> str:
  """Returns a digest of this package's files."""
  root = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  return digest.hexdigest()


def initial(setup: Setup) -> dict[str, np.ndarray]:
  """Returns the initial model's leaves by name, as in a simulated run with the same seed."""
  params = jax.jit(setup.job.task.init)(setup.keys.params)
  leaves = map(np.asarray, jax.tree.leaves(params))
  return dict(zip(setup.shapes, leaves, strict=True))


def chosen(setup: Setup, shard: int, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the parameters of one shard, by name."""
  names = list(setup.shapes)
  return {names[leaf]: params[names[leaf]] for leaf in setup.parts[shard]}
