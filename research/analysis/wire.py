"""Reads the traffic of a traced program; bytes are computed from shapes and dtypes.

A transfer's payload is one worker's operand of the collective. The bytes that a worker sends depend
on the collective's algorithm. We assume rings, which attain the lower bound for every collective
(Patarasuk and Yuan 2009; Chan et al. 2007). For n bytes and W workers, a worker sends:

    all-reduce  2 (W-1)/W n      reduce-scatter  (W-1)/W n      all-gather  (W-1) n
    all-to-all    (W-1)/W n      permute         n per edge that leaves the worker, on average
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from research.analysis import rounds as of_rounds

_SHORTEST = 2**10  # minimum length of arrays over rounds: each length is compiled separately
# Collective primitives -> operation; the names depend on check_vma and the JAX version.
_OPERATIONS = {
  "psum": "all-reduce",
  "psum2": "all-reduce",
  "psum_invariant": "all-reduce",
  "pmax": "all-reduce",
  "pmin": "all-reduce",
  "reduce_scatter": "reduce-scatter",
  "psum_scatter": "reduce-scatter",
  "all_gather": "all-gather",
  "all_gather_invariant": "all-gather",
  "all_to_all": "all-to-all",
  "ppermute": "permute",
}


class Transfer(NamedTuple):
  """One collective of a program, with the number of times that the program runs it."""

  operation: str
  axes: tuple[str, ...]  # mesh axes
  dtype: str
  payload: int  # bytes of one worker's operand
  sent: float  # bytes that one worker sends on a ring
  times: int

  @property
  def total(self) -> float:
    """Total bytes that one worker sends."""
    return self.sent * self.times


class Traffic(NamedTuple):
  """Traffic of one worker in several rounds."""

  transfers: list[Transfer]  # transfers of all these rounds together
  sent: np.ndarray  # [rounds], bytes sent in each round


def traffic(program: Callable[..., Any], *args: Any, axes: Mapping[str, int]) -> list[Transfer]:
  """Returns every transfer of one worker's program.

  Args:
    program: one worker's program, with collectives over `axes`; traced, not run.
    *args: arrays or shapes.
    axes: sizes of the worker axes by name.

  Raises:
    ValueError: if a collective is in a loop whose length is not static, or in branches of a
      conditional that communicate differently, so that the traffic is not statically known.
  """
  jaxpr = jax.make_jaxpr(program, axis_env=list(axes.items()))(*args)
  reader = _Reader(axes, np.ones(1, np.int64))
  reader.read(jaxpr, [None] * len(jaxpr.jaxpr.invars), reader.runs)
  return happened(reader.transfers)


def axes_of(program: Callable[..., Any], *args: Any, axes: Mapping[str, int]) -> set[str]:
  """Returns the axes of a program's collectives, in all branches. Args: see `traffic`."""

  def found(jaxpr: core.Jaxpr) -> set[str]:
    ours = [_axis_names(eqn) for eqn in jaxpr.eqns if eqn.primitive.name in _OPERATIONS]
    inner = [found(p.jaxpr) for eqn in jaxpr.eqns for p in of_rounds.programs(eqn)]
    return set().union(*ours, *inner)

  return found(jax.make_jaxpr(program, axis_env=list(axes.items()))(*args).jaxpr)


def happened(transfers: Iterable[Transfer]) -> list[Transfer]:
  """Drops transfers that the program never runs.

  Args:
    transfers: all transfers of a program.
  """
  return [transfer for transfer in transfers if transfer.times]


