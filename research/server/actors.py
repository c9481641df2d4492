"""The processes of a run on Ray. What they compute and decide is in head.py, part.py and work.py.

JAX is imported when a process knows what it runs on: servers on processors, workers on what they
were given. Between processes travel numpy arrays alone.
"""

import os
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from research.core import plugins
from research.core.plugins import Source
from research.training.config import Config


class Snapshot(NamedTuple):
  """Where a server begins: at the start of a run, or at a checkpoint."""

  version: int
  params: dict[str, Any]  # all leaves, numpy
  states: dict[int, list[Any]] | None  # of each shard's optimizer; None: they begin
  counted: list[list[int]]  # see Head


class Sizes(NamedTuple):
  """What a server knows of the model: leaves by name, and which of them each shard has."""

  leaves: list[tuple[str, tuple[int, ...], str]]
  parts: list[list[int]]


class Inherited(NamedTuple):
  """What a process takes over from the one that starts it."""

  cache: str  # folder of compiled programs, '' for none
  modules: tuple[Source, ...]  # that register names


def inherited() -> Inherited:
  """What the processes that this one starts take over."""
  import jax

  cache = str(jax.config.values["jax_compilation_cache_dir"] or "")
  return Inherited(cache, plugins.carried())


def settle(platform: str, given: Inherited) -> None:
  """Starts JAX in this process, on processors or on whatever is there, and imports plugins."""
  os.environ["JAX_NUM_CPU_DEVICES"] = "1"
  if platform:
    os.environ["JAX_PLATFORMS"] = platform
  import jax

  if given.cache:
    jax.config.update("jax_compilation_cache_dir", given.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  plugins.load_all(given.modules)


def part_of(method: str, seed: int, sizes: Sizes, number: int, place: Snapshot) -> Any:
  """The shard of that number."""
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
  """A shard of the model apart from the head's, which says what is applied when."""

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
    """The current version, None if it is yet to become the one that is wanted."""
    return self.part.pull(worker) if self.part.version >= at_least else None

  def stage(self, push: Any, payloads: Any) -> tuple[str, str] | None:
    """None, or the kind and the text of a refusal."""
    from research.server.part import Refused

    try:
      self.part.stage(push, payloads)
    except Refused as error:
      return error.kind, str(error)
    return None

  def apply(self, pushes: Any, shares: Any) -> None:
    """Nobody waits for it: a shard that fails here ends, and the servers start again."""
    try:
      self.part.apply(pushes, shares)
    except BaseException:
      traceback.print_exc()
      os._exit(1)

  def snapshot(self) -> Any:
    return self.part.snapshot()


class WorkerProcess:
  """A worker; `run` returns when it is over, and raises what keeps it from its work."""

  def __init__(self, config: Config, worker: int, platform: str, given: Inherited):
    self.config, self.worker, self.platform, self.given = config, worker, platform, given

  def run(self) -> str:
    settle(self.platform, self.given)
    from research.server.worker import Worker

    return Worker(self.config, self.worker).run()


class HeadProcess:
  """The head and its shard."""

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
    """Of a head whose update has failed half-way nothing can be trusted: it ends, as a shard."""
    try:
      return await self.head.push(push, payloads, spent)
    except Exception:  # whatever it was: shards may have half of the update
      traceback.print_exc()
      os._exit(1)

  async def deny(self, kind: str, text: str) -> None:
    await self.head.deny(kind, text)

  async def stop(self, reason: str) -> None:
    await self.head.stop(reason)

  async def report(self) -> dict[str, Any]:
    return {**self.head.report(), "pid": os.getpid(), "pids": dict(self.pids)}

  async def snapshot(self) -> tuple[dict[str, Any], Any, list[list[int]], list[Any]]:
    """A report, the head's shard, what is counted, where the other shards come: one version."""
    others = [shard.snapshot.remote() for shard in self.shards]
    counted = [list(row) for row in self.head.counted]
    return await self.report(), self.head.part.snapshot(), counted, others
