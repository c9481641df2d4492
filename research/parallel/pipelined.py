"""Runs rounds of one worker so that a compiler can overlap an exchange with the next local phase.

At the end of the body of a loop over rounds, an exchange cannot overlap with anything: the next
local steps belong to the next iteration. Here, the body starts with the exchange of the previous
round's message, which the loop carries, and the local phase is split at the step at which the
result is due:

    first round:   steps, message
    other rounds:  exchange | steps [0, tau); receive; steps [tau, h); message
    at the end:    exchange

The results and the number of exchanges are those of `workers.rounds_of_worker`. Between TPU slices,
XLA sends while it computes the first steps. XLA:CPU overlaps nothing, so the sequential form is
used there, because it compiles faster.

With several fragments, the fragment of each exchange is static, so that no exchange is inside a
conditional.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from research.comm import collectives
from research.comm import mesh as meshes
from research.core.base import EVERYONE, Aggregate, Array, Key, Presence, State, Tree
from research.core.method import Local, Method
from research.core.task import Data, Metrics, TrainState
from research.methods.overlapping import Overlapping
from research.parallel import overlapped, sharded, workers
from research.parallel.cohorts import Draw, draw
from research.parallel.halves import Halves
from research.parallel.job import Job
from research.parallel.layout import Layout
from research.parallel.local_phase import local_phase


class Sending(NamedTuple):
  """A message whose exchange has not started, with the other inputs of the exchange."""

  tree: Tree
  weight: Array  # of this worker
  key: Array  # data of the round's key


class Pieces:
  """The parts of a round of an eager method, whose exchange is due before the next message."""

  def __init__(self, method: Method):
    self.method, self.waiting = method, method
    self.fragments, self.steps_early = 1, method.local_steps

  def message(
    self, fragment: int, local: Local, state: State, key: Key, presence: Presence
  ) -> tuple[Tree, State]:
    """Ends a round: returns a fragment's message, and the state without the exchange's result."""
    del fragment
    return self.method.message(local, state, key=key, presence=presence)

  def link(self, fragment: int, state: State) -> State:
    """Returns the aggregator's state for a fragment."""
    del fragment
    return self.method.link(state)

  def landed(
    self, fragment: int, state: State, found: Aggregate, key: Key, presence: Presence
  ) -> State:
    """Returns the state after an exchange."""
    del fragment
    state = self.method.with_link(state, found.state)
    return self.method.receive(found.value, found.sent, state, key=key, presence=presence)

  def arrived(self, fragment: int, local: Local, state: State) -> Local:
    """Receives the result that is due in a round of `fragment`, if any; returns the Local."""
    del fragment, state
    return local


class LatePieces(Pieces):
  """The parts of a round of `late(...)` and `streaming_diloco`."""

  method: Overlapping

  def __init__(self, method: Overlapping):
    super().__init__(method)
    self.waiting = method.replace(receives=False)
    self.fragments, self.steps_early = method.fragments, method.steps_late

  def message(self, fragment, local: Any, state, key, presence):
    return self.method.depart(fragment, local, state, key=key, presence=presence)

  def link(self, fragment, state):
    return self.method.method.link(state.inner[fragment])

  def landed(self, fragment, state, found, key, presence):
    del key, presence
    inner = list(state.inner)
    inner[fragment] = self.method.method.with_link(inner[fragment], found.state)
    return self.method.landed(fragment, state._replace(inner=tuple(inner)), found.value)

  def arrived(self, fragment, local: Any, state):
    due = (fragment - 1 - self.method.rounds_late) % self.fragments
    value = state.air[due][0]
    receive = lambda local: self.method.arrive(due, local, value)
    started = state.count > self.method.rounds_late  # otherwise, nothing is due yet
    return lax.cond(started, receive, lambda local: local, local)