class RoundTraffic:
  """Traffic of one worker in any range of rounds, even if it depends on the round's number.

  The program is traced once. If the branches of a conditional communicate differently, its
  predicate is evaluated as a function of the state's counters: scalar integers that start from zero
  and that the program verifiably increments by one in every round.
  """

  def __init__(
    self,
    program: Callable[..., Any],
    state: Any,
    *args: Any,
    axes: Mapping[str, int],
    first: Callable[[], Any],
    copies: int = 1,
  ):
    """Traces the program.

    Args:
      program: (state, *args) -> state, one round of one worker; traced, not run.
      state: shapes of one worker's state.
      *args: shapes of the other arguments.
      axes: sizes of the worker axes by name.
      first: returns the initial state, of which only scalar integers are computed.
      copies: the number of devices of a worker that each send all of its messages.
    """
    self._axes, self._copies = axes, copies
    self._program = jax.make_jaxpr(program, axis_env=list(axes.items()))(state, *args)
    self._alike: Traffic | None = None  # traffic of each round, if all rounds are equal
    self._counters: set[int] | None = None  # indices of the inputs that count rounds
    try:
      reader = _Reader(axes, np.ones(1, np.int64))
      reader.read(self._program, [None] * len(self._program.jaxpr.invars), reader.runs)
      self._alike = reader.traffic()
    except of_rounds.Unknown:
      self._counters = of_rounds.counters(self._program, of_rounds.zeros(first))

  @property
  def each(self) -> float | None:
    """Bytes sent per round, if all rounds are equal, else None."""
    return None if self._alike is None else self._copies * float(self._alike.sent[0])

  def between(self, first: int, last: int) -> Traffic:
    """Returns the traffic of the rounds first, ..., last - 1.

    The list of transfers is always the same; `times` is 0 for those that these rounds do not run.
    The memory required grows with last - first, unless all rounds are equal.

    Raises:
      ValueError: if the predicate of a conditional depends on anything but counters; see also
        `traffic`.
    """
    count = last - first
    if self._alike is not None:
      transfers = [t._replace(times=t.times * count) for t in self._alike.transfers]
      sent = np.broadcast_to(self._copies * self._alike.sent[0], (count,))
      return Traffic(copied(transfers, self._copies), sent)
    length = max(_SHORTEST, 1 << max(count - 1, 0).bit_length())
    numbers = np.minimum(first + np.arange(length), max(last - 1, first))
    runs = (np.arange(length) < count).astype(np.int64)
    found: list[_Reader] = []

    def read(known: of_rounds.Known) -> of_rounds.Known:
      found.append(_Reader(self._axes, runs))
      return found[-1].read(self._program, known, runs)

    assert self._counters is not None
    self._counters = of_rounds.with_counters(read, self._program, self._counters, numbers)
    transfers, sent = found[-1].traffic()
    return Traffic(copied(transfers, self._copies), self._copies * sent[:count])


def copied(transfers: list[Transfer], copies: int) -> list[Transfer]:
  """Returns the transfers of several devices that send the same messages.

  Args:
    transfers: the transfers of one device.
    copies: the number of devices.
  """
  return [t._replace(payload=copies * t.payload, sent=copies * t.sent) for t in transfers]


