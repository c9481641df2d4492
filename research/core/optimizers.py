"""optax's optimizers and schedules under their own names, as objects whose repr is their spec."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from research.core import blame
from research.core.text import one_line

_TRANSFORMATIONS = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)


class _Named:
  """An object made from a spec: it equals another one of the same spec."""

  spec = ""

  def __repr__(self) -> str:
    return self.spec or super().__repr__()

  def __eq__(self, other: object) -> bool:
    if not self.spec:
      return super().__eq__(other)
    return isinstance(other, _Named) and self.spec == other.spec

  def __ne__(self, other: object) -> bool:  # a tuple's own would be asked first
    return not self == other

  def __hash__(self) -> int:
    return hash(self.spec) if self.spec else super().__hash__()


class Optimizer(_Named, optax.GradientTransformation):
  """A gradient transformation that was built from a spec, and shows it."""


class OptimizerExtraArgs(_Named, optax.GradientTransformationExtraArgs):
  """One whose `update` takes extra arguments."""


class Schedule(_Named):
  """A schedule, step -> value, that was built from a spec, and shows it."""

  def __init__(self, schedule: Callable[[Any], Any], spec: str):
    self.schedule, self.spec = schedule, spec

  def __call__(self, step: Any) -> Any:
    return self.schedule(step)


def named(kind: str, built: Any, spec: str) -> Any:
  """The same optimizer or schedule as an object whose repr is its spec.

  Args:
    kind: 'optimizer' or 'schedule'.
    built: what the factory of optax made.
    spec: its canonical text.
  """
  if kind == "schedule":
    return Schedule(built, spec)
  takes_extra = isinstance(built, optax.GradientTransformationExtraArgs)
  made = (OptimizerExtraArgs if takes_extra else Optimizer)(built.init, built.update)
  made.spec = spec
  return made


@functools.cache
def factories(kind: str) -> dict[str, Callable[..., Any]]:
  """optax's own factories of a kind, those that begin with a learning rate first."""
  first: dict[str, Callable[..., Any]] = {}
  others: dict[str, Callable[..., Any]] = {}
  for module in (optax, optax.contrib):
    for name, function in sorted(vars(module).items()):
      is_function = inspect.isfunction(function) or isinstance(function, functools.partial)
      if name.startswith("_") or not is_function:
        continue
      signature = inspect.signature(function)
      is_schedule = name.endswith("_schedule") or name in ("exponential_decay", "join_schedules")
      if is_schedule if kind == "schedule" else signature.return_annotation in _TRANSFORMATIONS:
        takes_rate = next(iter(signature.parameters), "") == "learning_rate"
        (first if takes_rate else others).setdefault(name, function)
  return first | others


def check(optimizer: Any) -> None:
  """Traces one update, so that an optimizer that needs more than gradients is rejected here.

  Raises:
    ValueError: with what optax said.
  """
  params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  try:
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
  except Exception as error:  # whatever an optimizer of another library raises
    if blame.fault(error):
      raise
    raise ValueError(f"needs more than averaged gradients: {one_line(error, 300)}") from error
  if updates["w"].shape != params["w"].shape:
    raise ValueError("needs more than averaged gradients: a gradient per example")