class Phased:
  """A program of K rounds, in which the fragment of the first round is static.

  The host needs the number of completed rounds. It reads this number from a state only if the state
  is not the one that the program returned last.
  """

  def __init__(self, run: Any, method: Method):
    self._run = run
    self.fragments = method.fragments if isinstance(method, Overlapping) else 1
    self._known: tuple[Array | None, int] = None, 0

  def __call__(self, state: TrainState, data: Data, rounds: int) -> tuple[TrainState, Metrics]:
    known, number = self._known
    if self.fragments > 1 and state.round is not known:
      number = int(jax.device_get(state.round))
    found = self._run(state, data, rounds=rounds, first=number % self.fragments)
    self._known = found[0].round, number + rounds
    return found

  def trace(self, state: TrainState, data: Data, rounds: int) -> Any:
    """Traces a dispatch that starts at round 0."""
    return self._run.trace(state, data, rounds=rounds, first=0)


def rounds_shown(run: Any) -> int:
  """Returns the smallest number of rounds for which a program repeats its loop over rounds.

  Args:
    run: an executor's `run`.
  """
  return 1 + 2 * run.fragments if isinstance(run, Phased) else 1


def overlaps(job: Job, layout: Layout, mesh: Mesh) -> bool:
  """Returns whether the rounds of a job are run in the pipelined form on a mesh.

  A method that declares itself eager is checked by tracing: if its local steps use what the
  exchange changes, its rounds run in sequence.

  Args:
    job: the resolved job.
    layout: the shapes of the job's state.
    mesh: the mesh that the program is compiled for.
  """
  if mesh.devices.flat[0].platform == "cpu" or not job.method.hidden_steps:
    return False
  try:
    overlapped.check(job)
    if not isinstance(job.method, Overlapping):
      _check_eager(job, layout)
  except ValueError:
    return False
  return True


def _check_eager(job: Job, layout: Layout) -> None:
  """Rejects a method whose local steps use what its exchange changes; see `Halves.check`."""
  method, state = job.method, layout.state_shapes
  axes = meshes.worker_axes(job.axes)

  def message(state: State) -> Tree:
    return method.message(method.begin(state), state, key=jax.random.key(0))[0]

  trace = jax.make_jaxpr(message, axis_env=[*axes.items()], return_shape=True)
  tree = trace(state)[1]
  Halves(method).check(state, (tree, tree), axes)


def rounds_of_worker(
  job: Job,
  private: Tree,
  state: TrainState,
  data: Data,
  rounds: int,
  inside: sharded.Inside = sharded.ALONE,
  first: int = 0,
) -> tuple[TrainState, dict[str, Array]]:
  """Runs K rounds as one worker of `shard_map`; see `workers.rounds_of_worker`.

  Args:
    job: the resolved job, for which `overlaps` is true.
    private: a tree of bool that tells which leaves of the state are private.
    state: the worker's state, whose private leaves are rows [1, ...].
    data: the worker's examples, rows [1, ...].
    rounds: K, the number of rounds.
    inside: sharding constraints inside the worker.
    first: the fragment of the first round's exchange, static.

  Returns:
    The new state, and the metrics in the form of `workers.as_metrics`.
  """
  of_rounds = state.round + jnp.arange(rounds, dtype=jnp.int32)
  lots = draw(job, data, state.key, of_rounds, collectives.worker_index())
  run = _Rounds(job, data, state.key, inside)
  count, fragment = run.pieces.fragments, lambda i: (first + i) % run.pieces.fragments
  at = lambda i: jax.tree.map(lambda x: x[i], (of_rounds, lots))

  def group(held, of_group):
    found = []
    for i in range(count):
      of_round = jax.tree.map(lambda x, i=i: x[i], of_group)
      held, measured = run.later(fragment(1 + i), held[0], held[1], *of_round)
      found.append(measured)
    return held, jax.tree.map(lambda *xs: jnp.stack(xs), *found)

  method = workers.pick(private, state.method, jnp.int32(0))
  held, measured = run.first(fragment(0), method, *at(0))
  found = [jax.tree.map(lambda x: x[None], measured)]
  groups = (rounds - 1) // count
  if groups:
    split = lambda x: x[1 : 1 + groups * count].reshape(groups, count, *x.shape[1:])
    held, measured = lax.scan(group, held, jax.tree.map(split, (of_rounds, lots)))
    found.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), measured))
  for i in range(1 + groups * count, rounds):
    held, measured = run.later(fragment(i), held[0], held[1], *at(i))
    found.append(jax.tree.map(lambda x: x[None], measured))

  after, sending = held
  last = fragment(rounds - 1)
  after = run.landed(last, after, sending, run.exchanged(after, sending, last))
  method = workers.put(private, state.method, jnp.int32(0), after)
  every = jax.tree.map(lambda *xs: jnp.concatenate(xs), *found)
  finite = workers.all_finite(method)
  metrics = workers.reduce_metrics(workers.shared_out(every, lots.share), finite)
  return TrainState(state.round + rounds, state.key, method), metrics


