"""Determines a claim's settings from the claim's file, --scale and --set."""

import math
from collections.abc import Mapping
from typing import Any

from research.core import checks
from research.training.config import UsageError, flag


def of_claim(
  full: Mapping[str, Any], quick: Mapping[str, Any], scale: str, given: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns a claim's settings at a scale, with changes from the command line.

  Raises:
    UsageError: if a name is unknown, or a value has the wrong type.
  """
  found = {**full, **(quick if scale == "quick" else {})}
  for name, value in given.items():
    if name not in found:
      raise UsageError(f"--set={name}={value}: {checks.unknown(name, found)}")
    kind = type(found[name])
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise UsageError(f"--set={name}={value!r}: not of the type {kind.__name__}")
    with flag("set", f"{name}={value}"):
      _check(value, found[name])
    found[name] = value
  return found


def _check(value: Any, like: Any) -> None:
  """Rejects a setting that is out of range, or whose type differs from the default's type."""
  if isinstance(like, list):
    if isinstance(like[0], str):
      raise ValueError("the compared methods depend on the scale and cannot be set")
    if not value or any(type(one) is not type(like[0]) for one in value):
      raise ValueError(f"not a list such as {like}")
    for one in value:
      _check(one, like[0])
  elif isinstance(like, int | float) and not isinstance(like, bool):
    least = 1 if isinstance(like, int) else 0
    if not least <= value < math.inf:
      raise ValueError(f"not a number from {least} on")
