"""Executor that runs the exchanges on separate devices while the workers compute.

Every computing device has a communication device: a CPU device has another CPU device of the
process, and an accelerator has a CPU device of the host. The exchange is a separate program on the
communication devices, which hold the aggregator's state. All programs are dispatched asynchronously
from one Python thread, and no program waits for the result of an exchange before the result is due.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm import mesh as meshes
from research.core.base import Array, State, Tree
from research.core.task import Data, Executor, Metrics, TrainState
from research.methods.overlapping import Overlapping
from research.parallel import inference, sharded, workers
from research.parallel.communication import moved, two_meshes
from research.parallel.flight_programs import Programs
from research.parallel.job import Job, resolved


class Flight(NamedTuple):
  """The state of a run between two rounds, with its exchanges in flight."""

  held: TrainState  # on the computing devices, without the aggregator's state
  links: tuple[State, ...]  # the aggregator's state by fragment, on the communication devices
  air: tuple[tuple[int, Tree], ...]  # fragment and result of each exchange, the oldest first
  number: int  # completed rounds
  recent: tuple[Array, ...]  # losses of the latest rounds
  metrics: Metrics  # of the latest dispatch


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
  check(job)
  mesh, other = two_meshes(job)
  job, layout = resolved(job), inference.layout_of(job)
  return _Overlapped(job, layout, mesh, other).executor()


def check(job: Job) -> None:
  """Rejects a job whose exchanges cannot overlap, without using devices.

  Args:
    job: the job.

  Raises:
    ValueError: if the method waits for its exchange, or not all workers take part in every round.
  """
  method = job.method
  if not isinstance(method, Overlapping) and not (method.eager and method.splits):
    raise ValueError(
      f"{method.title} waits for its exchange; use late({method.title}(...), delay=...), "
      "streaming_diloco, eager_diloco or overlap_local_sgd"
    )
  if method.later:
    raise ValueError("an overlapped run needs a constant period")
  if job.misses or len(job.sizes) > job.workers or job.by_epochs:
    raise ValueError(
      "in an overlapped run all workers take part in every round, with equally many steps; use "
      "--executor=simulate for a population, dropout or passes over unequal data"
    )
  if job.diagnostics:
    raise ValueError("does not support --diagnostics; use --executor=spmd")


class _Overlapped(Programs):
  """Runs the programs of one job."""

  def executor(self) -> Executor:
    """Returns the job's executor, whose state is a `Flight` after the first round."""
    job, layout = self.job, self.layout
    names = tuple(self.axes)
    whole = sharded.of_state(layout.state, self.mesh, names, layout.state_shapes, self.cut)
    once = meshes.options_to_run_once(self.mesh)
    init = sharded.jit(self.initial, out_shardings=whole, compiler_options=once)
    deployed = lambda state: workers.deployed(job, layout, state.method)
    lies = lambda x: NamedSharding(self.mesh, P(*sharded.spec_of(self.cut, x.shape)))
    model = jax.eval_shape(job.task.init, jax.random.key(0))
    params = sharded.jit(deployed, out_shardings=jax.tree.map(lies, model))
    place = partial(sharded.place, self.mesh, names)
    of_flight = lambda state: params(self.settled(state))
    return Executor(init, place, self.run, of_flight, layout, self.settled, self.alone)

  def departed(self, state: TrainState) -> Flight:
    """Moves the aggregator's state to the communication devices."""
    number = int(jax.device_get(state.round))
    links = zip(self.halves.links(state.method), self.links, strict=True)
    there = tuple(moved(link, parts.communicating) for link, parts in links)
    air = tuple(self.halves.pending(state.method, number))
    return Flight(state._replace(method=self.halves.held(state.method)), there, air, number, (), {})

  def settled(self, state: TrainState | Flight) -> TrainState:
    """Waits for the exchanges in flight; returns the state that `spmd` has after these rounds."""
    if isinstance(state, TrainState):
      return state
    _in_order(state)
    links = zip(state.links, self.links, strict=True)
    here = [moved(link, parts.computing) for link, parts in links]
    method = self.halves.settled(state.held.method, here, state.air, self.tools)
    return state.held._replace(method=method)

  def run(self, state: TrainState | Flight, data: Data, rounds: int) -> tuple[Flight, Metrics]:
    """Dispatches K rounds; the exchanges of the last rounds may still be in flight afterwards."""
    flight = state if isinstance(state, Flight) else self.departed(state)
    measured: list[Metrics] = []
    for _ in range(rounds):
      flight, found = self._round(flight, data, self._exchanged)
      measured += found
    _in_order(flight)
    metrics = self.measuring(measured, flight.held.method)[0]
    return flight._replace(metrics=metrics), metrics

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
    held = TrainState(number, key, held)
    return Flight(held, links, air, flight.number + 1, recent, flight.metrics), measured

  def alone(self, state: TrainState | Flight, data: Data) -> tuple[float, float]:
    """Measures the computation alone and the exchange alone, in seconds per local step.

    Args:
      state: the state of the run; the function advances only a copy.
      data: as for `run`.

    Returns:
      The time of the computation and the time of the exchange; each is a median of three
      measurements.
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


def _in_order(flight: Flight) -> None:
  """Waits for the metrics of the latest dispatch, before computing devices communicate again.

  XLA may start a small program before an earlier one has ended. In a process with one computing
  device, nothing else keeps the collectives of the two programs in the same order everywhere.
  """
  jax.block_until_ready(flight.metrics)


def _median_seconds(run: Callable[[], Any]) -> float:
  """Returns the median seconds of three calls, after one warm-up call."""
  found = []
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(run())
    found.append(time.perf_counter() - start)
  return statistics.median(found[1:])
