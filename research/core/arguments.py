"""Checks the arguments of a parsed call against the parameters of the factory that it names."""

import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from research.core import checks
from research.core.builtin import TABLE
from research.core.spec import Call
from research.core.text import QUOTED, one_line, quoted, shortened

# Legal ranges of those optax parameters that optax itself does not check.
_RANGES = {
  **dict.fromkeys(("learning_rate", "peak_value", "max_norm", "max_delta", "clipping"), "(0, inf)"),
  **dict.fromkeys(("init_value", "end_value", "weight_decay", "eps", "eps_root"), "[0, inf)"),
  **dict.fromkeys(("momentum", "b1", "b2", "b3", "decay", "decay_rate"), "[0, 1]"),
}

Build = Callable[[Sequence[str], Call], Any]  # (kinds, call) -> the object


class UnknownName(ValueError):
  """Raised if a name is unknown for all of the given kinds."""


def matched(
  call: Call, parameters: Mapping[str, inspect.Parameter], build: Build
) -> tuple[list[Any], dict[str, Any]]:
  """Matches the arguments of a call to a factory's parameters, and builds nested calls.

  Args:
    call: the parsed call.
    parameters: the factory's parameters by name, except those that a spec must not set.
    build: a function that builds a nested call as an object of one of the given kinds.

  Returns:
    The positional and the keyword arguments.

  Raises:
    ValueError: if an argument is invalid; the message is one line that contains the value, the
      legal set and the closest name.
  """
  positional = [p for p in parameters.values() if p.kind != p.KEYWORD_ONLY]
  if positional and positional[-1].kind == inspect.Parameter.VAR_POSITIONAL:
    positional += [positional[-1]] * len(call.args)
  if len(call.args) > len(positional):
    raise call.wrong(
      f"{call.name} takes {len(positional)} positional arguments "
      f"({', '.join(p.name for p in positional)}) and got {len(call.args)}"
    )
  args = [_argument(call, p, v, build) for p, v in zip(positional, call.args, strict=False)]
  given = {p.name for p in positional[: len(args)]}
  kwargs = {}
  for name, value in call.kwargs.items():
    if name in given:
      problem = f"{call.name} got '{name}' twice; {call.name} takes {', '.join(parameters)}"
      raise call.wrong(problem)
    if name not in parameters:
      hint = checks.hint(name, parameters, cutoff=0.5)
      problem = f"no parameter '{shortened(name)}'{hint}"
      raise call.wrong(f"{problem} {call.name} takes {', '.join(parameters)}")
    kwargs[name] = _argument(call, parameters[name], value, build)
  missing = [
    name
    for name, p in parameters.items()
    if p.default is p.empty
    and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    and name not in {*given, *kwargs}
  ]
  if missing:
    raise call.wrong(f"{call.name} needs {', '.join(missing)}")
  return args, kwargs


def _argument(call: Call, parameter: inspect.Parameter, value: Any, build: Build) -> Any:
  kinds = kinds_of(parameter.annotation)

  def nested(inner: Call) -> Any:
    if not kinds:
      raise call.wrong(f"{parameter.name} is a plain value, not {one_line(inner.text, QUOTED)}")
    try:
      return build(kinds, inner)
    except UnknownName as error:
      raise call.wrong(f"{parameter.name}: {error}") from error

  if isinstance(value, Call):
    value = nested(value)
  elif isinstance(value, list):
    value = [nested(v) if isinstance(v, Call) else v for v in value]
  _check_value(call, parameter, value)
  return value


def kinds_of(annotation: Any) -> list[str]:
  """Returns the kinds of objects that a parameter accepts, according to its type.

  Args:
    annotation: the parameter's type.
  """
  if typing.get_args(annotation) and typing.get_origin(annotation) is not Callable:
    return [kind for part in typing.get_args(annotation) for kind in kinds_of(part)]
  name = getattr(annotation, "__name__", "")
  if name.startswith("GradientTransformation"):
    return ["optimizer"]
  if name.lower() in TABLE:
    return [name.lower()]
  origin = typing.get_origin(annotation) or annotation
  return ["schedule"] if getattr(origin, "__name__", "") == "Callable" else []


def _check_value(call: Call, parameter: inspect.Parameter, value: Any) -> None:
  name, shown = parameter.name, quoted(value)
  if not _matches(value, parameter.annotation):
    raise call.wrong(f"{name}={shown} is not {described(parameter.annotation)}")
  for number in _numbers(value):
    if not abs(number) <= sys.float_info.max:
      raise call.wrong(f"{name}={shown} is not finite")
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
      raise call.wrong(f"{name}={shown} does not fit 64 bits")
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if is_number and name in _RANGES and not checks.is_in(value, _RANGES[name]):
    raise call.wrong(f"{name}={shown} is not in {_RANGES[name]}")


def _numbers(value: Any) -> Iterator[int | float]:
  """Yields the numbers within a plain value, at any depth."""
  if isinstance(value, (list, dict)):
    for part in [*value, *value.values()] if isinstance(value, dict) else value:
      yield from _numbers(part)
  elif isinstance(value, (int, float)):
    yield value


def _matches(value: Any, annotation: Any) -> bool:
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation in (inspect.Parameter.empty, Any):
    return True
  if origin in (typing.Union, types.UnionType):
    return any(_matches(value, part) for part in parts)
  if annotation is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if annotation is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if annotation is None or annotation is types.NoneType:
    return value is None
  if origin is Callable or getattr(annotation, "__name__", "") == "Callable":
    return callable(value)
  if origin in (Sequence, list, tuple):
    items = isinstance(value, list)
    return items and all(_matches(item, parts[0]) for item in value if parts)
  if origin in (Mapping, dict):
    is_pair = lambda pair: all(map(_matches, pair, parts))
    return isinstance(value, dict) and all(map(is_pair, value.items()))
  if isinstance(annotation, type):
    return isinstance(value, annotation)
  return True


def described(annotation: Any) -> str:
  """Describes a parameter's type in words, such as 'a number or a schedule'.

  Args:
    annotation: the parameter's type.
  """
  names = {float: "a number", int: "a whole number", bool: "True or False", str: "a text in quotes"}
  kinds = [f"a{'n' * (kind[0] in 'aeo')} {kind}" for kind in dict.fromkeys(kinds_of(annotation))]
  parts = typing.get_args(annotation)
  if typing.get_origin(annotation) in (Sequence, list, tuple):
    return f"a list, each {described(parts[0])}"
  if typing.get_origin(annotation) in (Mapping, dict):
    return f"a dictionary {{{', '.join(map(described, parts))}}}".replace(", ", ": ", 1)
  of_union = parts or (annotation,)
  plain = [names[part] for part in of_union if isinstance(part, type) and part in names]
  held = [described(p) for p in of_union if typing.get_origin(p) in (Mapping, dict, Sequence, list)]
  return " or ".join([*plain, *held, *kinds]) or str(annotation)
