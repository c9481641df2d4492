"""Wraps optax's optimizers and schedules in objects whose repr is their spec."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from research.core import blame
from research.core.text import one_line

_TRANSFORMATIONS = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)


class Made(NamedTuple):
  """Records the factory and the arguments that made an object."""

  factory: Callable[..., Any]
  args: tuple[Any, ...]
  kwargs: dict[str, Any]


class _Named:
  """An object built from a spec, which equals any other object built from the same spec."""

  spec = ""
  made: Made | None = None
  fit: Callable[[Any], Any] | None = None  # builds the object for a model, see `optim/fitting.py`
  model: Any = None  # what it was fitted to

  def __repr__(self) -> str:
    return self.spec or super().__repr__()

  def __eq__(self, other: object) -> bool:
    if not self.spec:
      return super().__eq__(other)
    return isinstance(other, _Named) and (self.spec, self.model) == (other.spec, other.model)

  def __ne__(self, other: object) -> bool:  # otherwise the tuple's method is used
    return not self == other

  def __hash__(self) -> int:
    return hash(self.spec) if self.spec else super().__hash__()


class Optimizer(_Named, optax.GradientTransformation):
  """A gradient transformation whose repr is the spec that it was built from."""


class OptimizerExtraArgs(_Named, optax.GradientTransformationExtraArgs):
  """An `Optimizer` whose `update` takes extra arguments."""


class Schedule(_Named):
  """A schedule, step -> value, whose repr is the spec that it was built from."""

  def __init__(self, schedule: Callable[[Any], Any], spec: str):
    self.schedule, self.spec = schedule, spec

  def __call__(self, step: Any) -> Any:
    return self.schedule(step)


def named(kind: str, built: Any, spec: str, made: Made | None = None) -> Any:
  """Wraps an optimizer or schedule in an object whose repr is its spec.

  Args:
    kind: 'optimizer' or 'schedule'.
    built: the object that the factory returned.
    spec: the canonical text of the spec.
    made: the factory and its arguments.
  """
  if kind == "schedule":
    return Schedule(built, spec)
  takes_extra = isinstance(built, optax.GradientTransformationExtraArgs)
  found = (OptimizerExtraArgs if takes_extra else Optimizer)(built.init, built.update)
  found.spec, found.made, found.fit = spec, made, getattr(built, "fit", None)
  return found


@functools.cache
def factories(kind: str) -> dict[str, Callable[..., Any]]:
  """Returns optax's factories of a kind by name; factories with a learning rate come first.

  Args:
    kind: 'optimizer' or 'schedule'.
  """
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
  """Traces one update, and rejects an optimizer that needs more than averaged gradients.

  Args:
    optimizer: an optax transformation.

  Raises:
    ValueError: if the update fails, with optax's error message.
  """
  params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  try:
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
  except Exception as error:  # another library's optimizer may raise anything
    if blame.fault(error):
      raise
    raise ValueError(f"needs more than averaged gradients: {one_line(error, 300)}") from error
  if updates["w"].shape != params["w"].shape:
    raise ValueError("needs more than averaged gradients: a gradient per example")
