"""Constant propagation over many rounds: evaluates a program's integers in all rounds at once.

If the communication of a round depends on the round's number, the program contains a conditional
whose predicate is a small computation on a counter in the state. This module evaluates the
predicate for all rounds together, so that the traffic is known without running the program.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

Known = Sequence[np.ndarray | None]  # for each value: [rounds, ...], or None if unknown
_LARGEST = 256  # maximum number of elements of a value that is evaluated


class Unknown(ValueError):
  """Reports that branches communicate differently and that the predicate is unknown."""


def counters(program: core.ClosedJaxpr, zeros: Sequence[bool]) -> set[int]:
  """Finds the inputs of a round that may count rounds: scalar integers that start from zero.

  Args:
    program: one round; its first inputs and its outputs are the state.
    zeros: for each leaf of the state, whether it starts from zero.

  Returns:
    The indices of these inputs.
  """
  is_whole = lambda aval: aval.shape == () and jnp.issubdtype(aval.dtype, jnp.integer)
  inputs = program.jaxpr.invars
  return {i for i, zero in enumerate(zeros) if zero and is_whole(inputs[i].aval)}


def with_counters(
  read: Callable[[Known], Known], program: core.ClosedJaxpr, counters: set[int], numbers: np.ndarray
) -> set[int]:
  """Calls `read` with candidate counters until all of them are verified as counters.

  Candidates that the program does not increment by one in every round are dropped, and `read` is
  called again.

  Args:
    read: known inputs by round -> known outputs by round.
    program: one round.
    counters: indices of the candidate inputs, which counted all earlier rounds.
    numbers: [rounds], the numbers of the rounds.

  Returns:
    The indices of the verified counters.

  Raises:
    Unknown: if `read` raises it.
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
  """Returns whether each leaf of a state is a scalar integer zero; other leaves are not computed.

  Args:
    first: returns the initial state.
  """
  is_whole = lambda x: x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
  wholes = jax.jit(lambda: [x for x in jax.tree.leaves(first()) if is_whole(x)])()
  found = iter(jax.device_get(wholes))
  return [is_whole(x) and next(found) == 0 for x in jax.tree.leaves(jax.eval_shape(first))]


def chosen(index: np.ndarray, outputs: Sequence[Known]) -> Known:
  """Selects the known outputs of the branches taken.

  Args:
    index: int [rounds], the branch taken in each round.
    outputs: the known outputs of each branch.
  """
  number = np.clip(index, 0, len(outputs) - 1)
  rows = np.arange(len(number))
  return [
    None
    if any(x is None for x in found)
    else np.stack([np.asarray(x) for x in found])[number, rows]
    for found in zip(*outputs, strict=True)
  ]


def programs(eqn: Any) -> list[core.ClosedJaxpr]:
  """Returns the inner programs of an equation, such as a loop's body.

  Args:
    eqn: an equation of a jaxpr.
  """
  found = []
  for value in eqn.params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        found.append(part)
      elif isinstance(part, core.Jaxpr):
        found.append(core.ClosedJaxpr(part, ()))
  return found


class Values:
  """The known values of a program's variables during a traversal."""

  def __init__(self, program: core.ClosedJaxpr, known: Known, rounds: int):
    jaxpr, self._rounds = program.jaxpr, rounds
    self._found = {v: k for v, k in zip(jaxpr.invars, known, strict=True) if k is not None}
    for variable, value in zip(jaxpr.constvars, program.consts, strict=False):
      if isinstance(value, (np.ndarray, jax.Array)) and value.size <= _LARGEST and _plain(value):
        self._found[variable] = self._repeated(np.asarray(value))

  def of(self, variables: Sequence[Any]) -> list[np.ndarray | None]:
    """Returns the values of variables by round; None if a value is unknown."""
    return [self._one(v) for v in variables]

  def _one(self, variable: Any) -> np.ndarray | None:
    if not isinstance(variable, core.Literal):
      return self._found.get(variable)
    return self._repeated(np.asarray(variable.val))

  def _repeated(self, value: np.ndarray) -> np.ndarray:
    return np.broadcast_to(value, (self._rounds, *value.shape))

  def write(self, eqn: Any, values: Known) -> None:
    """Records the known outputs of an equation."""
    known = zip(eqn.outvars, values, strict=True)
    self._found |= {v: value for v, value in known if value is not None}

  def inside(self, eqn: Any, program: core.ClosedJaxpr) -> Known:
    """Returns the known inputs of an equation's inner program; the inputs of a loop are unknown."""
    given, count = self.of(eqn.invars), len(program.jaxpr.invars)
    fits = len(given) == count and eqn.primitive.name not in ("scan", "while")
    return given if fits else [None] * count

  def evaluated(self, eqn: Any) -> Known | None:
    """Evaluates an equation in every round, or returns None.

    Only equations with small, known inputs and without inner programs or effects are evaluated.
    """
    given = self.of(eqn.invars)
    small = not programs(eqn) and all(v.aval.size <= _LARGEST for v in (*eqn.invars, *eqn.outvars))
    follows = small and not eqn.effects and any(v is not None for v in self._changing(eqn))
    if not follows or any(x is None for x in given):
      return None

    def bind(*inputs):
      found = eqn.primitive.bind(*inputs, **eqn.params)
      return found if eqn.primitive.multiple_results else [found]

    # The caller may itself be traced, or run under a transfer guard. NaN debugging is off because a
    # branch that is not taken may produce NaN.
    quiet = jax.debug_nans(False), jax.debug_infs(False)
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"), quiet[0], quiet[1]:
      return [np.asarray(x) for x in jax.vmap(bind)(*map(jnp.asarray, given))]

  def _changing(self, eqn: Any) -> list[np.ndarray | None]:
    """Returns the values of the inputs that are not literals; an empty list if all are."""
    return [self._one(v) for v in eqn.invars if not isinstance(v, core.Literal)]


def _plain(value: Any) -> bool:
  return not jnp.issubdtype(value.dtype, jax.dtypes.extended)
