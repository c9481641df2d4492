"""Counts the FLOPs of one device in a traced program, including all iterations of loops.

FLOPs are counted on the jaxpr, because a compiled program's own count includes the body of a loop
only once. Only the operations that a chip's peak rate refers to are counted: matrix products and
convolutions, at 2 FLOPs per multiply-add. Everything else (sums, exponentials, sorting,
decompositions) is ignored.

Inside `shard_map`, values have the shape of a shard. Over mesh axes that are left to the compiler,
values have the full shape, and the work is assumed to be evenly distributed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from research.analysis.rounds import programs

_REMAT = ("checkpoint", "remat2", "remat")  # names in different JAX versions


def flops(program: core.ClosedJaxpr, axes: Mapping[str, int] | None = None) -> float:
  """Counts the FLOPs of one device.

  Only the most expensive branch of a conditional is counted. A Pallas kernel is counted by its cost
  estimate if it has one; otherwise, its body is counted once per grid point, including points that
  the kernel skips.

  Args:
    program: a jaxpr, from `jax.make_jaxpr` or `jit(f).trace(...).jaxpr`.
    axes: sizes of the mesh axes of the program; None for a single device.

  Raises:
    ValueError: if matrices are multiplied in a loop whose length is not static.
  """
  return _walk(program.jaxpr, _of_equation, dict(axes or {}))


def carried(program: core.ClosedJaxpr, axes: Mapping[str, int] | None = None) -> float:
  """Counts the bytes that one device reads and writes for its loops, as a lower bound.

  In each iteration a `scan` reads its carry and one row of its inputs, and writes its carry and one
  row of its outputs. The bound holds only if the carry does not stay on the chip.

  Args and Raises: see `flops`.
  """
  return _walk(program.jaxpr, _of_scan, dict(axes or {}))


def _walk(jaxpr: core.Jaxpr, cost: Callable[[Any], float], shared: dict[str, int]) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    total += cost(eqn) / math.prod(shared.values())
    if name == "pallas_call" and eqn.params.get("cost_estimate"):
      continue
    inner = {n: size for n, size in shared.items() if n not in _cut_here(eqn)}
    found = [_walk(program.jaxpr, cost, inner) for program in programs(eqn)]
    if name == "while" and cost is _of_equation and sum(found):
      raise ValueError("matrices are multiplied in a loop whose length is not static")
    total += _times(eqn) * (max(found) if name == "cond" else sum(found))
  return total


def _cut_here(eqn: Any) -> frozenset[str]:
  """Returns the mesh axes over which an equation shards the values of its inner program."""
  if eqn.primitive.name != "shard_map":
    return frozenset()
  return frozenset(eqn.params.get("newly_manual_axes") or eqn.params["manual_axes"])


def _times(eqn: Any) -> int:
  if eqn.primitive.name == "pallas_call":
    return math.prod(eqn.params["grid_mapping"].grid)
  return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _of_equation(eqn: Any) -> float:
  match eqn.primitive.name:
    case "dot_general":
      ((contracted, _), _) = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      return 2.0 * eqn.outvars[0].aval.size * math.prod(left[d] for d in contracted)
    case "ragged_dot_general":
      return _of_ragged(eqn)
    case "conv_general_dilated":
      return _of_convolution(eqn)
    case "pallas_call" if eqn.params.get("cost_estimate"):
      return float(eqn.params["cost_estimate"].flops)
  return 0.0


def _of_ragged(eqn: Any) -> float:
  """Counts the FLOPs of a grouped product: each row is multiplied by its own group's matrix."""
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  ((_, contracted), (_, batch)) = numbers.dot_dimension_numbers
  left, right = (variable.aval.shape for variable in eqn.invars[:2])
  shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
  return 2.0 * math.prod(left) * math.prod(n for d, n in enumerate(right) if d not in shared)


def _of_convolution(eqn: Any) -> float:
  """Counts the FLOPs of products with actual input elements, not with padding or dilation gaps.

  The gradients of a strided convolution therefore cost as much as the convolution itself.
  """
  params, numbers = eqn.params, eqn.params["dimension_numbers"]
  left, right = (variable.aval.shape for variable in eqn.invars[:2])
  out = eqn.outvars[0].aval.shape
  total = 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * right[numbers.rhs_spec[1]]
  for place, (stride, (before, _), spread, apart) in enumerate(
    zip(
      params["window_strides"],
      params["padding"],
      params["lhs_dilation"],
      params["rhs_dilation"],
      strict=True,
    )
  ):
    windows, taps = out[numbers.out_spec[2 + place]], right[numbers.rhs_spec[2 + place]]
    at = np.arange(windows)[:, None] * stride + np.arange(taps) * apart - before
    last = (left[numbers.lhs_spec[2 + place]] - 1) * spread
    total *= np.count_nonzero((at % spread == 0) & (at >= 0) & (at <= last))
  return total


def _of_scan(eqn: Any) -> float:
  if eqn.primitive.name != "scan":
    return 0.0
  (body,) = programs(eqn)
  size = lambda variable: variable.aval.size * variable.aval.dtype.itemsize
  state, piled = _apart(eqn.outvars, body.jaxpr.outvars)
  _, through = _apart(eqn.invars, body.jaxpr.invars)
  return 2 * eqn.params["length"] * sum(map(size, state)) + sum(map(size, [*through, *piled]))


def _apart(outside: Sequence[Any], inside: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """Splits values into those used in full by every iteration and those used one row at a time."""
  pairs = list(zip(outside, inside, strict=True))
  rows = [v for v, part in pairs if v.aval.ndim > part.aval.ndim]
  return [v for v, part in pairs if v.aval.ndim == part.aval.ndim], rows


def of_gradient(
  loss: Callable[..., jax.Array], *args: Any, axes: Mapping[str, int] | None = None
) -> float:
  """Counts the FLOPs of one device for a loss and its gradient, without rematerialization.

  A model that recomputes activations for the gradient (`jax.checkpoint`) runs more FLOPs.

  Args:
    loss: (parameters, ...) -> scalar.
    *args: arrays or shapes.
    axes: sizes of the mesh axes that share the work.
  """
  plain = core.jaxpr_as_fun(without_remat(jax.make_jaxpr(loss)(*args)))
  tree = jax.tree.structure(args)

  def value(params, *rest):
    leaves, found = jax.tree.flatten((params, *rest))
    assert found == tree
    return plain(*leaves)[0]

  return flops(jax.make_jaxpr(jax.value_and_grad(value))(*args), axes)


def without_remat(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """Removes rematerialization: the gradient of the returned program stores all values it needs.

  Args:
    program: the traced program.
  """
  return program.replace(jaxpr=_keeping(program.jaxpr))


def _keeping(jaxpr: core.Jaxpr) -> core.Jaxpr:
  return jaxpr.replace(eqns=[_keeping_equation(eqn) for eqn in jaxpr.eqns])


def _keeping_equation(eqn: Any) -> Any:
  params = {name: _keeping_inside(value) for name, value in eqn.params.items()}
  if eqn.primitive.name in _REMAT:
    params["policy"] = jax.checkpoint_policies.everything_saveable
  return eqn.replace(params=params)


def _keeping_inside(value: Any) -> Any:
  if isinstance(value, core.ClosedJaxpr):
    return without_remat(value)
  if isinstance(value, core.Jaxpr):
    return _keeping(value)
  return tuple(map(_keeping_inside, value)) if type(value) is tuple else value
