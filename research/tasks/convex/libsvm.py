"""Builds tasks from LIBSVM files: classification and ridge regression."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from research.core import paths
from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks import files, texts
from research.tasks.supervised import supervised

URL = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"

SHA256 = {
  "a1a": "eb54c45f1bdb51286f803dd092eb8202b44637a858fc6c4e533a2d64a0d94b4e",
  "a9a": "f5d5ffd8d865ff41328e7ee043e4b020816914ff6843ff15b98905ddbedce906",
  "mushrooms": "f39a4eb628dc61a7d43760815b061c9e497aa728ce1ad8bde57a09ef6043b538",
  "w8a": "6a9fa8fd5f524303240a5db07d4b3d4a51e8b7b4b20a914105d8e3e8c81640f2",
}

LARGEST = float(np.finfo(np.float32).max)  # largest label or value
DENSE_BYTES = 1 << 30  # largest size at which rows are stored dense


def libsvm(
  name: str,
  test: str = "",
  l2: float = 0.0,
  sparse: bool | None = None,
  nonconvex: float = 0.0,
  loss: str = "",
  *,
  model: Callable[[int], nn.Module] = Default("model", "logistic()"),
  data_dir: str = "",
) -> Task:
  """Returns a classification or least-squares task on a LIBSVM file.

  Classification uses the logistic loss for two classes and the softmax cross-entropy for more. The
  distinct labels of the file, in ascending order, become 0, 1, ... The loss "squares" uses the
  labels as numbers. Feature indices start at one. The rows are stored dense if all of them together
  take at most 1 GiB in float32. Otherwise they are stored sparse, as {"index", "value"} [N, longest
  row] padded with value 0, which `linear` and `logistic` accept.

  Args:
    name: the name of a two-class data set of the LIBSVM collection, such as "a9a", "w8a" or
      "mushrooms", which is downloaded if needed; or the path of any file, such as "folder/mine.svm"
      or "./mine.svm". The file may be plain, .gz or .bz2.
    test: the name or path of a file of test examples, such as "a9a.t"; "" for no test examples.
    l2: the weight of the penalty l2/2 ||params||^2; see `supervised`.
    sparse: whether rows are stored sparse; None decides by size, as described above.
    nonconvex: the weight of the penalty sum_j w_j^2 / (1 + w_j^2); see `supervised`.
    loss: "squares" for half of the squared error, or empty for classification.
    model: a function that makes the module for a given number of outputs: one for two classes and
      for squares, otherwise one per class.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found and cannot be downloaded.
    ValueError: if a path does not lead to a file, a file is malformed or contains a number that is
      not finite in float32, the labels are not classes, or the loss is unknown.

  Reference:
    Chang and Lin, 2011, LIBSVM: a library for support vector machines, ACM TIST 2(3).
  """
  if sparse not in (None, True, False):
    raise ValueError(f"sparse={sparse!r} is none of None, True, False")
  if loss not in ("", "squares"):
    raise ValueError(f"loss={loss!r} is neither 'squares' nor empty")
  found = [_path(name, data_dir) for name in (name, test) if name]
  loaded = _load(found)
  rows, labels = loaded[0::2], loaded[1::2]
  features = rows[0].shape[1]
  if sparse is None:
    sparse = 4 * features * sum(x.shape[0] for x in rows) > DENSE_BYTES
  if loss == "squares":
    outputs, targets = 1, [y.astype(np.float32) for y in labels]
  else:
    classes = _classes(found[0], labels[0])
    loss, outputs = ("logistic", 1) if len(classes) == 2 else ("softmax", len(classes))
    targets = [_encoded(path, y, classes) for path, y in zip(found, labels, strict=True)]
  train, *rest = (
    {"x": _padded(x) if sparse else x.toarray(), "y": y} for x, y in zip(rows, targets, strict=True)
  )
  return supervised(
    model(outputs),
    train,
    rest[0] if rest else None,
    loss=loss,
    l2=l2,
    nonconvex=nonconvex,
    features=features if sparse else 0,
  )


def _path(name: str, data_dir: str) -> Path:
  if "/" not in name and not name.startswith("~"):
    return files.find(f"libsvm/{name}", data_dir, URL + name, SHA256.get(name))
  path = paths.local(name)
  if not path.is_file():
    what = "is a folder" if path.is_dir() else "does not exist"
    raise ValueError(f"{name!r} {what}; give the path of a file in the LIBSVM format")
  return path


def _load(places: list[Path]) -> list[Any]:
  """Loads [rows, labels, rows, labels, ...]; all sparse float32 rows have the same width."""
  from sklearn.datasets import load_svmlight_files

  try:
    loaded = load_svmlight_files(
      [str(p) for p in places],
      dtype=np.float32,  # pyright: ignore[reportArgumentType]
      zero_based=False,  # pyright: ignore[reportArgumentType]
    )
  except (ValueError, OverflowError, *files.CORRUPT) as error:
    for path in places:
      texts.parsed(path, _check_fields)
    raise ValueError(f"{', '.join(map(str, places))}: not in the LIBSVM format ({error})") from None
  for path, x, y in zip(places, loaded[0::2], loaded[1::2], strict=True):
    if not len(y):
      raise ValueError(f"{path} has no examples")
    if not (np.isfinite(x.data).all() and (np.abs(y) <= LARGEST).all()):
      texts.parsed(path, _check_fields)
  return loaded


def _check_fields(fields: list[str]) -> None:
  """Checks that a line has the format "LABEL INDEX:VALUE ... # comment"."""
  label, *pairs = " ".join(fields).partition("#")[0].split() or ["0"]
  try:
    _check_number(label)
    last = 0
    for pair in pairs[1:] if pairs and pairs[0].startswith("qid:") else pairs:
      index, colon, value = pair.partition(":")
      if not colon:
        raise ValueError(f"{texts.shown(pair)} is not INDEX:VALUE")
      feature = texts.whole(index)
      if not last < feature < 2**31:
        raise ValueError(f"index {feature} after {last}; they begin at 1, rise and are below 2^31")
      _check_number(value)
      last = feature
  except ValueError as error:
    raise ValueError(f"not in the LIBSVM format ({error})") from None


def _check_number(field: str) -> None:
  value = texts.number(field)
  if abs(value) > LARGEST:
    raise ValueError(f"{value:g} does not fit float32, which ends at {LARGEST:.3g}")


def _line(path: Path, row: int) -> int:
  """Returns the line number of the example with index `row`."""
  return [line for line, _ in texts.rows(path, "#")][row]


def _classes(path: Path, labels: np.ndarray) -> np.ndarray:
  classes = np.unique(labels)
  if not np.array_equal(classes, np.round(classes)):
    row = np.flatnonzero(labels != np.round(labels))[0]
    reason = f"label {labels[row]:g} is not an integer; this task classifies"
    raise texts.at(path, _line(path, row), reason)
  if len(classes) < 2:
    raise ValueError(f"{path}: all labels are {classes.tolist()}; need two classes or more")
  return classes


def _encoded(path: Path, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
  unknown = np.flatnonzero(~np.isin(labels, classes))
  if len(unknown):
    label, line = labels[unknown[0]], _line(path, unknown[0])
    raise ValueError(
      f"{path}: label {label:g} is not one of {classes.tolist()} in training, but in line {line}"
    )
  return np.searchsorted(classes, labels).astype(np.int32)


def _padded(rows: Any) -> Batch:
  """Converts a CSR matrix to rows of stored entries, padded with index 0 and value 0."""
  lengths = np.diff(rows.indptr)
  own = np.arange(max(1, lengths.max())) < lengths[:, None]
  index, value = np.zeros(own.shape, np.int32), np.zeros(own.shape, np.float32)
  index[own], value[own] = rows.indices, rows.data
  return {"index": index, "value": value}
