"""Classifies small images: scikit-learn's digits, which need no download, and MNIST."""

import math
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import numpy as np

from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks import files
from research.tasks.supervised import supervised

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"

MNIST_SHA256 = {  # digests of the decompressed bytes
  "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
  "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
  "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
  "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

DIGITS_TEST = 357  # of 1797; the remaining 1440 = 2^5 45 are divisible by many worker counts


def digits(*, model: Callable[[int], nn.Module] = Default("model", "mlp(hidden=[128])")) -> Task:
  """Classifies handwritten digits: 1440 training and 357 test images, 8x8 pixels, 17 grey levels.

  The split is always that of scikit-learn's stratified `train_test_split` with random_state=0.

  Args:
    model: a function that makes the module for 10 outputs.

  Reference:
    Alpaydin and Kaynak, 1998, Optical recognition of handwritten digits, UCI; its test part, as
    shipped with scikit-learn.
  """
  path = files.shipped("sklearn", "datasets/data/digits.csv.gz")
  rows = np.loadtxt(path, np.uint8, delimiter=",")
  x, y = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int32)
  train, test = ({"x": x[rows], "y": y[rows]} for rows in stratified(y, DIGITS_TEST, seed=0))
  return supervised(model(10), train, test, scale=16.0)


def stratified(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Splits rows into a training and a test part in which all classes have their share.

  The parts are those of scikit-learn's `train_test_split(test_size=count, stratify=labels,
  random_state=seed)`, whose import takes longer than a short run.

  Args:
    labels: the classes of the rows, from 0 [rows].
    count: the number of test rows.
    seed: the seed of the permutations.

  Returns:
    The numbers of the training rows and of the test rows, both in a random order.
  """
  random = np.random.RandomState(seed)
  sizes = np.bincount(labels)
  train = _shares(sizes, len(labels) - count, random)
  test = _shares(sizes - train, count, random)
  of_class = [np.flatnonzero(labels == number) for number in range(len(sizes))]
  order = [rows[random.permutation(len(rows))] for rows in of_class]
  first = np.concatenate([rows[:n] for rows, n in zip(order, train, strict=True)])
  rest = [rows[n : n + m] for rows, n, m in zip(order, train, test, strict=True)]
  return random.permutation(first), random.permutation(np.concatenate(rest))


def _shares(sizes: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
  """Divides `count` among classes in proportion to their sizes, by the largest remainders."""
  exact = sizes / sizes.sum() * count
  shares = np.floor(exact).astype(int)
  remainders = exact - shares
  for remainder in np.unique(remainders)[::-1]:
    missing = count - shares.sum()
    if missing == 0:
      break
    equal = np.flatnonzero(remainders == remainder)
    shares[random.choice(equal, size=min(len(equal), missing), replace=False)] += 1
  return shares


def mnist(
  parity: bool = False,
  *,
  model: Callable[[int], nn.Module] = Default("model", "mlp(hidden=[200, 200])"),
  data_dir: str = "",
) -> Task:
  """Classifies the digits of MNIST: 60,000 training and 10,000 test images of 28x28 pixels.

  Args:
    parity: whether to classify the digits only as odd or even, with the logistic loss.
    model: a function that makes the module for 10 outputs, or for one output if `parity` is True.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found and cannot be downloaded.
    ValueError: if a file is not the published one.

  Reference:
    LeCun, Cortes and Burges, 1998, the MNIST database. The default model is the 2NN of McMahan et
    al., 2016, arXiv:1602.05629.
  """
  train, test = (_mnist_part(part, data_dir) for part in ("train", "t10k"))
  if parity:
    train, test = ({**part, "y": part["y"] % 2} for part in (train, test))
    return supervised(model(1), train, test, loss="logistic", scale=255.0)
  return supervised(model(10), train, test, scale=255.0)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
  """Reads a uint8 array from an IDX file, plain or compressed.

  Args:
    path: the path of the file.
    dimensions: the expected number of dimensions.

  Raises:
    ValueError: if the dtype, the number of dimensions or the length is not as expected.
  """
  with files.opened(path) as file:
    content = file.read()
  magic, header = bytes([0, 0, 8, dimensions]), 4 * (1 + dimensions)
  if content[:4] != magic or len(content) < header:
    raise ValueError(
      f"{path} is not an IDX file of bytes in {dimensions} dimensions: "
      f"it starts with 0x{content[:4].hex()}, not 0x{magic.hex()}"
    )
  shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
  if len(content) - header != math.prod(shape):
    raise ValueError(
      f"{path} says that it holds {shape} = {math.prod(shape)} bytes, "
      f"and holds {len(content) - header}"
    )
  return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _mnist_part(part: str, data_dir: str) -> Batch:
  names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
  images, labels = (
    files.find(f"mnist/{name}", data_dir, f"{MNIST_URL}{name}.gz", MNIST_SHA256[name])
    for name in names
  )
  x, y = read_idx(images, 3), read_idx(labels, 1)
  if len(x) != len(y):
    raise ValueError(f"{images} has {len(x)} images, and {labels} {len(y)} labels")
  return {"x": x, "y": y.astype(np.int32)}
