"""Finds data files in the user's folders or downloads them, and verifies their contents."""

import bz2
import contextlib
import gzip
import hashlib
import http.client
import importlib.util
import io
import logging
import shutil
import urllib.error
import urllib.request
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from research.core import paths

SUFFIXES = ("", ".gz", ".bz2")
TIMEOUT = 30.0  # seconds without an answer
CORRUPT = (EOFError, OSError, zlib.error)  # raised by gzip, bz2 and zlib
_CHUNK = 1 << 20


def find(relative: str, data_dir: str, url: str, sha256: str | None = None) -> Path:
  """Finds or downloads a data file, plain or compressed, and verifies its contents.

  The function searches `data_dir`, $RESEARCH_DATA_DIR and the user's cache, which is the folder
  distributed-optimization-jax in $XDG_CACHE_HOME or ~/.cache. In each folder DIR, the function
  tries DIR/relative and DIR/basename, also with .gz or .bz2 appended. The first file found is used;
  damaged files in the cache are skipped. If no file is found, `url` is downloaded into the cache.

  Args:
    relative: the path relative to a data folder, without a compression suffix, such as
      "libsvm/a9a".
    data_dir: the user's data folder, or "" for none.
    url: the address of the published file, which may be plain, .gz or .bz2.
    sha256: the SHA-256 of the decompressed bytes, as 64 hex digits. If it is None, the file's
      digest is logged instead.

  Returns:
    The path of the file, to be opened with `opened`; its suffix indicates the compression.

  Raises:
    FileNotFoundError: if the file is not found and cannot be downloaded.
    ValueError: if the file is truncated or does not match sha256, or data_dir is not a folder.
  """
  if data_dir and not paths.local(data_dir).is_dir():
    raise ValueError(f"data_dir={data_dir!r} is not a directory")
  named = (data_dir and paths.local(data_dir), paths.of_environment("RESEARCH_DATA_DIR"))
  own = paths.cache()
  folders = [folder for folder in (*named, own) if folder]
  damaged = None
  for folder, path in _places(folders, relative):
    try:
      _verify(path, sha256, str(path))
      return path
    except ValueError as error:
      if folder != own:
        raise
      damaged = damaged or error
  if damaged:
    logging.getLogger(__name__).warning("%s; it is fetched again", damaged)
  try:
    return _fetch(url, cache() / relative, sha256)
  except (OSError, http.client.HTTPException, NoCache) as error:
    if paths.is_full(error):
      raise
    reason = getattr(error, "reason", None) or error
    if damaged:
      raise ValueError(f"{damaged}, and {url} cannot be fetched ({reason})") from None
    looked = f"not in {', '.join(map(str, folders))}" if folders else "in no known folder"
    goal = f"save it as {folders[0] / relative}" if folders else "name its folder by data_dir"
    raise FileNotFoundError(
      f"{relative} is {looked}, and {url} cannot be fetched ({reason}); "
      f"{goal} (.gz and .bz2 may stay compressed)"
    ) from None


def _places(folders: Sequence[Path], relative: str) -> Iterator[tuple[Path, Path]]:
  """Yields the existing files among which `find` chooses, each with its folder."""
  for folder in folders:
    for place in (folder / relative, folder / PurePosixPath(relative).name):
      for suffix in SUFFIXES:
        path = place.with_name(place.name + suffix)
        if path.is_file():
          yield folder, path


@contextlib.contextmanager
def opened(path: Path, name: str = "") -> Iterator[io.BufferedIOBase]:
  """Opens a file for reading, decompressed according to its suffix.

  Args:
    path: the path of the file.
    name: the name to show in error messages instead of the path.

  Raises:
    ValueError: during reading, if the file is truncated or not compressed as its suffix says.
  """
  if path.suffix not in (".gz", ".bz2"):
    with path.open("rb") as file:
      yield file
    return
  try:
    with (gzip.open if path.suffix == ".gz" else bz2.open)(path) as file:
      yield file
  except CORRUPT as error:
    raise ValueError(f"{name or path} is truncated or no {path.suffix} file ({error})") from None


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
  """Yields a temporary path; renames it to `target` at the end, unless an exception is raised.

  Readers never see a partial file, even if several processes write it at the same time.

  Args:
    target: the final path.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
  try:
    yield partial
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)


class NoCache(ValueError):
  """Raised if there is no folder to cache files in."""


def kept(relative: str, make: Callable[[], str]) -> str:
  """Returns the text that `make` returns, and keeps it in the user's cache.

  The first line of the cached file is the text's SHA-256; a file that does not match its digest is
  replaced. Without a writable cache, each call calls `make` again.

  Args:
    relative: the path relative to the cache, which must identify everything that the text depends
      on.
    make: a function that returns the text, which depends only on what `relative` identifies.
  """
  root = paths.cache()
  if root is None:
    return make()
  path = root / relative
  if path.is_file():
    digest, _, content = path.read_bytes().decode(errors="replace").partition("\n")
    if digest == _sha256(content):
      return content
    logging.getLogger(__name__).warning("%s is damaged and is written again", path)
  content = make()
  try:
    with whole(path) as partial:
      partial.write_bytes(f"{_sha256(content)}\n{content}".encode())
  except OSError as error:
    logging.getLogger(__name__).warning("%s cannot be kept for other runs (%s)", path, error)
  return content


def cache() -> Path:
  """Returns the folder in which downloaded and derived files are cached.

  Raises:
    NoCache: if the user has no home directory.
  """
  found = paths.cache()
  if found is None:
    raise NoCache("there is no cache folder, since $HOME is not set; set XDG_CACHE_HOME")
  return found


def shipped(package: str, relative: str) -> Path:
  """Finds a data file that an installed package brings with it, without importing the package.

  Args:
    package: the name of the package.
    relative: the file's path inside the package.

  Raises:
    ModuleNotFoundError: if the package is not installed.
    FileNotFoundError: if the package does not have the file.
  """
  found = importlib.util.find_spec(package)
  if found is None or found.origin is None:
    raise ModuleNotFoundError(f"No module named {package!r}", name=package)
  path = Path(found.origin).parent / relative
  if not path.is_file():
    raise FileNotFoundError(
      f"the installed {package} does not contain {relative}; install another version of {package}"
    )
  return path


def _sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _verify(path: Path, sha256: str | None, source: str) -> None:
  digest = hashlib.sha256()
  with opened(path, source) as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  found = digest.hexdigest()
  if sha256 is None:
    logging.getLogger(__name__).warning("%s has no recorded sha256; it has %s", source, found)
  elif found != sha256:
    raise ValueError(
      f"{source} is truncated or another file: its decompressed bytes have sha256 "
      f"{found[:12]}, expected {sha256[:12]}"
    )


def _fetch(url: str, target: Path, sha256: str | None) -> Path:
  """Downloads a file and, after verification, renames it to `target`."""
  suffix = PurePosixPath(url).suffix
  if suffix in SUFFIXES and target.suffix != suffix:
    target = target.with_name(target.name + suffix)
  with whole(target) as path:
    with path.open("wb") as file:
      _download(url, file)
    _verify(path, sha256, url)
  return target


def _download(url: str, file: IO[bytes]) -> None:
  try:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
      shutil.copyfileobj(answer, file, _CHUNK)
      length = answer.headers.get("Content-Length")
  except urllib.error.HTTPError as error:
    error.close()
    raise
  if length is not None and file.tell() != int(length):
    raise ConnectionError(f"the connection broke after {file.tell()} of {length} bytes")
