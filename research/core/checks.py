"""Checks arguments, with uniform errors for values out of range and for unknown names.

    at_least("period", period)              period=0 is not at least 1
    in_range("momentum", beta, "[0, 1)")    momentum=1.5 is not in [0, 1)
    unknown("ringg", TOPOLOGIES)            unknown; did you mean 'ring'? legal: ring, torus

The checks raise ValueError when the object is built, and return nothing. NaN is outside every
range.
"""

import difflib
import operator
from collections.abc import Iterable
from typing import Any

from research.core.text import listed


def at_least(name: str, value: float, least: float = 1) -> None:
  """Rejects a number below the smallest legal one.

  Args:
    name: the name of the parameter.
    value: the value of the parameter.
    least: the smallest legal value.

  Raises:
    ValueError: if the value is too small, as in `period=0 is not at least 1`.
  """
  if not value >= least:
    raise ValueError(f"{name}={value} is not at least {least}")


def above(name: str, value: float, bound: float = 0) -> None:
  """Rejects a number that is not greater than a bound.

  Args:
    name: the name of the parameter.
    value: the value of the parameter.
    bound: the largest value that is rejected.

  Raises:
    ValueError: if the value is too small, as in `tau=0 is not above 0`.
  """
  if not value > bound:
    raise ValueError(f"{name}={value} is not above {bound}")


def positive_integer(name: str, value: Any) -> None:
  """Rejects a value that is not a positive integer.

  Args:
    name: the name of the parameter.
    value: the value of the parameter.

  Raises:
    ValueError: if the value is not a positive integer, as in `context=0 is not a positive integer`.
  """
  if type(value) is not int or value < 1:
    raise ValueError(f"{name}={value!r} is not a positive integer")


def in_range(name: str, value: float, interval: str, *, note: str = "") -> None:
  """Rejects a number outside an interval.

  Args:
    name: the name of the parameter.
    value: the value of the parameter.
    interval: the interval in mathematical notation, as shown in the message: "[0, 1)", "(0, inf)".
    note: a text that follows the interval in the message, such as the reason for its upper end.

  Raises:
    ValueError: if the value is outside the interval, as in `momentum=1.5 is not in [0, 1)`.
  """
  if not is_in(value, interval):
    raise ValueError(f"{name}={value} is not in {interval}{note}")


def is_in(value: float, interval: str) -> bool:
  """Returns whether a number is in an interval; NaN is in none.

  Args:
    value: the number.
    interval: the interval in mathematical notation, such as "[0, 1)".
  """
  low, high = (float(end) for end in interval[1:-1].split(","))
  from_low = operator.ge if interval[0] == "[" else operator.gt
  to_high = operator.le if interval[-1] == "]" else operator.lt
  return bool(from_low(value, low) and to_high(value, high))


def nearest(value: object, legal: Iterable[object], *, cutoff: float = 0.6) -> str | None:
  """Finds the legal name that is closest to a value.

  Args:
    value: the invalid value.
    legal: the legal names.
    cutoff: the minimum similarity, in [0, 1]; 0 accepts any name.

  Returns:
    The closest name, or None if no name is similar enough.
  """
  found = difflib.get_close_matches(str(value), map(str, legal), 1, cutoff)
  return found[0] if found else None


def hint(value: object, legal: Iterable[object], *, cutoff: float = 0.6) -> str:
  """Returns the hint `; did you mean 'ring'?` for an error message, or `;` without a suggestion.

  Args:
    value: the invalid value.
    legal: the legal names.
    cutoff: the minimum similarity of a suggestion, in [0, 1].
  """
  near = nearest(value, legal, cutoff=cutoff)
  return f"; did you mean '{near}'?" if near else ";"


def unknown(value: object, legal: Iterable[object], *, cutoff: float = 0.6) -> str:
  """Returns the end of an error message, `unknown; did you mean 'ring'? legal: ring, torus`.

  Args:
    value: the invalid value.
    legal: the legal names; a long list is truncated, and the number of omitted names is shown.
    cutoff: the minimum similarity of a suggestion, in [0, 1].
  """
  names = [str(name) for name in legal]
  return f"unknown{hint(value, names, cutoff=cutoff)} legal: {listed(names) or 'none'}"


def one_of(name: str, value: Any, legal: Iterable[Any], *, cutoff: float = 0.6) -> None:
  """Rejects a value that is not in a set of legal values.

  Args:
    name: the name of the parameter.
    value: the value of the parameter.
    legal: the legal values.
    cutoff: the minimum similarity of a suggestion, in [0, 1].

  Raises:
    ValueError: if the value is not legal, as in `mode='asink' is unknown; did you mean 'async'?
      legal: async, sync`.
  """
  values = list(legal)
  if value not in values:
    raise ValueError(f"{name}={value!r} is {unknown(value, values, cutoff=cutoff)}")
