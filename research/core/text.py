"""Parses integers in user input, and quotes user input in one-line error messages."""

import re
from collections.abc import Iterable

LINE = 1000  # maximum characters of an error line
QUOTED = 200  # maximum characters of a quotation in an error line


def whole_number(text: str) -> int | None:
  """Parses an integer of 1 to 20 decimal digits; returns None for any other text.

  Args:
    text: any text.
  """
  return int(text) if re.fullmatch("[0-9]{1,20}", text) else None


def shortened(text: str, room: int = QUOTED) -> str:
  """Shortens a text, but keeps its beginning and its end.

  Args:
    text: any text.
    room: the maximum number of characters.
  """
  if len(text) <= room:
    return text
  end = (room - 5) // 3
  return f"{text[: room - 5 - end]} ... {text[-end:]}"


def one_line(text: object, room: int = LINE) -> str:
  """Converts an object's text to one line of printable characters.

  Args:
    text: any object, which is converted with `str`.
    room: the maximum number of characters.
  """
  line = shortened(" ".join(filter(None, map(str.strip, str(text).splitlines()))), room)
  return shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), room)


def quoted(value: object, room: int = QUOTED) -> str:
  """Returns the repr of a value on one line.

  Args:
    value: any object.
    room: the maximum number of characters.
  """
  try:
    return one_line(repr(value), room)
  except ValueError:  # an integer has more digits than Python converts
    return "a number of thousands of digits"


def listed(names: Iterable[str], room: int = LINE // 2) -> str:
  """Joins names with commas; if the text is too long, the remaining names are only counted.

  Args:
    names: the names.
    room: the maximum number of characters of the names shown.
  """
  names, shown = list(names), ""
  for count, name in enumerate(names):
    if len(shown) + len(name) > room:
      return f"{shown} and {len(names) - count} more"
    shown += f", {name}" if shown else name
  return shown
