"""Splits molecules by scaffold, so that no scaffold is in two parts."""

from collections.abc import Sequence

import numpy as np

PARTS = ("train", "validation", "test")
SHARES = (0.8, 0.9)  # cumulative shares of molecules: the ends of training and of validation


def scaffold_split(scaffolds: Sequence[str]) -> dict[str, np.ndarray]:
  """Assigns scaffolds to training, validation and test, in this order, the most frequent first.

  The rare scaffolds are therefore in the validation and test parts. Equally frequent scaffolds are
  ordered by first occurrence, the latest first.

  Args:
    scaffolds: the scaffold of each molecule.

  Returns:
    The sorted row numbers of each of PARTS.

  Reference: Wu et al., 2018, MoleculeNet, arXiv:1703.00564, section 3.2; the order of DeepChem's
    ScaffoldSplitter.
  """
  groups: dict[str, list[int]] = {}
  for row, scaffold in enumerate(scaffolds):
    groups.setdefault(scaffold, []).append(row)
  ends = [share * len(scaffolds) for share in SHARES]
  parts: dict[str, list[int]] = {name: [] for name in PARTS}
  train, validation, test = parts.values()
  for rows in sorted(groups.values(), key=lambda rows: (-len(rows), -rows[0])):
    if len(train) + len(rows) <= ends[0]:
      train.extend(rows)
    elif len(train) + len(validation) + len(rows) <= ends[1]:
      validation.extend(rows)
    else:
      test.extend(rows)
  return {name: np.array(sorted(rows), int) for name, rows in parts.items()}
