"""Reads tables of molecules: comma-separated, with a header, a SMILES column and label columns.

A label is a number; an empty cell means that the label was not measured. Blank lines are skipped.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from research.core import checks
from research.core.text import listed
from research.tasks import texts


class Table(NamedTuple):
  """Contains the rows of a table."""

  lines: np.ndarray  # int [N], line numbers from 1
  smiles: list[str]
  labels: np.ndarray  # float64 [N, T]; NaN marks a missing label

  def take(self, rows: np.ndarray) -> "Table":
    return Table(self.lines[rows], [self.smiles[row] for row in rows], self.labels[rows])


def read(path: Path, smiles: str, targets: Sequence[str]) -> Table:
  """Reads a table from a plain file or a compressed file (.gz or .bz2).

  Args:
    path: the file.
    smiles: the name of the SMILES column.
    targets: the names of the label columns.

  Raises:
    ValueError: if the file is not comma-separated, a column is missing, the number of cells in a
      line differs from that in the header, or a label is not a number.
  """
  rows = texts.cells(path)
  if len(rows) < 2:
    raise ValueError(f"{path} is not a table of molecules: it needs a header and rows below it")
  columns = rows[0][1]
  if not targets:
    raise ValueError(f"name the columns of labels in targets=[...]; {_has(path, columns)}")
  places = [_place(path, columns, name) for name in (smiles, *targets)]
  for line, cells in rows[1:]:
    if len(cells) != len(columns):
      raise texts.at(path, line, f"has {len(cells)} cells, and the header {len(columns)}")
  named = list(zip(targets, places[1:], strict=True))
  labels = [[_label(path, line, *of, cells) for of in named] for line, cells in rows[1:]]
  lines = np.array([line for line, _ in rows[1:]])
  return Table(lines, [cells[places[0]] for _, cells in rows[1:]], np.array(labels, float))


def _place(path: Path, columns: list[str], name: str) -> int:
  if name not in columns:
    raise ValueError(f"no column {name!r}{checks.hint(name, columns)} {_has(path, columns)}")
  return columns.index(name)


def _has(path: Path, columns: list[str]) -> str:
  return f"{path} has the columns {listed(columns)}"


def _label(path: Path, line: int, name: str, place: int, cells: list[str]) -> float:
  if not cells[place]:
    return math.nan
  try:
    return texts.number(cells[place])
  except ValueError as error:
    raise texts.at(path, line, f"{name}: {error}; a cell without a label is empty") from None
