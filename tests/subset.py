"""The quick set runs some rows of a parametrized table; `pytest -m slow` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(quick: Iterable[Any], rows: Iterable[Any]) -> list[Any]:
  """Marks the rows of a table as slow, except those of the quick set.

  Args:
    quick: the rows of the quick set.
    rows: all rows, each one parameter or a tuple of them.

  Returns:
    The rows in their order, for `pytest.mark.parametrize`.
  """
  chosen, table = list(quick), list(rows)
  assert all(row in table for row in chosen), "the quick set names a row that is not in the table"
  return [row if row in chosen else _slow(row) for row in table]


def _slow(row: Any) -> Any:
  return pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
