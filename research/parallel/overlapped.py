"""Executor that runs the exchanges on separate devices while the workers compute.

Every computing device has a communication device: a CPU device has another CPU device of the
process, and an accelerator has a CPU device of the host. The exchange is a separate program on the
communication devices, which hold the aggregator's state. All programs are dispatched asynchronously
from one Python thread, and no program waits for the result of an exchange before the result is due.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm import collectives
from research.comm import mesh as meshes
from research.core.base import EVERYONE, Array, Presence, State, Trait, Tree
from research.core.method import Method
from research.core.task import Data, Executor, Metrics, TrainState
from research.methods.late import Overlapping
from research.parallel import inference, sharded, workers
from research.parallel import layout as layouts
from research.parallel.cohorts import draw
from research.parallel.halves import Halves, LateHalves, Tools
from research.parallel.job import Job, largest_sum, resolved, traits
from research.parallel.local_phase import local_phase


class Flight(NamedTuple):
  """The state of a run between two rounds, with its exchanges in flight."""

  held: TrainState  # on the computing devices, without the aggregator's state
  links: tuple[State, ...]  # the aggregator's state by fragment, on the communication devices
  air: tuple[tuple[int, Tree], ...]  # fragment and result of each exchange, the oldest first
  number: int  # completed rounds
  recent: tuple[Array, ...]  # losses of the latest rounds


def overlapped(job: Job) -> Executor:
  """Runs each worker on its own devices, and the exchanges on separate devices.

  The method is `late(...)`, `streaming_diloco`, or a method that allows its exchange to take a
  round, such as `eager_diloco`. The parameters equal those of `spmd` for the same method, up to
  rounding differences in the last bits, since the computation is compiled in different programs.

  Args:
    job: the job.

  Raises:
    ValueError: if there are fewer than two devices for each device of the mesh, the method waits
      for its exchange, or not all workers take part in every round.
  """
  _check(job)
  mesh, other = two_meshes(job)
  job, layout = resolved(job), inference.layout_of(job)
  return _Overlapped(job, layout, mesh, other).executor()


def _check(job: Job) -> None:
  method = job.method
  if not isinstance(method, Overlapping) and not (method.eager and method.splits):
    raise ValueError(
      f"{method.title} waits for its exchange; use late({method.title}(...), delay=...), "
      "streaming_diloco, eager_diloco or overlap_local_sgd"
    )
  if method.later:
    raise ValueError("an overlapped run needs a constant period")
  if job.dropout or job.sampling_rate or len(job.sizes) > job.workers or job.by_epochs:
    raise ValueError(
      "in an overlapped run all workers take part in every round, with equally many steps; use "
      "--executor=simulate for a population, dropout or passes over unequal data"
    )
  if job.diagnostics:
    raise ValueError("--diagnostics: an overlapped run has none; use --executor=spmd")
  if Trait.SECRET in traits(method):
    raise ValueError("secure sums are not supported; use --executor=spmd")


def two_meshes(job: Job) -> tuple[Mesh, Mesh]:
  """Returns the computing mesh and the communicating mesh, with matching devices.

  Args:
    job: the job.

  Raises:
    ValueError: if a process has fewer communication devices than computing devices.
  """
  computing, beside = [], {}
  on_cpu, processes = jax.default_backend() == "cpu", jax.process_count()
  for process in range(processes):
    own = [d for d in jax.devices() if d.process_index == process]
    first = own[: len(own) // 2] if on_cpu else own
    second = own[len(first) :] if on_cpu else _of_hosts(process)
    computing += first
    beside |= dict(zip(first, second, strict=False))
  wanted, there = meshes.count(job.axes), len(computing)
  if wanted > there or (processes > 1 and wanted != there) or len(beside) < there:
    shown = ",".join(f"{name}:{size}" for name, size in job.axes.items())
    needed = -(-wanted // processes) * (2 if on_cpu else 1)
    raise ValueError(
      f"'{shown}' needs {wanted} devices that compute and {wanted} CPU devices that communicate, "
      f"and there are {there} and {len(beside)}; set JAX_NUM_CPU_DEVICES={needed} for each process"
    )
  mesh = meshes.device_mesh(job.axes, computing[:wanted])
  pairs = np.vectorize(beside.__getitem__, otypes=[object])(mesh.devices)
  return mesh, Mesh(pairs, mesh.axis_names, axis_types=mesh.axis_types)


def _of_hosts(process: int) -> list[Any]:
  """Returns the CPU devices of a process whose default devices are accelerators."""
  return [d for d in jax.devices("cpu") if d.process_index == process]


def moved(tree: Tree, shardings: Tree) -> Tree:
  """Copies arrays between the computing and the communication devices.

  Each process moves its own shards, so no process waits for another process.

  Args:
    tree: arrays on one mesh.
    shardings: for each array, the same partition on the other mesh.
  """
  leaves, treedef = jax.tree.flatten(tree)
  places = treedef.flatten_up_to(shardings)
  shards, devices, counts = [], [], []
  for leaf, place in zip(leaves, places, strict=True):
    targets = place.addressable_devices_indices_map(leaf.shape)
    by_index = dict(zip(leaf.sharding.mesh.devices.flat, place.mesh.devices.flat, strict=True))
    own = {by_index[shard.device]: shard.data for shard in leaf.addressable_shards}
    shards += [own[device] for device in targets]
    devices += list(targets)
    counts.append(len(targets))
  copies = iter(jax.device_put(shards, devices))
  make = jax.make_array_from_single_device_arrays
  found = [
    make(leaf.shape, place, [next(copies) for _ in range(count)])
    for leaf, place, count in zip(leaves, places, counts, strict=True)
  ]
  return treedef.unflatten(found)


class Parts(NamedTuple):
  """The privacy, shapes and shardings of the leaves of the workers' trees."""

  private: Tree  # tree of bool, whether a leaf is private
  shapes: Tree  # the shapes of one worker's leaves
  computing: Tree  # shardings on the computing devices
  communicating: Tree


