"""Computes fingerprints of a run's data and of the user's code, which flags do not determine.

A run is resumed or shown again only if the examples and the code are unchanged.
"""

import collections
import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from research.core import blame, plugins
from research.core.task import Task
from research.sim.network import Network

_WHOLE = 2**26  # maximum bytes of an array that is hashed in full
# Types of class attributes that are hashed, and name prefixes of Python's and Flax's internals.
_PLAIN = bool | int | float | complex | str | bytes | tuple | list | dict | set | np.ndarray
_LIBRARY = ("__", "_object__", "_pytree__", "_abc_")
_SHOWN = ("measured_on", "model", "title")  # fields of a task that do not affect its results
_BLOCK = 2**16  # bytes of a block; for larger arrays, blocks of _WHOLE bytes in total are hashed


def of_specs(task: Task, *parts: Any) -> dict[str, str]:
  """Computes the fingerprints of a run that is built from specs.

  The specs identify functions of this codebase and of libraries, so these functions are not hashed.

  Args:
    task: the task.
    *parts: the other objects of the run.

  Returns:
    The fingerprints "data" and, if the objects contain user code, "code".
  """
  walk = _Walk(values=False)
  walk.add((_without_data(task), *parts))
  registered = plugins.fingerprint()  # plugins, whose functions may not appear in the objects
  walk.digest.update(registered.encode())
  code = {"code": walk.digest.hexdigest()[:16]} if walk.found or registered else {}
  return {"data": of_data(task, *parts), **code}


def of_objects(task: Task, *parts: Any) -> dict[str, str]:
  """Computes the fingerprints of a run that is built from a program's objects.

  The hash of a function covers its bytecode and captured values, but not comments or paths. The
  hash of an object without fields or leaves covers only its type.

  Args:
    task: the task.
    *parts: the other objects of the run.

  Returns:
    The fingerprints "data" and "code"; "code" covers all values and functions.
  """
  walk = _Walk(values=True)
  walk.add((_without_data(task), *parts))
  return {"data": of_data(task, *parts), "code": walk.digest.hexdigest()[:16]}


