"""Finds which results of a traced program differ between workers, by following its dataflow.

A value differs along a worker axis if it depends on an argument that does, or on the worker's
index, unless a collective along that axis made it equal on all workers. `vmap` has the same rules,
but traces the whole program again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from research.analysis.rounds import programs

Axes = frozenset[str]  # the worker axes along which a value differs

_EQUALIZING = ("psum", "pmax", "pmin", "all_gather")
_CALLS = (
  *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"),
  *("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"),
)


def differing(program: core.ClosedJaxpr, given: Sequence[Axes]) -> list[Axes]:
  """Finds the worker axes along which each result of a program differs.

  Args:
    program: one worker's program.
    given: for each input, the axes along which it differs.
  """
  jaxpr = program.jaxpr
  found: dict[Any, Axes] = dict(zip(jaxpr.invars, given, strict=True))
  of = lambda v: frozenset() if isinstance(v, core.Literal) else found.get(v, frozenset())
  for eqn in jaxpr.eqns:
    found.update(zip(eqn.outvars, _results(eqn, [of(v) for v in eqn.invars]), strict=True))
  return [of(v) for v in jaxpr.outvars]


def _results(eqn: Any, given: list[Axes]) -> list[Axes]:
  params, inner = eqn.params, programs(eqn)
  match eqn.primitive.name:
    case name if name in _EQUALIZING and params.get("axis_index_groups") is None:
      return [axes - _named(eqn) for axes in given]
    case name if name in _CALLS and len(inner) == 1:
      return differing(inner[0], given)
    case "optimization_barrier":
      return given
    case "cond":
      index, *operands = given
      branches = [differing(branch, operands) for branch in inner]
      return [index.union(*axes) for axes in zip(*branches, strict=True)]
    case "scan":
      consts, carry = _parts_of_scan(eqn, inner[0].jaxpr)
      once = lambda held: differing(inner[0], [*given[:consts], *held, *given[consts + carry :]])
      return once(_grown(once, given[consts : consts + carry]))
    case "while":
      of_cond = params["cond_nconsts"]
      first = of_cond + params["body_nconsts"]

      def once(held: list[Axes]) -> list[Axes]:
        (goes_on,) = differing(params["cond_jaxpr"], [*given[:of_cond], *held])
        after = differing(params["body_jaxpr"], [*given[of_cond:first], *held])
        return [goes_on | axes for axes in after]

      return _grown(once, given[first:])
  # also the worker's index, and collectives that give each worker another value
  return [_named(eqn).union(*given)] * len(eqn.outvars)


def _parts_of_scan(eqn: Any, body: core.Jaxpr) -> tuple[int, int]:
  """Returns the numbers of constants and of values in the carry, which each JAX names otherwise.

  An input or a result that has rows, one for each iteration, has a dimension more than in the body.
  """
  is_whole = lambda outside, inside: outside.aval.ndim == inside.aval.ndim
  carry = sum(map(is_whole, eqn.outvars, body.outvars))
  return sum(map(is_whole, eqn.invars, body.invars)) - carry, carry


def _grown(once: Callable[[list[Axes]], list[Axes]], held: list[Axes]) -> list[Axes]:
  """Runs a loop's body until no value of its carry differs along another axis."""
  while True:
    after = [a | b for a, b in zip(held, once(held), strict=False)]
    if after == held:
      return held
    held = after


def _named(eqn: Any) -> Axes:
  """Returns the worker axes that an equation or its inner programs name."""
  names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
  names = names if isinstance(names, (tuple, list)) else (names,)
  inside = (e.name for e in eqn.effects if type(e).__name__ == "NamedAxisEffect")
  return frozenset(name for name in (*names, *inside) if isinstance(name, str))