class _Rounds:
  """Runs single rounds of one worker."""

  def __init__(self, job: Job, data: Data, key: Key, inside: sharded.Inside):
    method = job.method
    self.pieces = LatePieces(method) if isinstance(method, Overlapping) else Pieces(method)
    self.job, self.data, self.key, self.inside = job, data, key, inside
    self.waiting = job._replace(method=self.pieces.waiting)

  def first(
    self, fragment: int, state: State, number: Array, lot: Draw
  ) -> tuple[tuple[State, Sending], Metrics]:
    """Runs a dispatch's first round, during which nothing is exchanged."""
    early = self._early(state, number, lot)
    return self._rest(fragment, early, state, number, lot)

  def later(
    self, fragment: int, state: State, sending: Sending, number: Array, lot: Draw
  ) -> tuple[tuple[State, Sending], Metrics]:
    """Runs a round that starts with the exchange of the previous round's message."""
    before = (fragment - 1) % self.pieces.fragments
    result = self.exchanged(state, sending, before)
    early = self._early(state, number, lot)
    state = self.landed(before, state, sending, result)
    return self._rest(fragment, early, state, number, lot)

  def exchanged(self, state: State, sending: Sending, fragment: int) -> Aggregate:
    """Exchanges the messages of a fragment."""
    presence = self.job.method.counted(self._presence(sending.weight))
    link = self.pieces.link(fragment, state)
    return self.job.method.exchange.aggregate(sending.tree, link, _key(sending), presence)

  def landed(self, fragment: int, state: State, sending: Sending, result: Aggregate) -> State:
    """Returns the state after an exchange."""
    presence = self._presence(sending.weight)
    return self.pieces.landed(fragment, state, result, _key(sending), presence)

  def _early(self, state: State, number: Array, lot: Draw) -> tuple[Local, list[Metrics]]:
    """Runs the steps that do not need the result of the exchange."""
    if not self.pieces.steps_early:
      return self.waiting.method.begin(state), []
    local, measured = self._steps(state, number, lot, last=self.pieces.steps_early)
    return local, [measured]

  def _rest(
    self, fragment: int, early: tuple[Local, list[Metrics]], state: State, number: Array, lot: Draw
  ) -> tuple[tuple[State, Sending], Metrics]:
    """Ends a round: receives the due result, runs the remaining steps, and returns a message."""
    (local, found), first = early, self.pieces.steps_early
    local = self.pieces.arrived(fragment, local, state)
    if first < self.waiting.method.local_steps:
      local, measured = self._steps(state, number, lot, begun=(first, local))
      found = [*found, measured]
    key = collectives.round_keys(self.key, number)[0]
    tree, state = self.pieces.message(fragment, local, state, key, self._presence(lot.weight))
    sending = Sending(tree, lot.weight, jax.random.key_data(key))
    return (state, sending), jax.tree.map(lambda *xs: jnp.concatenate(xs), *found)

  def _steps(self, state: State, number: Array, lot: Draw, **cut: Any) -> tuple[Local, Metrics]:
    step_key = collectives.round_keys(self.key, number)[1]
    examples = jax.tree.map(lambda x: x[0], self.data.examples)
    args = state, examples, self.data.sizes[lot.owner], lot.index
    return local_phase(self.waiting, *args, collectives.worker_key(step_key), self.inside, **cut)

  def _presence(self, weight: Array) -> Presence:
    return EVERYONE if self.job.even else Presence(weight)


def _key(sending: Sending) -> Key:
  return jax.random.wrap_key_data(sending.key)
