"""Reads tables of prices: comma-separated lines, each with a date and the price of each stock.

All dates of a file have the same format: YYYY-MM-DD (optionally followed by a time), YYYYMMDD,
YYYY/MM/DD, DD.MM.YYYY, DD/MM/YYYY or MM/DD/YYYY. Only a day above 12 distinguishes the last two
formats, so a file in one of them without such a day is rejected. Days may be in any order, but no
day may occur twice. A price is a positive number; an empty cell means that there is no price. The
first line is a header if it contains no number or begins with "date". Blank lines are skipped.
"""

import datetime
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from research.tasks import texts

ISO = "ISO 8601"
DATES = (ISO, "%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y")


class Row(NamedTuple):
  """Contains one line of a table."""

  line: int  # line number, from 1
  cells: list[str]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads the prices from a file, plain, .gz or .bz2, and sorts them by date.

  Args:
    path: the file.

  Returns:
    The line numbers, int [T], and the prices, float64 [T, n], with NaN for missing prices.

  Raises:
    ValueError: if a line does not have the format described above.
  """
  rows = [Row(*row) for row in texts.cells(path)]
  columns = len(rows[0].cells) if rows else 0
  if columns < 2:
    raise ValueError(f"{path} is not a table of prices: it has no line 'DATE,PRICE,...'")
  for line, cells in rows:
    if len(cells) != columns:
      raise texts.at(path, line, f"has {len(cells)} cells, and the first line {columns}")
  if _is_header(rows[0].cells):
    del rows[0]
  dated = sorted(zip(_days(path, rows), rows, strict=True))
  for (before, first), (day, row) in itertools.pairwise(dated):
    if day == before:
      date = datetime.date.fromordinal(day)
      raise texts.at(path, row.line, f"the day {date} already appears in line {first.line}")
  prices = [[_price(path, row.line, cell) for cell in row.cells[1:]] for _, row in dated]
  lines = np.array([row.line for _, row in dated], int)
  return lines, np.array(prices, float).reshape(len(lines), columns - 1)


def _is_header(cells: list[str]) -> bool:
  if any(_day(cells[0], form) for form in DATES):
    return False
  return cells[0].lower().startswith("date") or not any(map(_is_number, cells[1:]))


def _is_number(cell: str) -> bool:
  try:
    texts.number(cell)
  except ValueError:
    return False
  return True


def _price(path: Path, line: int, cell: str) -> float:
  if not cell:
    return math.nan
  if not _is_number(cell) or not float(cell) > 0:
    reason = f"the price {texts.shown(cell)} is not a positive number; a cell without one is empty"
    raise texts.at(path, line, reason)
  return float(cell)


def _days(path: Path, rows: list[Row]) -> list[int]:
  """Returns the dates as ordinals, parsed with the only format that fits all of them."""
  readings: set[tuple[int, ...]] = set()
  furthest = 0
  for form in DATES:
    days = [*itertools.takewhile(bool, (_day(row.cells[0], form) for row in rows))]
    furthest = max(furthest, len(days))
    if len(days) == len(rows):
      readings.add(tuple(days))
  if len(readings) == 1:
    return list(readings.pop())
  line, (date, *_) = rows[0 if readings else furthest]
  if readings:
    raise texts.at(path, line, f"{date!r} may be day/month or month/day; write YYYY-MM-DD")
  legal = "a date such as 2024-01-31, in the form of all dates of the file"
  raise texts.at(path, line, f"{texts.shown(date)} is not {legal}")


def _day(date: str, form: str) -> int:
  """Returns the ordinal of a date, or 0 if the date does not have the format `form`."""
  try:
    if form == ISO:
      return datetime.datetime.fromisoformat(date).toordinal()
    return datetime.datetime.strptime(date, form).toordinal()
  except ValueError:
    return 0
