"""Makes a command robust to standard streams that are closed or have lost their reader."""

import codecs
import io
import os
import sys

_ESCAPED = "bytes or escapes"
_NAMES = ("stdin", "stdout", "stderr")


class _Output(io.FileIO):
  """A standard output or error stream that discards data after its reader is gone.

  For standard output, a full disk is reported once; for standard error, it cannot be reported.
  """

  def __init__(self, number: int):
    super().__init__(number, "w", closefd=False)
    self._number, self._lost = number, False

  def write(self, data) -> int | None:
    if self._lost:
      return len(memoryview(data))
    try:
      return super().write(data)
    except OSError as error:
      self._lost = True
      if self._number == 2 or isinstance(error, BrokenPipeError):
        return len(memoryview(data))
      raise OSError(error.errno, error.strerror, "standard output") from error


def prepare() -> None:
  """Opens closed standard streams on the null device, and protects the others from a lost reader.

  Otherwise, a file that is opened later would get the descriptor of a closed stream, and libraries
  would print into this file. Streams that have been replaced, for example by a test, are not
  changed.
  """
  for number, name in enumerate(_NAMES):
    stream = getattr(sys, name)
    if stream is None:
      _open_null(number)
      mode = "w" if number else "r"
      setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False))
    elif number and stream is getattr(sys, f"__{name}__"):
      codecs.register_error(_ESCAPED, _escaped)
      errors = _ESCAPED if stream.errors in ("strict", "surrogateescape") else stream.errors
      raw = io.BufferedWriter(_Output(number))
      lines = number == 2 or stream.isatty()
      setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=lines))


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
  """Encodes unencodable characters: surrogate escapes as their bytes, others as escape codes."""
  try:
    return codecs.lookup_error("surrogateescape")(error)
  except UnicodeError:
    return codecs.backslashreplace_errors(error)


def _open_null(number: int) -> None:
  try:
    os.fstat(number)
  except OSError:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
      os.dup2(null, number)
      os.close(null)
    os.set_inheritable(number, True)
