"""Measures what `experiments/probe.py` fits constants to, with all hosts of a job busy at once."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from research.analysis.fitting import Sample
from research.analysis.network import Kernel
from research.training.config import Config, UsageError, flag

SHAPE = (640, 640)  # of an array to encode
CALLS = 8  # of a compressor in one program
SIZES = (2**12, 2**16, 2**18, 2**20, 3 * 2**20)  # bytes that a worker puts into a collective
PAUSE = 0.1  # seconds, in which an idle link saves up its burst; TCP starts anew after 0.2
LONG = 2**18  # bytes from which on a collective is also measured after pauses
TURNS = (3, 25)  # smallest and largest number of measurements of the same thing
SECONDS = 1.0  # for one collective of one size
QUARTILE = 0.25  # of the times, because other programs can only make them longer
STEPS = 8  # per dispatch of the computation
OPERATIONS = ("all-reduce", "all-gather", "all-to-all", "permute")


class Hosts:
  """The processes of the job, which start each measurement together.

  Attributes:
    count: the number of processes.
    idle: the median seconds between two runs of what was measured last.
  """

  def __init__(self):
    import jax

    from research.comm import collectives
    from research.comm import mesh as meshes

    self.idle = 0.0
    self.count = jax.process_count()
    if self.count > 1 < len(jax.local_devices()):
      raise UsageError(f"{len(jax.local_devices())} devices per process; start one per process")
    self._mesh = meshes.device_mesh({"data": self.count}, jax.devices()[: self.count])
    self._meet = self.program(lambda x: collectives.total(x), 4)

  def program(self, exchange: Callable[[Any], Any], size: int) -> Callable[[], Any]:
    """Compiles an exchange to which each worker contributes `size` bytes; each call runs it."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mine = np.ones(size // 4, np.float32)
    rows = NamedSharding(self._mesh, P("data"))
    x = jax.make_array_from_callback((self.count * len(mine),), rows, lambda _: mine)
    run = jax.jit(
      jax.shard_map(
        exchange, mesh=self._mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
      )
    )
    jax.block_until_ready(run(x))
    return lambda: jax.block_until_ready(run(x))

  def timed(self, run: Callable[[], Any], turns: int, pause: float = 0.0) -> np.ndarray:
    """Measures the seconds of `run` in each process and turn, [processes, turns]."""
    from jax.experimental import multihost_utils

    found, gaps, ended = [], [pause], 0.0
    for turn in range(turns):
      time.sleep(pause)
      self._meet()
      begin = time.perf_counter()
      gaps += [begin - ended] * (turn > 0)
      run()
      ended = time.perf_counter()
      found.append(ended - begin)
    self.idle = float(np.median(gaps[1:] or gaps))
    everyone = multihost_utils.process_allgather(np.array(found, np.float32))
    return np.asarray(everyone, np.float64).reshape(self.count, turns)

  def typical(self, run: Callable[[], Any], pause: float = 0.0) -> float:
    """Returns the lower quartile of the slowest process's seconds."""
    first = self.timed(run, 1, pause).max()
    turns = int(np.clip(SECONDS / (first + pause), *TURNS))
    return float(np.quantile(self.timed(run, turns, pause).max(0), QUARTILE))


def exchange(operation: str, count: int) -> Callable[[Any], Any]:
  """Returns one of the library's collectives, for `count` workers."""
  from research.comm import collectives

  ring = [(i, (i + 1) % count) for i in range(count)]
  return {
    "all-reduce": lambda x: collectives.total(x),
    "all-gather": lambda x: collectives.gather(x)[:, :1].reshape(-1),
    "all-to-all": lambda x: collectives.exchange(x.reshape(count, -1)).reshape(-1),
    "permute": lambda x: collectives.permute(x, ring),
  }[operation]


def exchanges(hosts: Hosts) -> list[Sample]:
  """Measures every collective of every size, without pauses and after pauses."""
  from research.analysis import cost, wire

  found = []
  for operation, size in itertools.product(OPERATIONS, SIZES):
    sent = size * wire.ring_share(operation, hosts.count, hosts.count)
    hops = cost.hops(operation, hosts.count)
    run = hosts.program(exchange(operation, hosts.count), size)
    for pause in (0.0, PAUSE) if size >= LONG else (0.0,):
      seconds = hosts.typical(run, pause)
      found.append(Sample(operation, sent, hops, hosts.idle, seconds))
  return found


