"""Reads text files: UTF-8 lines of fields. Error messages name the file and the line.

Arrays of small integers and UTF-16 text can be valid UTF-8, but then at least half of their bytes
are NUL. A file is therefore rejected if more than a quarter of its bytes are NUL.
"""

import codecs
import csv
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from research.tasks import files

T = TypeVar("T")

BLOCK = 1 << 16  # bytes that `check` decodes at once
_SHOWN = 40  # maximum number of a field's characters in an error message
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")  # fits int64


def read(path: Path) -> str:
  """Reads a text file, plain, .gz or .bz2.

  Args:
    path: the file.

  Raises:
    ValueError: if the file is not text or is truncated.
  """
  with files.opened(path) as file:
    return decoded(file.read(), path)


def rows(path: Path, comments: str = "") -> Iterator[tuple[int, list[str]]]:
  """Iterates over the nonblank lines of a text file as pairs (line number, fields).

  Line numbers start at 1. A byte order mark is skipped. The file is read when this function is
  called.

  Args:
    path: the path of the file, which may be plain, .gz or .bz2.
    comments: the characters that begin a comment line, possibly after spaces.

  Raises:
    ValueError: if the file is not text or is truncated.
  """
  lines = io.StringIO(read(path).removeprefix("\ufeff"), newline=None)
  split = ((number, line.split()) for number, line in enumerate(lines, 1))
  return ((number, row) for number, row in split if row and row[0][0] not in comments)


def cells(path: Path) -> list[tuple[int, list[str]]]:
  """Reads the nonblank rows of a comma-separated table as pairs (line number, cells).

  Line numbers start at 1. A byte order mark and spaces around cells are skipped. Quoted cells may
  contain line breaks; the line number is that of the line on which the row starts.

  Args:
    path: the path of the file, which may be plain, .gz or .bz2.

  Raises:
    ValueError: if the file is not text or not comma-separated; the message names the line.
  """
  found, last = [], 0
  reader = csv.reader(io.StringIO(read(path).removeprefix("\ufeff"), newline=""), strict=True)
  try:
    for row in reader:
      stripped = [cell.strip() for cell in row]
      if any(stripped):
        found.append((last + 1, stripped))
      last = reader.line_num
  except csv.Error as error:
    raise at(path, last + 1, f"is not comma-separated ({error})") from None
  return found


def parsed(path: Path, parse: Callable[[list[str]], T], comments: str = "") -> list[T]:
  """Parses the fields of each nonblank line of a text file.

  Args:
    path: the path of the file, which may be plain, .gz or .bz2.
    parse: a function that parses the fields of a line. If it raises ValueError, the file and the
      line are added to the message.
    comments: the characters that begin a comment line, as for `rows`.

  Raises:
    ValueError: if the file is not text or is truncated, or `parse` raises it.
  """
  found = []
  for line, fields in rows(path, comments):
    try:
      found.append(parse(fields))
    except ValueError as error:
      raise at(path, line, error) from None
  return found


def at(path: Path, line: int, reason: object) -> ValueError:
  """Returns a ValueError that names a line of a file.

  Args:
    path: the file.
    line: the line number, from 1.
    reason: what is wrong with the line.
  """
  return ValueError(f"{path}, line {line}: {reason}")


def number(field: str) -> float:
  """Parses a finite number.

  Args:
    field: the text of the field.

  Raises:
    ValueError: if the field is not a finite number.
  """
  try:
    value = float(field) if field.isascii() and "_" not in field else math.nan
  except ValueError:
    value = math.nan
  if not math.isfinite(value):
    raise ValueError(f"{shown(field)} is not a finite number")
  return value


def whole(field: str) -> int:
  """Parses an integer.

  Args:
    field: the text of the field.

  Raises:
    ValueError: if the field is not an integer, or has more than 18 digits.
  """
  if not _WHOLE.fullmatch(field):
    raise ValueError(f"{shown(field)} is not a whole number of at most 18 digits")
  return int(field)


def shown(field: str) -> str:
  """Quotes a field for an error message.

  Args:
    field: the text of the field.
  """
  return repr(field if len(field) <= _SHOWN else field[: _SHOWN - 3] + "...")


def decoded(content: bytes, path: Path, start: int = 0, end: bool = True) -> str:
  """Decodes bytes of a file as UTF-8.

  Args:
    content: the bytes.
    path: the path of the file, for error messages.
    start: the offset of the bytes in the file; if it is above 0, they may begin within a character.
    end: whether the last character must be complete.

  Raises:
    ValueError: if the bytes are not UTF-8, or more than a quarter of them are NUL.
  """
  begun = 0
  while start and begun < min(3, len(content)) and content[begun] & 0xC0 == 0x80:
    begun += 1
  try:
    found = codecs.getincrementaldecoder("utf-8")().decode(content[begun:], end)
  except UnicodeDecodeError as error:
    place = begun + error.start
    reason = f"byte {start + place} is 0x{content[place]:02x}, {error.reason}"
    if not start and content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
      reason += "; it looks like UTF-16, save it as UTF-8"
    raise ValueError(f"{path} is not UTF-8: {reason}") from None
  if (nul := content.count(0)) > len(content) / 4:
    raise ValueError(f"{path} is not text: {nul} of {len(content)} bytes are NUL")
  return found


def check(path: Path, most: int | None = None) -> None:
  """Checks that a plain file is text.

  Args:
    path: the path of the file.
    most: the maximum number of blocks of 64 KiB to read, equally spaced; None reads all of them.

  Raises:
    ValueError: if the file is not text.
  """
  size = path.stat().st_size
  blocks = -(-size // BLOCK)
  count = blocks if most is None else min(most, blocks)
  with path.open("rb") as file:
    for i in range(count):
      start = max(0, min(i * blocks // count * BLOCK, size - BLOCK))  # the last block is a full one
      file.seek(start)
      decoded(file.read(BLOCK), path, start, start + BLOCK >= size)
