"""Reads portfolio files of the OR-Library: means, deviations and correlations of assets.

A file contains the number of assets n, then one line per asset with its mean and standard
deviation, then one line "i j r" per pair of assets i <= j, in any order, with their correlation r.
The lines "i i 1" must be either all present or all absent.
"""

import itertools
from pathlib import Path

import numpy as np

from research.tasks import texts

LARGEST = 1e12  # largest mean or standard deviation of an asset
SMALLEST = 1e-100  # minimum of the largest standard deviation
ROUNDING = 1e-6  # tolerance for the correlation of an asset with itself, which is 1


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads the means [n] and the covariance [n, n] from a file, both float64.

  Args:
    path: the file.

  Raises:
    ValueError: if a line is malformed, missing or repeated, or all deviations are zero.
  """
  assets: list[tuple[float, float]] = []
  correlations: dict[tuple[int, int], float] = {}
  count = 0

  def parse(fields: list[str]) -> None:
    nonlocal count
    if not count:
      count = _count(fields)
    elif len(assets) < count:
      assets.append(_asset(fields))
    else:
      pair, value = _pair(fields, count)
      if pair in correlations:
        raise ValueError(f"the correlation of assets {pair[0]} and {pair[1]} is already given")
      correlations[pair] = value

  lines = texts.parsed(path, parse)
  try:
    _check_complete(count, assets, correlations)
  except ValueError as error:
    raise ValueError(f"{path} ends after {len(lines)} lines: {error}") from None
  i, j = np.array([*correlations], int).reshape(-1, 2).T - 1
  matrix = np.eye(count)
  matrix[i, j] = matrix[j, i] = [*correlations.values()]
  means, deviations = np.array(assets).T
  return means, matrix * np.outer(deviations, deviations)


def _count(fields: list[str]) -> int:
  if len(fields) != 1 or (count := texts.whole(fields[0])) < 1:
    raise ValueError("a portfolio file of the OR-Library begins with its number of assets, above 0")
  return count


def _asset(fields: list[str]) -> tuple[float, float]:
  """Parses a mean and a standard deviation; float64 must be able to represent their squares."""
  if len(fields) != 2:
    raise ValueError(f"a line of an asset has its mean and deviation, not {len(fields)} fields")
  mean, deviation = map(texts.number, fields)
  for name, value, least in (("mean", mean, -LARGEST), ("standard deviation", deviation, 0.0)):
    if not least <= value <= LARGEST:
      raise ValueError(f"the {name} {value:g} is not in [{least:g}, {LARGEST:g}]")
  return mean, deviation


def _pair(fields: list[str], count: int) -> tuple[tuple[int, int], float]:
  """Parses two assets, the smaller number first, and their correlation."""
  if len(fields) != 3:
    raise ValueError(f"a line of a correlation is 'i j r', three fields, not {len(fields)}")
  i, j = sorted(map(texts.whole, fields[:2]))
  for asset in (i, j):
    if not 1 <= asset <= count:
      raise ValueError(f"asset {asset} is not one of the {count}, numbered from 1")
  value = texts.number(fields[2])
  if i == j and abs(value - 1) > ROUNDING:
    raise ValueError(f"the correlation of asset {i} with itself is {value:g}, not 1")
  if not -1 <= value <= 1 + (i == j):
    raise ValueError(f"the correlation {value:g} is not in [-1, 1]")
  return (i, j), value


def _check_complete(
  count: int, assets: list[tuple[float, float]], correlations: dict[tuple[int, int], float]
) -> None:
  """Raises ValueError if a file ends early or has only part of the diagonal."""
  if not count or len(assets) < count:
    raise ValueError(f"{len(assets)} of {count} assets are there")
  whole = any(i == j for i, j in correlations)
  for pair in itertools.combinations_with_replacement(range(1, count + 1), 2):
    if pair not in correlations and (whole or pair[0] < pair[1]):
      raise ValueError(f"the correlation of assets {pair[0]} and {pair[1]} is missing")
  if max(deviation for _, deviation in assets) < SMALLEST:
    raise ValueError(f"all standard deviations are below {SMALLEST:g}")