class _Reader:
  """Traverses a program once for all rounds; `runs` [rounds] counts the runs of a part by round."""

  def __init__(self, axes: Mapping[str, int], runs: np.ndarray):
    self.axes, self.runs = dict(axes), runs
    self.transfers: list[Transfer] = []
    self.sent = np.zeros(len(runs))

  def traffic(self) -> Traffic:
    """The recorded traffic."""
    return Traffic(self.transfers, self.sent)

  def read(
    self, program: core.ClosedJaxpr, known: of_rounds.Known, runs: np.ndarray
  ) -> of_rounds.Known:
    """Records the transfers of a program; returns its known outputs."""
    values = of_rounds.Values(program, known, len(runs))
    for eqn in program.jaxpr.eqns:
      name = eqn.primitive.name
      if name in _OPERATIONS:
        self._collective(eqn, runs)
      elif name == "cond":
        values.write(eqn, self._condition(eqn, values, runs))
      else:
        self._refuse_unknown(eqn)
        values.write(eqn, values.evaluated(eqn) or self._inside(eqn, values, runs))
    return values.of(program.jaxpr.outvars)

  def _condition(self, eqn: Any, values: of_rounds.Values, runs: np.ndarray) -> of_rounds.Known:
    index, *operands = values.of(eqn.invars)
    branches = eqn.params["branches"]
    if index is None:
      readers = [_Reader(self.axes, runs) for _ in branches]
      for branch, reader in zip(branches, readers, strict=True):
        reader.read(branch, operands, runs)
      first = readers[0]
      alike = lambda r: happened(r.transfers) == happened(first.transfers)
      if any(not alike(r) or (r.sent != first.sent).any() for r in readers):
        raise of_rounds.Unknown("the branches of a condition communicate differently")
      self._add(first.transfers, first.sent)
      return [None] * len(eqn.outvars)
    outputs = [
      self.read(branch, operands, np.where(index == number, runs, 0))
      for number, branch in enumerate(branches)
    ]
    return of_rounds.chosen(index, outputs)

  def _inside(self, eqn: Any, values: of_rounds.Values, runs: np.ndarray) -> of_rounds.Known:
    """Reads the inner programs of a call or a loop; only a call's outputs may be known."""
    name, unknown = eqn.primitive.name, [None] * len(eqn.outvars)
    before, outputs = len(self.transfers), unknown
    times = eqn.params["length"] if name == "scan" else 1
    for inner in of_rounds.programs(eqn):
      given = values.inside(eqn, inner)
      outputs = self.read(inner, given, runs * times)
    if name == "while" and len(self.transfers) > before:
      raise ValueError("a collective is in a loop whose length is not static")
    is_call = name not in ("scan", "while") and len(outputs) == len(eqn.outvars)
    return outputs if is_call else unknown

  def _collective(self, eqn: Any, runs: np.ndarray) -> None:
    names = _axis_names(eqn)
    if eqn.params.get("axis_index_groups") is not None:
      raise ValueError("collectives among groups of one axis are not counted; use two axes")
    operation = _OPERATIONS[eqn.primitive.name]
    workers = int(np.prod([self.axes[name] for name in names]))
    edges = sum(a != b for a, b in eqn.params.get("perm", ()))
    share = ring_share(operation, workers, edges)
    for operand in eqn.invars:
      payload = operand.aval.size * operand.aval.dtype.itemsize
      dtype, times = operand.aval.dtype.name, int(runs.sum())
      transfer = Transfer(operation, names, dtype, payload, share * payload, times)
      self._add([transfer], share * payload * runs)

  def _add(self, transfers: list[Transfer], sent: np.ndarray) -> None:
    self.transfers += transfers
    self.sent = self.sent + sent

  def _refuse_unknown(self, eqn: Any) -> None:
    named = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    named = named if isinstance(named, (tuple, list)) else (named,)
    over = [n for n in named if isinstance(n, str) and n in self.axes]
    if over and eqn.primitive.name != "axis_index":
      raise ValueError(f"what '{eqn.primitive.name}' sends over {', '.join(over)} is not known")


def _axis_names(eqn: Any) -> tuple[str, ...]:
  names = eqn.params.get("axes", eqn.params.get("axis_name"))
  return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def ring_share(operation: str, workers: int, edges: int = 0) -> float:
  """Returns the bytes that one of W workers sends on a ring, as a multiple of its operand's bytes.

  Args:
    operation: the operation of a `Transfer`.
    workers: W, number of workers.
    edges: for a permutation, the number of edges between different workers.
  """
  return {
    "all-reduce": 2 * (workers - 1) / workers,
    "reduce-scatter": (workers - 1) / workers,
    "all-gather": workers - 1,
    "all-to-all": (workers - 1) / workers,
    "permute": edges / workers,
  }[operation]


def by_axis(transfers: Iterable[Transfer], per: int = 1) -> dict[str, float]:
  """Sums the bytes that one worker sends, by axis; 'slice+data' means over both axes at once.

  Args:
    transfers: transfers of one worker.
    per: divisor, such as a number of steps.
  """
  totals: dict[str, float] = {}
  for transfer in transfers:
    name = "+".join(transfer.axes)
    totals[name] = totals.get(name, 0.0) + transfer.total / per
  return totals


def table(transfers: Iterable[Transfer], per: int = 1) -> list[dict[str, Any]]:
  """Sums the transfers by operation, axis and dtype into rows for a summary.

  `payload_bytes` and `sent_bytes` are the bytes of one worker; `messages` counts one collective per
  leaf. Args: see `by_axis`.
  """
  rows: dict[tuple[str, str, str], dict[str, Any]] = {}
  for t in transfers:
    key = (t.operation, "+".join(t.axes), t.dtype)
    empty = dict(zip(("operation", "axis", "dtype"), key, strict=True))
    row = rows.setdefault(key, {**empty, "payload_bytes": 0.0, "sent_bytes": 0.0, "messages": 0.0})
    row["payload_bytes"] += t.payload * t.times / per
    row["sent_bytes"] += t.total / per
    row["messages"] += t.times / per
  return list(rows.values())
