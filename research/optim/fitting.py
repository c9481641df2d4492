"""Fits optimizers whose updates depend on the shapes of leaves to a model's declared dimensions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from research.core import optimizers
from research.core.dimensions import Dimensions, checked
from research.core.method import Method
from research.optim import stacked


class Model(NamedTuple):
  """Describes what an optimizer needs to know about a model."""

  dimensions: Dimensions = ()
  cut: Any = None  # a `blockwise.Cut`, if the model is sharded inside a worker
  simulated: bool = False  # whether one device simulates the devices of a worker


def for_models(
  build: Callable[[Model], optax.GradientTransformation], dimensions: Dimensions = ()
) -> optax.GradientTransformation:
  """Returns an optimizer that `fitted` builds again for a model.

  Args:
    build: builds the optimizer for a model.
    dimensions: the declaration of a model's dimensions; if it is empty, `fitted` supplies the
      model's own.

  Raises:
    ValueError: if the declaration is invalid.
  """
  own = checked(dimensions)
  fit = lambda model: build(model._replace(dimensions=own or model.dimensions))
  found = optimizers.Optimizer(*fit(Model()))
  found.fit = fit
  return found


def fitted(optimizer: Any, model: Model) -> Any:
  """Rebuilds an optimizer for a model, if the optimizer depends on the model.

  `muon` is rebuilt with the model's dimensions. optax's optimizers in `stacked.DEPENDENT` treat
  each layer of a stack as a leaf. Both kinds are also rebuilt inside an optimizer that was built
  from a spec, such as a chain, but not inside an optimizer that a program built with optax
  directly.

  Args:
    optimizer: an optax transformation.
    model: the model.
  """
  fresh = _fresh(optimizer, model)
  if fresh is None:
    return optimizer
  found = optimizers.named("optimizer", fresh, optimizer.spec, optimizer.made)
  found.fit, found.model = optimizer.fit, model
  return found


def method_for(method: Method, model: Model) -> Method:
  """Fits a method and its optimizers to a model.

  Args:
    method: the method.
    model: the model.
  """
  if model == Model():
    return method
  found = method.with_optimizers(lambda optimizer: fitted(optimizer, model))
  return found.with_dimensions(model.dimensions)


def _fresh(optimizer: Any, model: Model) -> optax.GradientTransformation | None:
  """Builds an optimizer for a model; None if the optimizer does not depend on the model."""
  if not isinstance(optimizer, optimizers.Optimizer | optimizers.OptimizerExtraArgs):
    return None
  if optimizer.fit:
    return optimizer.fit(model)
  if optimizer.made is None:
    return None
  factory, args, kwargs = optimizer.made
  if factory in stacked.DEPENDENT and model.dimensions:
    return stacked.DEPENDENT[factory](optimizer.made, model.dimensions)
  inside = _inside(args, model), _inside(kwargs, model)
  return None if inside == (args, kwargs) else factory(*inside[0], **inside[1])


def _inside(value: Any, model: Model) -> Any:
  """Fits an argument of an optimizer: an optimizer, or a dictionary or list with optimizers."""
  if isinstance(value, dict):
    return {name: _inside(one, model) for name, one in value.items()}
  if type(value) in (list, tuple):
    return type(value)(_inside(one, model) for one in value)
  return fitted(value, model) if isinstance(value, optax.GradientTransformation) else value
