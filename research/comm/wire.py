"""What crosses the links: every transfer of a traced program, its bytes read off the shapes.

A transfer's payload is the operand that one worker puts into the collective. What a worker then
sends depends on the collective's algorithm; the figures here are those of a ring, which attains the
lower bound for all of them (Patarasuk and Yuan 2009; Chan et al. 2007), n bytes over W workers:

    all-reduce  2 (W-1)/W n      reduce-scatter  (W-1)/W n      all-gather  (W-1) n
    all-to-all    (W-1)/W n      permute         n per edge that leaves the worker, on average
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

# Names of collective primitives -> operation; check_vma and JAX versions vary the names.
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
  """One collective of a program, as often as the program runs it."""

  operation: str
  axes: tuple[str, ...]  # of the mesh
  dtype: str
  payload: int  # bytes, the operand of one worker
  sent: float  # bytes that one worker sends on a ring
  times: int

  @property
  def total(self) -> float:
    """Bytes that one worker sends in all."""
    return self.sent * self.times


def traffic(program: Callable[..., Any], *args: Any, axes: Mapping[str, int]) -> list[Transfer]:
  """Every transfer of one worker's program.

  Args:
    program: what one worker runs, with collectives over `axes`; traced, not run.
    *args: arrays or shapes.
    axes: the worker axes, name to size.

  Raises:
    ValueError: if a collective stands in a loop whose length is not static, or in branches of a
      condition that communicate differently: then the traffic is no fact.
  """
  jaxpr = jax.make_jaxpr(program, axis_env=list(axes.items()))(*args)
  return list(_transfers(jaxpr.jaxpr, dict(axes), 1))


def _transfers(jaxpr: core.Jaxpr, axes: dict[str, int], times: int) -> Iterator[Transfer]:
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in _OPERATIONS:
      yield from _collective(eqn, axes, times)
    elif name == "cond":
      branches = [list(_transfers(b.jaxpr, axes, times)) for b in eqn.params["branches"]]
      if any(branch != branches[0] for branch in branches):
        raise ValueError("the branches of a condition communicate differently")
      yield from branches[0]
    else:
      named = eqn.params.get("axes", eqn.params.get("axis_name", ()))
      named = named if isinstance(named, (tuple, list)) else (named,)
      if name != "axis_index" and any(isinstance(n, str) and n in axes for n in named):
        raise ValueError(f"what '{name}' sends over {', '.join(map(str, named))} is not known")
      inner = [t for j in _inner(eqn) for t in _transfers(j, axes, times * _length(eqn))]
      if name == "while" and inner:
        raise ValueError("a collective stands in a loop whose length is not static")
      yield from inner


def _collective(eqn: Any, axes: dict[str, int], times: int) -> Iterator[Transfer]:
  names = eqn.params.get("axes", eqn.params.get("axis_name"))
  names = tuple(names) if isinstance(names, (tuple, list)) else (names,)
  if eqn.params.get("axis_index_groups") is not None:
    raise ValueError("collectives among groups of one axis are not counted; use two axes")
  operation = _OPERATIONS[eqn.primitive.name]
  workers = int(np.prod([axes[name] for name in names]))
  factor = {
    "all-reduce": 2 * (workers - 1) / workers,
    "reduce-scatter": (workers - 1) / workers,
    "all-gather": workers - 1,
    "all-to-all": (workers - 1) / workers,
    "permute": sum(a != b for a, b in eqn.params.get("perm", ())) / workers,
  }[operation]
  for operand in eqn.invars:
    payload = operand.aval.size * operand.aval.dtype.itemsize
    yield Transfer(operation, names, operand.aval.dtype.name, payload, factor * payload, times)


def _length(eqn: Any) -> int:
  return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _inner(eqn: Any) -> Iterator[core.Jaxpr]:
  for value in eqn.params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        yield part.jaxpr
      elif isinstance(part, core.Jaxpr):
        yield part


def by_axis(transfers: Iterable[Transfer], per: int = 1) -> dict[str, float]:
  """Bytes that one worker sends by axis ('slice+data': over both at once), divided by `per`."""
  totals: dict[str, float] = {}
  for transfer in transfers:
    name = "+".join(transfer.axes)
    totals[name] = totals.get(name, 0.0) + transfer.total / per
  return totals
