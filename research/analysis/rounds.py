"""What a program's whole numbers are in each of many rounds: constants propagated, rounds at once.

Where the communication of a round depends on its number, the predicate is a small computation on a
counter in the state. Here it is carried out for all rounds together, so that what a program will
send is known without running it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

Known = Sequence[np.ndarray | None]  # of each value: [rounds, ...], or None where nothing is known
_LARGEST = 256  # elements of a value that is worth following


class Unknown(ValueError):
  """The branches of a condition differ, and which one is taken is not known."""


def counters(program: core.ClosedJaxpr, zeros: Sequence[bool]) -> set[int]:
  """The inputs of a round that may count rounds: scalar whole numbers that start from zero.

  Args:
    program: a round; its first inputs and its outputs are the state.
    zeros: of each leaf of the state, whether it is known to start from zero.
  """
  is_whole = lambda aval: aval.shape == () and jnp.issubdtype(aval.dtype, jnp.integer)
  inputs = program.jaxpr.invars
  return {i for i, zero in enumerate(zeros) if zero and is_whole(inputs[i].aval)}


def with_counters(
  read: Callable[[Known], Known],
  program: core.ClosedJaxpr,
  counters: set[int],
  numbers: np.ndarray,
) -> set[int]:
  """Calls `read` with the counters of a state, until they prove to be counters; returns these.

  Those that the program does not raise by one in every one of the rounds are dropped, and it is
  read again.

  Args:
    read: inputs known by round -> outputs known by round.
    program: a round.
    counters: numbers of the inputs that may count rounds, and did in the rounds before.
    numbers: [rounds], those of the rounds.

  Raises:
    Unknown: as `read`, once only proven counters are left.
  """
  inputs = program.jaxpr.invars
  while True:
    known = [numbers.astype(v.aval.dtype) if i in counters else None for i, v in enumerate(inputs)]
    after = read(known)
    raised = lambda i, after=after: after[i] is not None and np.array_equal(after[i], numbers + 1)
    proven = {i for i in counters if raised(i)}
    if proven == counters:
      return counters
    counters = proven


def zeros(first: Callable[[], Any]) -> list[bool]:
  """Which leaves of a state are scalar whole numbers and zero; the others are not computed."""
  is_whole = lambda x: x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
  wholes = jax.jit(lambda: [x for x in jax.tree.leaves(first()) if is_whole(x)])()
  found = iter(jax.device_get(wholes))
  return [is_whole(x) and next(found) == 0 for x in jax.tree.leaves(jax.eval_shape(first))]


def chosen(index: np.ndarray, outputs: Sequence[Known]) -> Known:
  """Of what is known after each branch, what is known after the branches taken."""
  number = np.clip(index, 0, len(outputs) - 1)
  rows = np.arange(len(number))
  return [
    None
    if any(x is None for x in found)
    else np.stack([np.asarray(x) for x in found])[number, rows]
    for found in zip(*outputs, strict=True)
  ]


def programs(eqn: Any) -> list[core.ClosedJaxpr]:
  """The programs that an equation holds, such as a loop's body."""
  found = []
  for value in eqn.params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        found.append(part)
      elif isinstance(part, core.Jaxpr):
        found.append(core.ClosedJaxpr(part, ()))
  return found


class Values:
  """What is known of a program's values while it is walked through."""

  def __init__(self, program: core.ClosedJaxpr, known: Known, rounds: int):
    jaxpr, self._rounds = program.jaxpr, rounds
    self._found = {v: k for v, k in zip(jaxpr.invars, known, strict=True) if k is not None}
    for variable, value in zip(jaxpr.constvars, program.consts, strict=False):
      if isinstance(value, (np.ndarray, jax.Array)) and value.size <= _LARGEST and _plain(value):
        self._found[variable] = self._repeated(np.asarray(value))

  def of(self, variables: Sequence[Any]) -> list[np.ndarray | None]:
    """Their values by round, None where they are not known."""
    return [self._one(v) for v in variables]

  def _one(self, variable: Any) -> np.ndarray | None:
    if not isinstance(variable, core.Literal):
      return self._found.get(variable)
    return self._repeated(np.asarray(variable.val))

  def _repeated(self, value: np.ndarray) -> np.ndarray:
    return np.broadcast_to(value, (self._rounds, *value.shape))

  def write(self, eqn: Any, values: Known) -> None:
    """Notes what is known of an equation's outputs."""
    known = zip(eqn.outvars, values, strict=True)
    self._found |= {v: value for v, value in known if value is not None}

  def inside(self, eqn: Any, program: core.ClosedJaxpr) -> Known:
    """What is known of the inputs of a program that an equation holds: of a loop, nothing."""
    given, count = self.of(eqn.invars), len(program.jaxpr.invars)
    fits = len(given) == count and eqn.primitive.name not in ("scan", "while")
    return given if fits else [None] * count

  def evaluated(self, eqn: Any) -> Known | None:
    """The outputs in every round of an equation without programs, if it is small and known."""
    given = self.of(eqn.invars)
    small = not programs(eqn) and all(v.aval.size <= _LARGEST for v in (*eqn.invars, *eqn.outvars))
    follows = small and not eqn.effects and any(v is not None for v in self._changing(eqn))
    if not follows or any(x is None for x in given):
      return None

    def bind(*inputs):
      found = eqn.primitive.bind(*inputs, **eqn.params)
      return found if eqn.primitive.multiple_results else [found]

    # Whoever reads a program may itself be traced, or forbid transfers around its own rounds. What
    # a branch makes NaN on purpose is none of the run's numbers.
    quiet = jax.debug_nans(False), jax.debug_infs(False)
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"), quiet[0], quiet[1]:
      return [np.asarray(x) for x in jax.vmap(bind)(*map(jnp.asarray, given))]

  def _changing(self, eqn: Any) -> list[np.ndarray | None]:
    """Values of the inputs that are not literals: what only depends on these needs no following."""
    return [self._one(v) for v in eqn.invars if not isinstance(v, core.Literal)]


def _plain(value: Any) -> bool:
  return not jnp.issubdtype(value.dtype, jax.dtypes.extended)
