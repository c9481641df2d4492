"""Ray actors of a server run, whose logic is in head.py, part.py and work.py.

A process imports JAX only after its platform is set: servers run on the CPU, workers on the devices
allotted to them. Processes exchange only numpy arrays.
"""

import os
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from research.core import plugins
from research.core.plugins import Source
from research.training.config import Config


class Snapshot(NamedTuple):
  """The state from which a server starts: the initial state of the run, or a checkpoint."""

  version: int
  params: dict[str, Any]  # all leaves of the model, as numpy arrays
  states: dict[int, list[Any]] | None  # optimizer state of each shard; None: a new state
  counted: list[list[int]]  # see Head


class Sizes(NamedTuple):
  """The server's description of the model: names, shapes and dtypes of leaves, and their shards."""

  leaves: list[tuple[str, tuple[int, ...], str]]
  parts: list[list[int]]


class Inherited(NamedTuple):
  """Settings that a child process inherits."""

  cache: str  # folder of compiled programs; '' without a cache
  modules: tuple[Source, ...]  # plugin modules


def inherited() -> Inherited:
  """Returns the settings that child processes inherit from this process."""
  import jax

  cache = str(jax.config.values["jax_compilation_cache_dir"] or "")
  return Inherited(cache, plugins.carried())


def settle(platform: str, given: Inherited) -> None:
  """Configures JAX in this process and imports plugins.

  Args:
    platform: "cpu", or '' for JAX's default platform.
    given: the settings of the parent process.
  """
  os.environ["JAX_NUM_CPU_DEVICES"] = "1"
  if platform:
    os.environ["JAX_PLATFORMS"] = platform
  import jax

  if given.cache:
    jax.config.update("jax_compilation_cache_dir", given.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  plugins.load_all(given.modules)


def part_of(method: str, seed: int, sizes: Sizes, number: int, place: Snapshot) -> Any:
  """Builds shard `number` of the model.

  Args:
    method: the method's spec.
    seed: the seed of the run.
    sizes: the model's leaves and their shards.
    number: the index of the shard.
    place: the state to start from.
  """
  import jax

  from research.core import registry
  from research.server import work
  from research.server.part import ShardState

  served: Any = registry.build("method", method)
  shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in sizes.leaves}
  leaves, names = sizes.parts[number], list(shapes)
  side = work.side(served, work.keys_of(seed), shapes, leaves)
  payloads = work.payload_shapes(served.on_server()[0].exchange.uplink, shapes)
  params = {names[leaf]: place.params[names[leaf]] for leaf in leaves}
  state = place.states[number] if place.states else None
  return ShardState(side, params, [payloads[leaf] for leaf in leaves], number, place.version, state)


class Shard:
  """The actor of a shard other than the head's own; the head determines the shard's updates."""

  def __init__(
    self, method: str, seed: int, sizes: Sizes, number: int, place: Snapshot, given: Inherited
  ):
    settle("cpu", given)
    self.part = part_of(method, seed, sizes, number, place)

  def pid(self) -> int:
    return os.getpid()

  def join(self, worker: int, incarnation: int) -> None:
    self.part.join(worker, incarnation)

  def pull(self, worker: int, at_least: int = 0) -> Any:
    """Returns the current model, or None while the model's version is below `at_least`."""
    return self.part.pull(worker) if self.part.version >= at_least else None

  def stage(self, push: Any, payloads: Any) -> tuple[str, str] | None:
    """Stages a push; returns None, or the kind and the text of a refusal if the push is refused."""
    from research.server.part import Refused

    try:
      self.part.stage(push, payloads)
    except Refused as error:
      return error.kind, str(error)
    return None

  def apply(self, pushes: Any, shares: Any) -> None:
    """Applies an update; if that fails, exits, since no caller waits; all servers then restart."""
    try:
      self.part.apply(pushes, shares)
    except BaseException:
      traceback.print_exc()
      os._exit(1)

  def snapshot(self) -> Any:
    return self.part.snapshot()


class WorkerProcess:
  """The actor of a worker; `run` returns at the end of the run, or raises if it cannot continue."""

  def __init__(self, config: Config, worker: int, platform: str, given: Inherited):
    self.config, self.worker, self.platform, self.given = config, worker, platform, given

  def run(self) -> str:
    settle(self.platform, self.given)
    from research.server.worker import Worker

    return Worker(self.config, self.worker).run()


class HeadProcess:
  """The actor of the head and of the head's shard."""

  def __init__(
    self,
    rules: Any,
    method: str,
    seed: int,
    sizes: Sizes,
    place: Snapshot,
    shards: Sequence[Any],
    given: Inherited,
  ):
    settle("cpu", given)
    from research.server.head import Head

    def elsewhere(pushes, shares):
      for shard in shards:
        shard.apply.remote(pushes, shares)

    self.shards, self.pids = shards, {}
    part = part_of(method, seed, sizes, 0, place)
    self.head = Head(rules, part, elsewhere, place.counted)

  async def join(self, worker: int, code: str, pid: int) -> Any:
    self.pids[worker] = pid
    return await self.head.join(worker, code)

  async def leave(self, worker: int) -> None:
    await self.head.leave(worker)

  async def push(self, push: Any, payloads: Any, spent: Any) -> Any:
    """Counts a push; if an update fails halfway, the state is invalid, and the process exits."""
    try:
      return await self.head.push(push, payloads, spent)
    except Exception:  # any error: some shards may have applied the update
      traceback.print_exc()
      os._exit(1)

  async def deny(self, kind: str, text: str) -> None:
    await self.head.deny(kind, text)

  async def stop(self, reason: str) -> None:
    await self.head.stop(reason)

  async def report(self) -> dict[str, Any]:
    return {**self.head.report(), "pid": os.getpid(), "pids": dict(self.pids)}

  async def snapshot(self) -> tuple[dict[str, Any], Any, list[list[int]], list[Any]]:
    """Returns a report, the head's shard, the counts, and futures of the other shards.

    All these parts have the same version.
    """
    others = [shard.snapshot.remote() for shard in self.shards]
    counted = [list(row) for row in self.head.counted]
    return await self.report(), self.head.part.snapshot(), counted, others