def computing(hosts: Hosts, config: Config) -> np.ndarray:
  """Measures the seconds of a local step without any exchange, [processes, turns].

  Raises:
    UsageError: if a flag is invalid.
  """
  import jax

  from research.training import assemble
  from research.training.loop import Run

  size = config.batch_size
  config = config.replace(
    method="data_parallel(sgd(0.1), mean())",
    executor="spmd",
    mesh="data:1",
    batch_size=size if size == "all" else assemble.per_worker(config, hosts.count),
    steps=2**20,
    steps_per_dispatch=STEPS,
  )
  run = Run(config, assemble.assemble(config, assemble.check(config), jax.local_devices()[:1]))

  def steps() -> None:
    run.advance(run.step + STEPS)
    jax.block_until_ready(run.metrics)

  steps()
  return hosts.timed(steps, TURNS[1]) / STEPS


def kernel(hosts: Hosts, spec: str) -> tuple[str, Kernel]:
  """Measures the seconds per element of a compressor, or of an aggregator with one worker.

  The calls are in a loop, as in the training program, which allocates no memory for each of them.
  What is decoded is added to an array, and the time of scaling this array is deducted.

  Returns:
    The spec as the object itself writes it, and the seconds.

  Raises:
    UsageError: if neither a compressor nor an aggregator has this spec.
  """
  import jax

  from research.core import registry
  from research.core.spec import parse

  like = jax.ShapeDtypeStruct(SHAPE, np.float32)
  x = jax.random.normal(jax.random.key(0), SHAPE)
  each = (np.arange(CALLS), jax.random.split(jax.random.key(1), (CALLS, 2)))
  copy = _per_element(hosts, lambda x, turn: (_copied(x, turn), None), x, each)
  with flag("kernels", spec):
    if parse(spec).name in registry.names("compressor"):
      compressor = registry.build("compressor", spec)

      def encode(carry, turn):
        x = _copied(carry[0], turn)
        return (x, compressor.encode(x, *turn[1])), None

      def decode(carry, turn):
        payload = jax.tree.map(lambda x: _copied(x, turn), carry[1])
        return (0.9 * carry[0] + compressor.decode(payload, like, turn[1][0]), payload), None

      def neither(carry, turn):
        return (0.9 * carry[0], jax.tree.map(lambda x: _copied(x, turn), carry[1])), None

      payload = _program(lambda x, key: compressor.encode(x, *key))(x, each[1][0])
      took = [_per_element(hosts, one, (x, payload), each) for one in (encode, decode, neither)]
      return repr(compressor), Kernel(max(0.0, took[0] - copy), max(0.0, took[1] - took[2]))
    aggregator = registry.build("aggregator", spec)

  def aggregate(carry, turn):
    x, state, _ = carry
    x = _copied(x, turn)
    found = aggregator.aggregate(x, state, turn[1][0])
    return (x, found.state, found.value), None

  state = _program(aggregator.init)(x)
  took = _per_element(hosts, aggregate, (x, state, x), each)
  return repr(aggregator), Kernel(max(0.0, took - copy), 0.0)


def arithmetic(hosts: Hosts) -> Kernel:
  """Measures the seconds per four bytes that elementwise operations read or write."""
  import jax

  x = jax.random.normal(jax.random.key(0), SHAPE)
  add = lambda carry, _: ((0.9 * carry[0] + carry[1], carry[1]), None)
  return Kernel(_per_element(hosts, add, (x, x), np.zeros(CALLS)) / 3, 0.0)


def _per_element(hosts: Hosts, body: Callable[..., Any], carry: Any, each: Any) -> float:
  """Measures the seconds of one turn of a loop, per element of an array of SHAPE."""
  import jax

  loop = _program(lambda carry, each: jax.lax.scan(body, carry, each)[0])
  jax.block_until_ready(loop(carry, each))
  took = hosts.typical(lambda: jax.block_until_ready(loop(carry, each)))
  return took / CALLS / math.prod(SHAPE)


def _copied(x: Any, turn: Any) -> Any:
  """Returns x in other memory; no operation before it is fused with one after it, or left out."""
  import jax
  import jax.numpy as jnp

  return jax.lax.cond(turn[0] >= 0, jnp.copy, jnp.flip, x)


def _program(function: Callable[..., Any]) -> Any:
  """Compiles a function for this process's first device, as the only worker."""
  import jax
  from jax.sharding import PartitionSpec as P

  from research.comm import mesh as meshes

  one = meshes.device_mesh({"data": 1}, jax.local_devices()[:1])
  return jax.jit(jax.shard_map(function, mesh=one, in_specs=P(), out_specs=P(), check_vma=False))
