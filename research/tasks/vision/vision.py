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
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  images, labels = load_digits(return_X_y=True)
  x, y = images.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.int32)
  parts = train_test_split(x, y, test_size=DIGITS_TEST, stratify=y, random_state=0)
  train, test = {"x": parts[0], "y": parts[2]}, {"x": parts[1], "y": parts[3]}
  return supervised(model(10), train, test, scale=16.0)


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
