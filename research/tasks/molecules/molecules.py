"""Predicts properties of molecules; labels may be missing, and tests use new scaffolds."""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core import checks, paths
from research.core.base import Array
from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks import files
from research.tasks.molecules import chemistry, molecule_table
from research.tasks.molecules.molecule_metrics import CHUNK, measured
from research.tasks.molecules.molecule_table import Table
from research.tasks.molecules.scaffold_split import PARTS, scaffold_split
from research.tasks.partition import by_scaffold
from research.tasks.supervised import supervised

URL = "https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/"
SHOWN = 5  # number of unparsable SMILES that a warning shows


class Published(NamedTuple):
  """Describes a published table."""

  file: str
  sha256: str  # digest of the decompressed bytes
  targets: tuple[str, ...]
  smiles: str = "smiles"


ASSAYS = (
  *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
  *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
PUBLISHED = {
  "esol": Published(
    "delaney-processed.csv",
    "8c06a76f0c6487d29ab0f903e6a7a7139f189ab3c1178f159c8be8964602f189",
    ("measured log solubility in mols per litre",),
  ),
  "tox21": Published(
    "tox21.csv.gz", "1689278aa402ef8da840be1126c547253338d390cc8526714910a3b2a39fa1c9", ASSAYS
  ),
  "hiv": Published(
    "HIV.csv", "d0e985c9c1191c77958ac52a278338c241858394fd3b299f56113329e1fc935c", ("HIV_active",)
  ),
}


class Compounds(NamedTuple):
  """Contains the rows of a table whose SMILES parse."""

  table: Table
  scaffolds: list[str]
  x: Any  # fingerprints or graphs, [N, ...]


def molecules(
  name: str = "esol",
  targets: Sequence[str] = (),
  smiles: str = "",
  part: str = "test",
  laboratories: int = 0,
  only: int = 0,
  radius: int = 2,
  bits: int = 2048,
  l2: float = 0.0,
  *,
  model: Callable[[int], nn.Module] = Default("model", "graph_network()"),
  data_dir: str = "",
) -> Task:
  """Predicts the labels of molecules, which are given as SMILES in a table.

  A model that has the attribute `reads = "graphs"`, such as `graph_network`, gets graphs of atoms
  and bonds; any other model, such as `mlp`, gets counts of Morgan fingerprints.

  If all labels are 0 or 1, the loss is the cross-entropy, and the metric "auc" is the area under
  the ROC curve, averaged over the targets. Otherwise, labels are standardized with the mean and
  deviation of the training molecules, the loss is half the squared error, and the metric "rmse" is
  in the units of the targets, averaged over them. Missing labels have weight zero: the objective is
  the mean over the labels that are present.

  All molecules with the same Bemis-Murcko scaffold are in the same part: training (80%), validation
  (10%) or test (10%); see `scaffold_split`. A partition divides the molecules among laboratories:
  `--partition="by_scaffold()"` gives each laboratory scaffolds of its own; other partitions that
  need labels use the index of the scaffold. SMILES that do not parse are left out and reported.

  Args:
    name: "esol", the solubility of 1128 molecules; "tox21", 12 assays of 8006 molecules; "hiv", the
      activity of 41127 molecules; or the path of a comma-separated table with a header, plain, .gz
      or .bz2.
    targets: the names of the label columns; empty means those of a published table.
    smiles: the name of the SMILES column; empty means "smiles".
    part: the molecules to evaluate on, "test" or "validation"; choose hyper-parameters on the
      validation molecules.
    laboratories: with `only`, the number of laboratories into which `by_scaffold` divides the
      training molecules.
    only: the number of the laboratory that trains alone, from 1; 0 means that all train.
    radius: the radius of the fingerprints in bonds, at least 0.
    bits: the length of the fingerprints.
    l2: the weight of the penalty l2/2 ||params||^2.
    model: a function that makes the module for a given number of outputs, here the number of
      targets.

  Raises:
    FileNotFoundError: if a published table is not found and cannot be downloaded.
    ValueError: if RDKit is not installed; the file is not such a table or lacks a column; the part
      or laboratory does not exist; or a part has no molecules or no labels to measure.

  Reference: Wu et al., 2018, MoleculeNet, arXiv:1703.00564; Delaney, 2004, ESOL, J. Chem. Inf.
    Comput. Sci. 44; the Tox21 challenge, 2014; the AIDS antiviral screen of the NCI.
  """
  checks.one_of("part", part, PARTS[1:])
  checks.at_least("radius", radius, 0)
  checks.positive_integer("bits", bits)
  if only and not 1 <= only <= laboratories:
    raise ValueError(f"only={only} is none of the laboratories 1 to {laboratories}")
  path, columns, labels = _source(name, targets, smiles, data_dir)
  module = model(len(labels))
  graphs = getattr(module, "reads", "") == "graphs"
  features = "graphs" if graphs else (radius, bits)
  found = _compounds(path, path.stat().st_mtime_ns, columns, labels, features)
  rows = scaffold_split(found.scaffolds)
  for each in (PARTS[0], part):
    if not len(rows[each]):
      raise ValueError(f"{path}: {len(found.scaffolds)} molecules leave none for {each}")
  group = np.unique(found.scaffolds, return_inverse=True)[1].astype(np.int32)
  own = rows["train"]
  if only:
    own = own[by_scaffold()(group[own], laboratories, 0)[only - 1]]
  y = found.table.labels
  scale = _scale(path, labels, y[own])
  train, test = (_examples(found.x, y, r, scale) for r in (own, rows[part]))
  loss = _cross_entropy if scale is None else _squares
  task = supervised(module, train, test, loss=loss, l2=l2, scale=1.0)
  measure = measured(module, test["x"], y[rows[part]], scale)
  return task._replace(
    measure=measure, measured_on=part, by=group[own], chunk=CHUNK if graphs else task.chunk
  )


def load(
  name: str,
  targets: Sequence[str] = (),
  smiles: str = "",
  radius: int = 2,
  bits: int = 2048,
  data_dir: str = "",
) -> tuple[Compounds, dict[str, np.ndarray]]:
  """Loads the molecules with their fingerprints, and the row numbers of each part of the split.

  Args:
    name: the name or path of the table; see `molecules`.
    targets: the names of the label columns; see `molecules`.
    smiles: the name of the SMILES column.
    radius: the radius of the fingerprints.
    bits: the length of the fingerprints.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError, ValueError: if the table is not found or is invalid; see `molecules`.
  """
  path, columns, labels = _source(name, targets, smiles, data_dir)
  found = _compounds(path, path.stat().st_mtime_ns, columns, labels, (radius, bits))
  return found, scaffold_split(found.scaffolds)


def _source(
  name: str, targets: Sequence[str], smiles: str, data_dir: str
) -> tuple[Path, str, tuple[str, ...]]:
  """Returns the table's path and the names of its SMILES column and its label columns."""
  if isinstance(targets, str):
    raise ValueError(f"targets={targets!r} is not a list of columns: write targets=[{targets!r}]")
  if known := PUBLISHED.get(name):
    path = files.find(f"moleculenet/{known.file}", data_dir, URL + known.file, known.sha256)
    return path, smiles or known.smiles, tuple(targets) or known.targets
  path = paths.local(name)
  if not path.is_file():
    raise ValueError(f"{name!r} is neither a file nor one of {', '.join(PUBLISHED)}")
  return path, smiles or "smiles", tuple(targets)


@functools.lru_cache(maxsize=2)
def _compounds(
  path: Path, changed: int, smiles: str, targets: tuple[str, ...], features: Any
) -> Compounds:
  """Reads and parses a table; the cache key includes `changed`, the modification time."""
  del changed
  table = molecule_table.read(path, smiles, targets)
  parsed = chemistry.parsed(table.smiles)
  kept = np.array([row for row, molecule in enumerate(parsed) if molecule is not None], int)
  if left_out := [row for row, molecule in enumerate(parsed) if molecule is None]:
    first = ", ".join(f"{table.smiles[r]!r} in line {table.lines[r]}" for r in left_out[:SHOWN])
    logging.getLogger(__name__).warning(
      "%s: %d of %d SMILES do not parse and are left out; the first: %s",
      *(path, len(left_out), len(parsed), first),
    )
  if not len(kept):
    raise ValueError(f"{path}: none of the SMILES in column {smiles!r} parse")
  molecules = [parsed[row] for row in kept]
  if features == "graphs":
    x = chemistry.graphs(molecules)
  else:
    x = chemistry.fingerprints(molecules, *features)
  return Compounds(table.take(kept), chemistry.scaffolds(molecules), x)


def _scale(path: Path, names: Sequence[str], y: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns each target's mean and deviation, both [T]; None if all labels are 0 or 1."""
  known = ~np.isnan(y)
  for name, count in zip(names, known.sum(axis=0).tolist(), strict=True):
    if not count:
      raise ValueError(f"{path}: no training molecule has a label in column {name!r}")
  if np.isin(y[known], (0, 1)).all():
    return None
  spread = np.nanstd(y, axis=0)
  return np.nanmean(y, axis=0), np.where(spread > 0, spread, 1)


def _examples(x: Any, y: np.ndarray, rows: np.ndarray, scale: Any) -> Batch:
  """Returns the examples of the given rows; "weight" [n, T], summed over targets, has mean 1."""
  y, known = y[rows], ~np.isnan(y[rows])
  center, spread = scale or (0, 1)
  weight = known / max(1, known.sum()) * len(rows)
  return {
    "x": jax.tree.map(lambda leaf: leaf[rows], x),
    "y": np.where(known, (y - center) / spread, 0).astype(np.float32),
    "weight": weight.astype(np.float32),
  }


def _cross_entropy(outputs: Array, batch: Batch) -> Array:
  losses = jax.nn.softplus(outputs) - batch["y"] * outputs
  return jnp.sum(batch["weight"] * losses, axis=1)


def _squares(outputs: Array, batch: Batch) -> Array:
  return jnp.sum(batch["weight"] * (outputs - batch["y"]) ** 2, axis=1) / 2
