"""Validates and expands paths that users give.

A run locks its folder, and appends to files in it and renames them; data files are read in place.
These operations require a file system, so URLs of object stores are rejected: mount the storage
instead.
"""

import errno
import os
import re
from pathlib import Path

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_NAME = 255  # maximum bytes of a file name on Linux
_PATH = 4096  # maximum bytes of a path on Linux
_ROOM = 256  # bytes reserved for the names of files in a run's folder


def local(text: str | Path) -> Path:
  """Expands `~` and `~user` in a path and validates it.

  Args:
    text: the path.

  Raises:
    ValueError: if the path is empty, a URL, too long or not UTF-8, or if the home directory is
      unknown.
  """
  text = str(text)
  if not text:
    raise ValueError("is empty; name a file or folder")
  if "\0" in text:
    raise ValueError("contains a NUL character, which paths cannot")
  _check_url(text)
  _check_encoding(text)
  path = _expanded(text)
  if any(len(os.fsencode(name)) > _NAME for name in path.parts):
    raise ValueError(f"contains a name of more than {_NAME} bytes")
  if len(os.fsencode(path)) >= _PATH:
    raise ValueError(f"is longer than {_PATH - 1} bytes")
  return path


def writable(text: str | Path) -> Path:
  """Validates the path of a folder that is writable or can be created, without writing anything.

  Args:
    text: the path.

  Raises:
    ValueError: if `local` rejects the path, or the path is a file or is not writable.
  """
  folder = local(text)
  try:
    if len(os.fsencode(folder.absolute())) + _ROOM > _PATH:
      raise ValueError(f"is too long: files in it would exceed {_PATH - 1} bytes")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  except OSError as error:
    raise ValueError(error.strerror) from error
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f"{there} is not a writable folder")
  return folder


def of_environment(name: str) -> Path | None:
  """Returns the path in an environment variable; None if it is empty or not set.

  Args:
    name: the name of the variable.

  Raises:
    ValueError: if `local` rejects the path; the message names the variable.
  """
  value = os.environ.get(name)
  if not value:
    return None
  try:
    return local(value)
  except ValueError as error:
    raise ValueError(f"{name}={value!r}: {error}") from None


def cache() -> Path | None:
  """Returns this project's folder in the user's cache, or None if the user has no home directory.

  Raises:
    ValueError: if $XDG_CACHE_HOME is not a valid path.
  """
  root = of_environment("XDG_CACHE_HOME")
  if root is None:
    try:
      root = Path.home() / ".cache"
    except RuntimeError:
      return None
  return root / "distributed-optimization-jax"


def is_full(error: BaseException | None) -> bool:
  """Returns whether an error was caused by a full disk or an exhausted quota.

  Args:
    error: the exception; its causes are examined too.
  """
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if os.strerror(errno.ENOSPC) in str(error):  # some libraries raise their own error types
      return True
    error = error.__cause__ or error.__context__
  return False


def _expanded(text: str) -> Path:
  path = Path(text)
  if not text.startswith("~"):
    # made absolute: ./~x would be taken for a home directory when it is printed and parsed again
    return path.absolute() if str(path).startswith("~") else path
  try:
    return path.expanduser()
  except RuntimeError:
    user = text.split("/", 1)[0]
    why = "there is no such user" if user != "~" else "$HOME is not set and the user has no entry"
    raise ValueError(
      f"the home directory {user!r} is not known ({why}); write the full path, or begin with ./ "
      "if it is a name"
    ) from None


def _check_url(text: str) -> None:
  found = _URL.match(text)
  if found is None:
    return
  scheme, rest = found.groups()
  if scheme.lower() == "file" and rest.startswith("/"):
    raise ValueError(f"is a URL; write only the path: {rest!r}")
  raise ValueError(
    f"is a URL ({scheme}://), and files are locked, appended to and renamed, which needs a file "
    "system; mount the storage and name the folder that it is mounted on"
  )


def _check_encoding(text: str) -> None:
  """Rejects names that are not UTF-8, which checkpoints and JSON do not support."""
  surrogates = [ord(character) for character in text if "\ud800" <= character <= "\udfff"]
  try:
    text.encode(errors="surrogateescape").decode()
  except UnicodeError:
    first = surrogates[0]
    byte = first - 0xDC00 if 0xDC80 <= first <= 0xDCFF else first  # undo Python's escape of a byte
    raise ValueError(f"is not UTF-8 (it holds {byte:#04x}); rename it, or link to it") from None
  try:
    os.fsencode(text)
  except UnicodeEncodeError:
    surrogates = [0]
  if surrogates:
    raise ValueError("has characters that this locale does not support; set LC_ALL=C.UTF-8")