def of_data(task: Task, *parts: Any) -> str:
  """Hashes a task's training and test examples, including labels, and files that parts read.

  For an array larger than 64 MiB, only 1024 evenly spaced blocks of 64 KiB are hashed.

  Args:
    task: the task.
    *parts: the other objects of the run, of which a network may have a file of its workers' times.
  """
  digest = hashlib.sha256()
  for name, examples in (("train", task.train), ("test", task.test), ("by", task.by)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(examples):
      digest.update(f"{name}{jax.tree_util.keystr(path)}".encode())
      _add_array(digest, np.asarray(leaf))
  if task.feed:
    digest.update(f"{task.feed.examples} examples to read".encode())
  for part in parts:
    if isinstance(part, Network):
      digest.update(part.presence.contents())
  return digest.hexdigest()[:16]


def _without_data(task: Task) -> Task:
  return task._replace(train={}, test=None, by=None)


def _add_array(digest: Any, array: np.ndarray) -> None:
  digest.update(f"{array.dtype} {array.shape} ".encode())
  if array.dtype.hasobject:
    digest.update(repr(array.tolist()).encode())
  elif array.nbytes <= _WHOLE:
    digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.nbytes else b"")
  else:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in np.linspace(0, flat.size - _BLOCK, _WHOLE // _BLOCK, dtype=np.int64):
      digest.update(flat[start : start + _BLOCK].data)


class _Walk:
  """Hashes an object and everything to which it refers, breadth-first, each object once."""

  def __init__(self, values: bool):
    self.digest, self.found, self._values = hashlib.sha256(), False, values
    self._met: dict[int, tuple[int, Any]] = {}  # by id; keeps the objects, so that ids are unique
    self._next: collections.deque[Any] = collections.deque()

  def add(self, x: Any) -> None:
    """Hashes an object and everything to which it refers."""
    self._next.append(x)
    while self._next:
      self._one(self._next.popleft())

  def _one(self, x: Any) -> None:
    if x is None or isinstance(x, bool | int | float | complex | str | bytes | np.generic):
      self._say(repr(x))
    elif id(x) in self._met:
      self._say(f"the {self._met[id(x)][0]}th")
    else:
      self._met[id(x)] = len(self._met), x
      self._add_new(x)

  def _say(self, text: str) -> None:
    if self._values or self.found:
      self.digest.update(text.encode() + b"\0")

  def _all(self, parts: Iterable[Any]) -> None:
    self._next.extend(parts)

  def _add_new(self, x: Any) -> None:
    self._say(f"{type(x).__module__}.{type(x).__qualname__}")
    if isinstance(x, types.ModuleType):
      self._say(x.__name__)
    elif isinstance(x, np.ndarray | jax.Array):
      self._array(x)
    elif isinstance(x, Mapping):
      self._all(item for pair in x.items() for item in pair)
    elif isinstance(x, Task):
      self._all(value for name, value in x._asdict().items() if name not in _SHOWN)
    elif isinstance(x, list | tuple):
      self._all(x)
    elif isinstance(x, set | frozenset):
      self._all(sorted(x, key=repr))
    elif isinstance(x, functools.partial):
      self._all((x.func, x.args, x.keywords))
    elif isinstance(x, types.MethodType):
      self._all((x.__self__, x.__func__))
    elif isinstance(x, types.FunctionType):
      self._function(x)
    elif isinstance(x, type):
      self._class(x)
    elif (inner := getattr(x, "__wrapped__", None)) is not None:
      self._all([inner])
    else:
      self._object(x)

  def _array(self, x: Any) -> None:
    if not self._values:
      return
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    _add_array(self.digest, np.asarray(x))

  def _function(self, x: types.FunctionType) -> None:
    self._say(f"{x.__module__}.{x.__qualname__}")
    if blame.is_users(x.__module__ or ""):
      self.found = True
      self._code(x.__code__, x.__globals__)
    cells = [cell.cell_contents for cell in x.__closure__ or () if _is_full(cell)]
    self._all((x.__defaults__, x.__kwdefaults__, getattr(x, "__wrapped__", None), *cells))

  def _code(self, code: types.CodeType, names: Mapping[str, Any]) -> None:
    """Hashes a user's function and everything to which it refers by name."""
    self.digest.update(code.co_code)
    for constant in code.co_consts:
      if isinstance(constant, types.CodeType):
        self._code(constant, names)
      else:
        self._say(repr(sorted(constant)) if isinstance(constant, frozenset) else repr(constant))
    for name in code.co_names:
      self._say(name)
      if name in names:
        self._all([names[name]])

  def _class(self, x: type) -> None:
    self._say(f"{x.__module__}.{x.__qualname__}")
    if blame.is_users(x.__module__):
      self.found = True
      self._all(x.__bases__)
      for name, value in sorted(vars(x).items()):
        if isinstance(value, staticmethod | classmethod | property):
          value = value.fget if isinstance(value, property) else value.__func__
        is_own = isinstance(value, types.FunctionType) and value.__module__ == x.__module__
        if is_own or (isinstance(value, _PLAIN) and not name.startswith(_LIBRARY)):
          self._say(name)
          self._all([value])

  def _object(self, x: Any) -> None:
    """Hashes the object's class and fields."""
    self._all([type(x)])
    if dataclasses.is_dataclass(x):
      self._all(getattr(x, field.name, None) for field in dataclasses.fields(x))
    elif blame.is_users(type(x).__module__):
      self._all(item for pair in _fields(x) for item in pair)
    elif self._values:
      leaves = jax.tree.leaves(x)
      self._all(() if len(leaves) == 1 and leaves[0] is x else leaves)


def _fields(x: Any) -> Iterator[tuple[str, Any]]:
  """Yields the attributes of an object of a user's class, without a library's internals."""
  return ((name, value) for name, value in vars(x).items() if not name.startswith(_LIBRARY))


def _is_full(cell: Any) -> bool:
  try:
    return cell.cell_contents is not cell
  except ValueError:  # not assigned yet
    return False
