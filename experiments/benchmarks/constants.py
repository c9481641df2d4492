"""Measures what `experiments/probe.py` fits constants to, with all hosts of a job busy at once."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
SECONDS = 1.0  # for one collective of one size, or for one kernel
PARTS = 2  # into which these seconds are divided, with the other measurements between them
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
    return self.typicals([run], pause)[0]

  def typicals(self, runs: Sequence[Callable[[], Any]], pause: float = 0.0) -> list[float]:
    """Returns `typical` of each run; the runs take turns, so that a disturbance hits all alike."""
    found: list[list[np.ndarray]] = [[] for _ in runs]
    for part, (run, mine) in itertools.product(range(PARTS), zip(runs, found, strict=True)):
      if part == 0:
        mine.append(self.timed(run, 1, pause))
      turns = int(np.clip(SECONDS / (mine[0].max() + pause), *TURNS))
      mine.append(self.timed(run, -(-turns // PARTS), pause))
    return [float(np.quantile(np.hstack(mine[1:]).max(0), QUARTILE)) for mine in found]


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


class Loops(NamedTuple):
  """Compiled loops over a kernel, and how its constants follow from their seconds per element."""

  name: str
  runs: list[Callable[[], Any]]
  kernel: Callable[[list[float], float], Kernel]  # the runs' seconds, those of copying -> constants


def kernels(hosts: Hosts, specs: Sequence[str]) -> dict[str, Kernel]:
  """Measures compressors, aggregators with one worker, and elementwise arithmetic.

  The calls are in loops, as in the training program, which allocates no memory for each of them.

  Returns:
    The seconds per element by the spec as the object itself writes it; those of arithmetic are per
    four bytes that are read or written.

  Raises:
    UsageError: if neither a compressor nor an aggregator has one of the specs.
  """
  import jax

  from research.analysis import encodings

  x = jax.random.normal(jax.random.key(0), SHAPE)
  each = (np.arange(CALLS), jax.random.split(jax.random.key(1), (CALLS, 2)))
  copy = _loop(lambda x, turn: (_copied(x, turn), None), x, each)
  add = _loop(lambda both, _: ((0.9 * both[0] + both[1], both[1]), None), (x, x), each)
  arithmetic = Loops(encodings.ARITHMETIC, [add], lambda took, _: Kernel(took[0] / 3, 0.0))
  found = [arithmetic, *(_loops(spec, x, each) for spec in specs)]
  took = iter(hosts.typicals([copy, *(run for one in found for run in one.runs)]))
  element = lambda: next(took) / CALLS / math.prod(SHAPE)
  copying = element()
  return {one.name: one.kernel([element() for _ in one.runs], copying) for one in found}


def _loops(spec: str, x: Any, each: Any) -> Loops:
  """Compiles the loops over a compressor or an aggregator.

  What is decoded is added to an array, and the time of scaling this array is deducted.
  """
  import jax

  from research.core import registry
  from research.core.spec import parse

  with flag("kernels", spec):
    if parse(spec).name not in registry.names("compressor"):
      return _aggregator_loops(registry.build("aggregator", spec), x, each)
    compressor = registry.build("compressor", spec)

    def encode(carry, turn):
      x = _copied(carry[0], turn)
      return (x, compressor.encode(x, *turn[1])), None

    def decode(carry, turn):
      payload = jax.tree.map(lambda x: _copied(x, turn), carry[1])
      return (0.9 * carry[0] + compressor.decode(payload, like, turn[1][0]), payload), None

    def neither(carry, turn):
      return (0.9 * carry[0], jax.tree.map(lambda x: _copied(x, turn), carry[1])), None

    like = jax.ShapeDtypeStruct(SHAPE, x.dtype)
    payload = _program(lambda x, key: compressor.encode(x, *key))(x, each[1][0])
    runs = [_loop(body, (x, payload), each) for body in (encode, decode, neither)]
    of = lambda took, copy: Kernel(max(0.0, took[0] - copy), max(0.0, took[1] - took[2]))
    return Loops(repr(compressor), runs, of)


def _aggregator_loops(aggregator: Any, x: Any, each: Any) -> Loops:
  def aggregate(carry, turn):
    x, state, _ = carry
    x = _copied(x, turn)
    found = aggregator.aggregate(x, state, turn[1][0])
    return (x, found.state, found.value), None

  run = _loop(aggregate, (x, _program(aggregator.init)(x), x), each)
  return Loops(repr(aggregator), [run], lambda took, copy: Kernel(max(0.0, took[0] - copy), 0.0))


def _loop(body: Callable[..., Any], carry: Any, each: Any) -> Callable[[], Any]:
  """Compiles a loop of CALLS turns; each call runs it."""
  import jax

  loop = _program(lambda carry, each: jax.lax.scan(body, carry, each)[0])
  jax.block_until_ready(loop(carry, each))
  return lambda: jax.block_until_ready(loop(carry, each))


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
