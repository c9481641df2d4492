"""What a user typed, read and shown again: whole numbers, and quotations that fit into one line."""

import re
from collections.abc import Iterable

LINE = 1000  # characters that a line of an error has at most
QUOTED = 200  # of which a quotation takes at most


def whole_number(text: str) -> int | None:
  """The whole number that a text is in the digits 0 to 9, of which it has 20 at most; else None."""
  return int(text) if re.fullmatch("[0-9]{1,20}", text) else None


def shortened(text: str, room: int = QUOTED) -> str:
  """A text of at most `room` characters: of a longer one the beginning and the end."""
  if len(text) <= room:
    return text
  end = (room - 5) // 3
  return f"{text[: room - 5 - end]} ... {text[-end:]}"


def one_line(text: object, room: int = LINE) -> str:
  """A text in one line of at most `room` characters, all of which can be printed."""
  line = shortened(" ".join(filter(None, map(str.strip, str(text).splitlines()))), room)
  return shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), room)


def quoted(value: object, room: int = QUOTED) -> str:
  """A value as Python writes it, in one line of at most `room` characters."""
  try:
    return one_line(repr(value), room)
  except ValueError:  # an integer of more digits than Python prints
    return "a number of thousands of digits"


def listed(names: Iterable[str], room: int = LINE // 2) -> str:
  """Names with commas; of a list longer than `room` the first ones, and how many more there are."""
  names, shown = list(names), ""
  for count, name in enumerate(names):
    if len(shown) + len(name) > room:
      return f"{shown} and {len(names) - count} more"
    shown += f", {name}" if shown else name
  return shown