class _Overlapped:
  """Builds the programs of one job; see `overlapped`."""

  def __init__(self, job: Job, layout: layouts.Layout, mesh: Mesh, other: Mesh):
    self.mesh, self.other, self.layout = mesh, other, layout
    self.axes = meshes.worker_axes(job.axes)
    self.cut = cut = sharded.cut_of(job.axes, job.task)
    self.traced = _halves(workers.blocked(job).method)  # needs no mesh
    self.initial = partial(workers.initial, job, layout)
    if cut:
      job = resolved(job._replace(method=job.method.over(lambda one: sharded.PerShard(one, cut))))
    self.job = job
    self.halves = _halves(job.method)
    self.stepping_job = job._replace(method=self.halves.waiting)
    self.inside = sharded.inside(job.axes, cut, 3)
    self.options = meshes.options_for_sums(mesh, largest_sum(job))
    halves, every = self.halves, range(self.halves.fragments)
    self.held = self._parts(halves.held(layout.state), halves.held(layout.state_shapes))
    self.local = self._parts(layout.local, layout.local_shapes)
    of_links = halves.links(layout.state), halves.links(layout.state_shapes)
    self.links = [self._parts(*one) for one in zip(*of_links, strict=True)]
    self.messages = [self._traced(*self._of_message(p)) for p in every]
    self.results = [self._traced(*self._of_exchange(p)) for p in every]
    self.stepping, self.arriving = functools.cache(self._stepping), functools.cache(self._arriving)
    self.departing = functools.cache(self._departing)
    self.exchanging = functools.cache(self._exchanging)
    self.tools = Tools(self._receive, functools.cache(self._nothing))

  def executor(self) -> Executor:
    """Returns the job's executor, whose state is a `Flight` after the first round."""
    job, layout = self.job, self.layout
    names = tuple(self.axes)
    whole = sharded.of_state(layout.state, self.mesh, names, layout.state_shapes, self.cut)
    init = sharded.jit(self.initial, out_shardings=whole)
    deployed = lambda state: workers.deployed(job, layout, state.method)
    lies = lambda x: NamedSharding(self.mesh, P(*sharded.spec_of(self.cut, x.shape)))
    model = jax.eval_shape(job.task.init, jax.random.key(0))
    params = sharded.jit(deployed, out_shardings=jax.tree.map(lies, model))
    place = partial(sharded.place, self.mesh, names)
    of_flight = lambda state: params(self.settled(state))
    return Executor(init, place, self.run, of_flight, layout, self.settled, self.alone)

  # ---- placement of the state

  def _parts(self, private: Tree, shapes: Tree) -> Parts:
    names = tuple(self.axes)
    on = lambda mesh: sharded.of_state(private, mesh, names, shapes, self.cut).method
    return Parts(private, shapes, on(self.mesh), on(self.other))

  def _traced(self, fn: Callable[..., Tree], privates: Sequence[Tree], shapes: Sequence[Tree]):
    """Returns the Parts of the result of one worker's function of private and shared arguments."""
    spread = lambda private, shape: jax.tree.map(
      lambda p, x: jax.ShapeDtypeStruct((*self.axes.values(), *x.shape), x.dtype) if p else x,
      private,
      shape,
    )
    args = list(map(spread, privates, shapes))
    in_axes = tuple(map(layouts.lead, privates))
    found = layouts.private_outputs(fn, self.axes, in_axes, *args)
    return self._parts(found, layouts.shapes_of_one(fn, self.axes, in_axes, *args))

  def _of_message(self, fragment: int) -> tuple[Any, ...]:
    layout, halves = self.layout, self.traced
    message = lambda local, held, key: halves.depart(
      fragment, local, held, key=key, presence=EVERYONE
    )[0]
    held = halves.held(layout.state_shapes)
    shapes = self.local.shapes, held, jax.eval_shape(lambda: jax.random.key(0))
    return message, (self.local.private, self.held.private, False), shapes

  def _of_exchange(self, fragment: int) -> tuple[Any, ...]:
    layout, halves = self.layout, self.traced

    def exchange(local, held, link, key):
      tree = self._of_message(fragment)[0](local, held, key)
      return halves.result(halves.exchange.aggregate(tree, link, key, EVERYONE))

    _, privates, shapes = self._of_message(fragment)
    link = halves.links(layout.state_shapes)[fragment]
    return (
      exchange,
      (*privates[:2], self.links[fragment].private, privates[2]),
      (*shapes[:2], link, shapes[2]),
    )

  def _specs(self, parts: Parts) -> Tree:
    """Returns the specs of a tree for `shard_map` over the workers."""
    return sharded.of_state(parts.private, None, tuple(self.axes)).method

  def _program(
    self, fn: Callable[..., Any], mesh: Mesh, ins: Sequence[Any], outs: Sequence[Any], donate: Any
  ) -> Any:
    """Compiles one worker's function; the program's private leaves have a leading dimension."""
    spec = lambda one: self._specs(one) if isinstance(one, Parts) else one
    on = lambda parts: parts.computing if mesh is self.mesh else parts.communicating
    place = lambda one: on(one) if isinstance(one, Parts) else NamedSharding(mesh, one)

    def inner(*args):
      own = lambda one, x: _own(one.private, x) if isinstance(one, Parts) else x
      found = fn(*map(own, ins, args))
      return tuple(
        _rows(one.private, x) if isinstance(one, Parts) else x
        for one, x in zip(outs, found, strict=True)
      )

    mapped = jax.shard_map(
      inner,
      mesh=mesh,
      in_specs=tuple(map(spec, ins)),
      out_specs=tuple(map(spec, outs)),
      axis_names=set(self.axes),
      check_vma=False,
    )
    return sharded.jit(
      mapped,
      out_shardings=tuple(map(place, outs)),
      donate_argnums=donate,
      compiler_options=self.options,
    )

  # ---- the programs of a round

  def _stepping(self, first: int, last: int, begun: bool) -> Any:
    """Compiles steps [first, last): (round, key, held, data[, local]) -> (local, measurements)."""
    names = P(tuple(self.axes))

    def one(number, key, held, data, *local):
      worker = collectives.worker_index()
      lots = draw(self.stepping_job, data, key, number[None], worker)
      local, measured = local_phase(
        self.stepping_job,
        held,
        jax.tree.map(lambda x: x[0], data.examples),
        data.sizes[worker],
        jax.tree.map(lambda x: x[0], lots.index),
        collectives.worker_key(collectives.round_keys(key, number)[1]),
        self.inside,
        begun=(first, local[0]) if begun else None,
        last=last,
      )
      return local, jax.tree.map(lambda x: (x * lots.share[0])[None], measured)

    ins = (P(), P(), self.held, sharded.of_data(names), *([self.local] if begun else []))
    return self._program(one, self.mesh, ins, (self.local, names), (4,) if begun else ())

  def _arriving(self, fragment: int, begun: bool) -> Any:
    """Compiles the receipt of a due result: (held, result[, local]) -> (held, local)."""

    def one(held, result, *local):
      own = local[0] if begun else self.halves.waiting.begin(held)
      return self.halves.arrive(fragment, held, own, result)

    ins = (self.held, self.results[fragment], *([self.local] if begun else []))
    donate = (0, 2) if begun else (0,)
    return self._program(one, self.mesh, ins, (self.held, self.local), donate)

  def _departing(self, fragment: int) -> Any:
    """Compiles (round, key, held, local, data) -> (message, key data, weight, held, round + 1)."""
    names = P(tuple(self.axes))

    def one(number, key, held, local, data):
      weight = draw(self.job, data, key, number[None], collectives.worker_index()).weight[0]
      sync_key, presence = collectives.round_keys(key, number)[0], self._presence(weight)
      tree, held = self.halves.depart(fragment, local, held, key=sync_key, presence=presence)
      return tree, jax.random.key_data(sync_key), weight[None], self.halves.held(held), number + 1

    ins = (P(), P(), self.held, self.local, sharded.of_data(names))
    outs = (self.messages[fragment], P(), names, self.held, P())
    return self._program(one, self.mesh, ins, outs, (2, 3))

  def _exchanging(self, fragment: int) -> Any:
    """Compiles the exchange: (message, key data, weight, link) -> (result, link)."""
    names = P(tuple(self.axes))

    def one(tree, key, weight, link):
      presence = self.job.method.counted(self._presence(weight[0]))
      key = jax.random.wrap_key_data(key)
      found = self.halves.exchange.aggregate(tree, link, key, presence)
      return self.halves.result(found), found.state

    ins = (self.messages[fragment], P(), names, self.links[fragment])
    outs = (self.results[fragment], self.links[fragment])
    return self._program(one, self.other, ins, outs, (0, 3))

  def _presence(self, weight: Array) -> Presence:
    return EVERYONE if self.job.even else Presence(weight)

  @functools.cached_property
  def measuring(self) -> Any:
    """Compiles (measurements of the parts of rounds, held) -> metrics of a dispatch."""

    def one(parts, held):
      parts = [jax.tree.map(lambda x: x[0], part) for part in parts]
      measured = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
      return (workers.reduce_metrics(measured, workers.all_finite(held)),)

    return self._program(one, self.mesh, (P(tuple(self.axes)), self.held), (P(),), ())

  # ---- a run

  def departed(self, state: TrainState) -> Flight:
    """Moves the aggregator's state to the communication devices."""
    number = int(jax.device_get(state.round))
    links = zip(self.halves.links(state.method), self.links, strict=True)
    there = tuple(moved(link, parts.communicating) for link, parts in links)
    air = tuple(self.halves.pending(state.method, number))
    return Flight(state._replace(method=self.halves.held(state.method)), there, air, number, ())

  def settled(self, state: TrainState | Flight) -> TrainState:
    """Waits for the exchanges in flight, and returns the state of `spmd` after the same rounds."""
    if isinstance(state, TrainState):
      return state
    links = zip(state.links, self.links, strict=True)
    here = [moved(link, parts.computing) for link, parts in links]
    method = self.halves.settled(state.held.method, here, state.air, self.tools)
    return state.held._replace(method=method)

  @functools.cached_property
  def _receiving(self) -> Any:
    """Compiles the end of an eager method's exchange: (held, result) -> held."""
    one = lambda held, result: (self.halves.receive(held, result),)
    return self._program(one, self.mesh, (self.held, self.results[0]), (self.held,), ())

  def _receive(self, held: State, result: Tree) -> State:
    return self._receiving(held, result)[0]

  def _nothing(self, fragment: int) -> Tree:
    """Returns a fragment's result with all elements zero."""
    return self._zeros(self.results[fragment], here=True)

  def _zeros(self, parts: Parts, *, here: bool) -> Tree:
    """Returns zeros for all workers, on the computing devices or on the communication devices."""
    count = (meshes.count(self.axes),)
    rows = lambda p, x: jnp.zeros(count * p + x.shape, x.dtype)
    zeros = lambda: jax.tree.map(rows, parts.private, parts.shapes)
    return sharded.jit(zeros, out_shardings=parts.computing if here else parts.communicating)()

  def run(self, state: TrainState | Flight, data: Data, rounds: int) -> tuple[Flight, Metrics]:
    """Dispatches K rounds; the exchanges of the last rounds may still be in flight afterwards."""
    flight = state if isinstance(state, Flight) else self.departed(state)
    measured: list[Metrics] = []
    for _ in range(rounds):
      flight, found = self._round(flight, data, self._exchanged)
      measured += found
    return flight, self.measuring(measured, flight.held.method)[0]

  def _exchanged(self, fragment: int, sent: Sequence[Tree], link: State) -> tuple[Tree, State]:
    """Starts an exchange: (message, key data, weight) and link -> (result, link)."""
    rest = NamedSharding(self.other, P()), NamedSharding(self.other, P(tuple(self.axes)))
    there = moved(tuple(sent), (self.messages[fragment].communicating, *rest))
    result, link = self.exchanging(fragment)(*there, link)
    return moved(result, self.results[fragment].computing), link

  def _round(
    self, flight: Flight, data: Data, exchange: Callable[..., tuple[Tree, State]]
  ) -> tuple[Flight, list[Metrics]]:
    halves, fragment = self.halves, flight.number % self.halves.fragments
    (number, key, held), air, measured = flight.held, flight.air, []
    local: list[Any] = []  # the workers' Local, once the round has begun

    def steps(first: int, last: int) -> None:
      nonlocal local
      if first < last:
        run = self.stepping(first, last, bool(local))
        *local, found = run(number, key, held, data, *local)
        measured.append(found)

    steps(0, halves.steps_late)
    if len(air) > halves.rounds_late:
      (which, result), *air = air
      held, *local = self.arriving(which, bool(local))(held, result, *local)
    steps(halves.steps_late, halves.local_steps)
    *sent, held, number = self.departing(fragment)(number, key, held, *local, data)
    result, link = exchange(fragment, sent, flight.links[fragment])
    links = (*flight.links[:fragment], link, *flight.links[fragment + 1 :])
    air = (*air, (fragment, result))
    recent = (*flight.recent, measured[-1]["loss"])[-2:]
    jax.block_until_ready(recent[0])  # the host is at most two rounds ahead
    return Flight(TrainState(number, key, held), links, air, flight.number + 1, recent), measured

  def alone(self, state: TrainState | Flight, data: Data) -> tuple[float, float]:
    """Measures the time of a local step alone, and of the exchange alone, per local step.

    Args:
      state: the state of the run; the function advances only a copy.
      data: as for `run`.

    Returns:
      The seconds per local step of computing and of the exchange, medians of three turns.
    """
    every = range(self.halves.fragments)
    results = [self.tools.nothing(p) for p in every]
    messages = [self._zeros(self.messages[p], here=True) for p in every]
    flight = self.departed(jax.tree.map(jnp.copy, self.settled(state)))
    make_key = lambda: jax.random.key_data(jax.random.key(0))
    key = sharded.jit(make_key, out_shardings=NamedSharding(self.mesh, P()))()
    weight = self._zeros(self._parts(True, jax.ShapeDtypeStruct((), jnp.float32)), here=True)

    def compute() -> Any:
      nonlocal flight
      for _ in every:
        flight, _ = self._round(flight, data, lambda p, sent, link: (results[p], link))
      return flight.held

    links = list(flight.links)

    def exchange() -> Any:
      found = []
      for p in every:
        result, links[p] = self._exchanged(p, (messages[p], key, weight), links[p])
        found.append(result)
      return found

    steps = len(every) * self.halves.local_steps
    return _median_seconds(compute) / steps, _median_seconds(exchange) / steps


def _median_seconds(run: Callable[[], Any]) -> float:
  """Returns the median seconds of three calls, after one warm-up call."""
  found = []
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(run())
    found.append(time.perf_counter() - start)
  return statistics.median(found[1:])


def _halves(method: Method) -> Halves:
  return LateHalves(method) if isinstance(method, Overlapping) else Halves(method)


def _own(private: Tree, tree: Tree) -> Tree:
  """Returns one worker's leaves: removes the leading dimension of private leaves."""
  return jax.tree.map(lambda p, x: x[0] if p else x, private, tree)


def _rows(private: Tree, tree: Tree) -> Tree:
  return jax.tree.map(lambda p, x: x[None] if p else x, private, tree)
