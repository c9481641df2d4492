"""Reads token files on demand, and encodes texts larger than memory into such files once."""

import hashlib
import importlib.metadata
import logging
import os
import tokenize
import weakref
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from research.core import paths
from research.tasks import files, texts
from research.tasks.language import tokens

HEAD = 1 << 25  # maximum bytes of a text that a tokenizer is trained on
CHECKED = 64  # blocks of a text that are checked when it is opened
NATIVE = tuple(map(np.dtype, (np.uint8, np.uint16, np.uint32, np.int32)))
_MALFORMED = (  # raised by NumPy
  ValueError,
  EOFError,
  OverflowError,
  TypeError,
  SyntaxError,
  tokenize.TokenError,
)
_BLOCK = 1 << 22  # characters that are encoded at once


class TokenFile:
  """Gives access to the tokens [N] of a file. Slices are read on demand; nothing is cached."""

  def __init__(self, path: str | Path):
    """Opens a .npy file of integers in [0, 2^31), or a UTF-8 text whose bytes are the tokens.

    Slices have the file's dtype if this is uint8, uint16, uint32 or int32; otherwise int32. At most
    4 MiB of a text, in equally spaced blocks, are checked to be UTF-8.

    Raises:
      ValueError: if the file is neither a .npy file of such integers nor a text.
    """
    path = paths.local(path)
    if not path.is_file() or not path.stat().st_size:
      raise ValueError(f"{path} does not exist or is empty")
    if path.suffix in files.SUFFIXES[1:]:
      raise ValueError(f"{path} is compressed, and can only be read from its beginning; unpack it")
    self._stored, self._start, self._length = _contents(path)
    self.dtype = self._stored if self._stored in NATIVE else np.dtype(np.int32)
    self.path, self._file = path, os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, part: slice) -> np.ndarray:
    start, stop, _ = part.indices(self._length)
    size = self._stored.itemsize
    # not a memory map: its pages would count as this process's memory, up to the full file size
    found = os.pread(self._file, (stop - start) * size, self._start + start * size)
    if len(found) != (stop - start) * size:
      raise OSError(f"{self.path} has become shorter since it was opened")
    stored = np.frombuffer(found, self._stored)
    if self.dtype == self._stored:
      return stored
    least, most = stored.min(initial=0), stored.max(initial=0)
    if least < 0 or most >= 2**31:
      raise ValueError(f"{self.path} has tokens from {least} to {most}, not in [0, 2^31)")
    return stored.astype(self.dtype)


def _contents(path: Path) -> tuple[np.dtype, int, int]:
  """Returns the tokens' dtype, the byte offset of the first token, and the number of tokens."""
  if path.suffix != ".npy":
    try:
      texts.check(path, CHECKED)
    except ValueError as error:
      raise ValueError(f"{error}; tokens are read from .npy files of integers") from None
    return np.dtype(np.uint8), 0, path.stat().st_size
  try:
    found = np.lib.format.open_memmap(path, mode="r")
  except _MALFORMED as error:
    reason = str(error).partition("\n")[0]
    raise ValueError(f"{path} is not a .npy file of integers ({reason})") from None
  if found.ndim != 1 or found.dtype.kind not in "iu":
    raise ValueError(
      f"{path} holds {found.dtype} {list(found.shape)}, not tokens [N]: integers such as int32"
    )
  return np.dtype(found.dtype), found.offset, len(found)


class Encoded(NamedTuple):
  """Describes a text that is encoded as tokens."""

  path: Path  # path of the .npy file
  tokenizer: tokens.Tokenizer


def encoded(path: str | Path, vocabulary: int, share: float) -> Encoded:
  """Encodes a text by BPE and keeps the tokens in the user's cache.

  The cache is keyed by the text's path, size and modification time. Memory use does not grow with
  the text.

  Args:
    path: the path of a plain text in UTF-8.
    vocabulary: the number of tokens; see `tokens.bpe`.
    share: the fraction of the text's bytes to train the BPE on, in (0, 1]; at most the first 32 MiB
      are used.

  Raises:
    ValueError: if the text does not exist, is compressed or is not UTF-8, or `tokens.bpe` raises
      it.
  """
  TokenFile(path)  # checks the file
  path = paths.local(path).resolve()
  about = path.stat()
  head = _head(path, min(HEAD, int(share * about.st_size)))
  coder = tokens.bpe(head, vocabulary)
  made_by = (vocabulary, len(head), importlib.metadata.version("tokenizers"))
  of_text = (str(path), about.st_size, about.st_mtime_ns, *made_by)
  digest = hashlib.sha256(repr(of_text).encode()).hexdigest()[:16]
  target = files.cache() / "tokens" / f"{path.stem}-{digest}.npy"
  if not _holds_tokens(target, coder):
    texts.check(path)
    logging.getLogger(__name__).warning("encoding %s, once, into %s", path, target)
    _write(path, coder, target)
  return Encoded(target, coder)


def _head(path: Path, size: int) -> str:
  with path.open("rb") as file:
    content = file.read(size)
  return texts.decoded(content, path, end=False)  # drop an incomplete last character


def _holds_tokens(path: Path, coder: tokens.Tokenizer) -> bool:
  """Returns whether a cached file exists and has its full length and the tokenizer's dtype."""
  try:
    dtype, start, count = _contents(path)
  except (OSError, ValueError):
    return False
  return dtype == tokens.smallest(coder.size) and (
    path.stat().st_size == start + count * dtype.itemsize
  )


def _write(path: Path, coder: tokens.Tokenizer, target: Path) -> None:
  with (
    files.whole(target) as partial,
    partial.open("wb") as file,
    path.open(encoding="utf-8", newline="") as text,
  ):
    _header(file, coder.size, 0)
    count = 0
    while block := text.read(_BLOCK):
      found = coder.encode(block)
      file.write(found.tobytes())
      count += len(found)
    file.seek(0)
    _header(file, coder.size, count)  # NumPy pads the header for any length


def _header(file: IO[bytes], size: int, count: int) -> None:
  descr = np.lib.format.dtype_to_descr(np.dtype(tokens.smallest(size)))
  header = {"descr": descr, "fortran_order": False, "shape": (count,)}
  np.lib.format.write_array_header_1_0(file, header)
