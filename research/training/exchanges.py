"""Computes how long the exchanges of a job take on a simulated network, from the traced program."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from research.analysis import wire
from research.comm import mesh as meshes
from research.comm.topology import Shift, Topology
from research.parallel import inference, traffic
from research.parallel.job import Job
from research.sim.exchange import along_links, around_ring, through_servers
from research.sim.network import Links, Network

_PIECE = 2**10  # rounds whose traffic is read at once


class Phase(NamedTuple):
  """Consecutive collectives of the same kind, whose messages are sent together."""

  operation: str
  axes: tuple[str, ...]
  payload: float  # bytes of one worker's operands
  sent: float  # bytes that one worker sends on average, as `wire` counts them


def phases(transfers: Sequence[wire.Transfer], factor: float) -> tuple[Phase, ...]:
  """Merges consecutive transfers of the same operation over the same axes.

  Args:
    transfers: the transfers of one round, in the order of the program.
    factor: a factor of all bytes.
  """
  found = []
  kinds = itertools.groupby(wire.happened(transfers), lambda t: (t.operation, t.axes))
  for (operation, axes), group in kinds:
    own = list(group)
    payload = factor * sum(t.payload * t.times for t in own)
    found.append(Phase(operation, axes, payload, factor * sum(t.total for t in own)))
  return tuple(phase for phase in found if phase.payload)


class Program(NamedTuple):
  """What the traced program of one stage of a run sends."""

  job: Job
  rounds: wire.RoundTraffic
  graphs: tuple[Topology, ...]  # the different topologies of the method


def traced(job: Job) -> Program:
  """Traces a round of a job.

  Args:
    job: the resolved job; its `present` says whether workers may be absent.
  """
  rounds = traffic.by_round(job, inference.layout_of(job))
  return Program(job, rounds, tuple(dict.fromkeys(job.method.parts(Topology))))


class Exchanges:
  """The exchanges of one stage of a run on a network.

  A collective runs through servers or on rings, as the network says. With a server, each worker
  sends its operand and receives the result; collectives within a slice have a server in the region
  of the slice, and all others share one server in the network's first region. On a ring, the
  present workers pass on the bytes that `wire.ring_share` gives. A permutation sends its operand
  along the links of the method's topology. The next phase of an exchange begins when all workers
  have finished the phase.
  """

  def __init__(self, program: Program, network: Network, links: Links, seed: int):
    """Creates the exchanges.

    Args:
      program: the traced program; the same program can serve several networks.
      network: the network.
      links: the links of the job's workers.
      seed: seeds the rounds of topologies whose rounds are drawn.
    """
    self._network, self._links, self._seed = network, links, seed
    self._axes = meshes.worker_axes(program.job.axes)
    self._rounds, self._graphs = program.rounds, program.graphs
    self._by_bytes: dict[float, tuple[Phase, ...]] = {}
    self._first, self._sent = 0, np.zeros(0)
    self._alike: dict[tuple[tuple[Phase, ...], int], float] = {}

  def phases(self, number: int) -> tuple[Phase, ...]:
    """Returns what the workers send in a round.

    Rounds in which a worker sends equally many bytes are assumed to run the same collectives.

    Args:
      number: the number of the round.
    """
    if self._rounds.each is None and not self._first <= number < self._first + len(self._sent):
      self._first = number
      self._sent = self._rounds.between(number, number + _PIECE).sent
    each = self._rounds.each
    sent = float(self._sent[number - self._first]) if each is None else each
    if sent not in self._by_bytes:
      transfers = self._rounds.between(number, number + 1).transfers
      self._by_bytes[sent] = phases(transfers, self._network.factor)
    return self._by_bytes[sent]

  def seconds(self, number: int, present: np.ndarray) -> float:
    """Computes how long the exchange of a round takes.

    Args:
      number: the number of the round.
      present: whether each worker takes part, bool [W].
    """
    found = self.phases(number)
    if not present.all():
      return sum(self._seconds(phase, number, present) for phase in found)
    key = found, self._round_of_graph(number)
    if key not in self._alike:
      self._alike[key] = sum(self._seconds(phase, number, present) for phase in found)
    return self._alike[key]

  def sending(self, number: int) -> np.ndarray:
    """Returns how long each worker needs to send its messages of a round at its full rate, [W].

    Args:
      number: the number of the round.
    """
    sent = sum(self._up(phase) for phase in self.phases(number))
    return sent / self._links.upload

  def _up(self, phase: Phase) -> float:
    """Returns the bytes that a worker sends in a phase."""
    if self._network.way == "server" and phase.operation in ("all-reduce", "all-gather"):
      return phase.payload
    return phase.sent

  def _round_of_graph(self, number: int) -> int:
    """Returns which round of its period a topology is in; 0 without a topology."""
    if not self._graphs:
      return 0
    graph, period = self._graphs[0], len(self._graph_rounds)
    drawn = np.random.default_rng([self._seed, number])
    return int(drawn.integers(period)) if graph.drawn else number % period

  @functools.cached_property
  def _graph_rounds(self) -> list[list[Shift]]:
    return self._graphs[0].rounds(math.prod(self._axes.values()))

  def _seconds(self, phase: Phase, number: int, present: np.ndarray) -> float:
    groups = self._groups(phase.axes)
    if phase.operation == "permute":
      return self._permuted(phase, number, present)
    if self._network.way == "ring":
      rings = [group[present[group]] for group in groups]
      return max(self._around(phase, ring) for ring in rings)
    return self._through_servers(phase, groups, present)

  def _groups(self, axes: tuple[str, ...]) -> np.ndarray:
    """Returns the workers of each group that communicates over some axes, int [groups, n]."""
    names = list(self._axes)
    grid = np.arange(math.prod(self._axes.values())).reshape(list(self._axes.values()))
    inside = [names.index(axis) for axis in axes]
    outside = [place for place in range(len(names)) if place not in inside]
    ordered = grid.transpose(*outside, *inside)
    return ordered.reshape(-1, math.prod(self._axes[axis] for axis in axes))

  def _around(self, phase: Phase, ring: np.ndarray) -> float:
    count = len(ring)
    if count < 2:
      return 0.0
    sent = wire.ring_share(phase.operation, count) * phase.payload
    hops = (2 if phase.operation == "all-reduce" else 1) * (count - 1)
    return around_ring(self._links, ring, sent, hops)

  def _through_servers(self, phase: Phase, groups: np.ndarray, present: np.ndarray) -> float:
    count, payload = groups.shape[1], phase.payload
    if count < 2:
      return 0.0
    passed_on = wire.ring_share(phase.operation, count) * payload
    down = {
      "all-reduce": payload,
      "reduce-scatter": payload / count,
      "all-gather": passed_on,
      "all-to-all": passed_on,
    }[phase.operation]
    within = "slice" in self._axes and "slice" not in phase.axes
    servers = np.zeros(groups.size, int)
    if within:
      servers[groups] = np.arange(len(groups))[:, None]
    regions = self._links.region[groups[:, 0]] if within else np.zeros(1, int)
    workers = np.flatnonzero(present)
    rate = self._network.server_rate
    up = self._up(phase)
    return through_servers(self._links, workers, servers[workers], regions, up, down, rate)

  def _permuted(self, phase: Phase, number: int, present: np.ndarray) -> float:
    if len(self._graphs) != 1 or phase.axes != tuple(self._axes):
      raise ValueError(
        "workers send to single other workers, and not along one topology over all workers: the "
        "links of the messages are not known"
      )
    senders, receivers = self._links_of_round(self._round_of_graph(number))
    size = phase.sent * len(present) / len(senders)
    both = present[senders] & present[receivers]
    return along_links(self._links, senders[both], receivers[both], size)

  def _links_of_round(self, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the senders and the receivers of a round of the topology."""
    count, pairs = math.prod(self._axes.values()), []
    for offset, weights in self._graph_rounds[place]:
      if offset:
        receivers = np.flatnonzero(weights)
        pairs.append(((receivers - offset) % count, receivers))
    senders, receivers = zip(*pairs, strict=True)
    return np.concatenate(senders), np.concatenate(receivers)


def push_bytes(job: Job, factor: float) -> float:
  """Returns the bytes of a worker's message to a server that serves one worker at a time.

  Args:
    job: the resolved job, whose mesh has one worker.
    factor: a factor of all bytes.
  """
  transfers = traffic.of_method(job, inference.layout_of(job), 1).transfers
  return factor * sum(t.payload * t.times for t in transfers)


def pull_bytes(job: Job, factor: float) -> float:
  """Returns the bytes of a model, which a server sends as its reply.

  Args:
    job: the job.
    factor: a factor of all bytes.
  """
  params = jax.eval_shape(job.task.init, jax.random.key(0))
  return factor * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
