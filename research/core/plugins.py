"""Imports modules of other packages that register names, in all processes of a command.

`load` imports the module given by --import. A process that starts another process passes
`carried()` to the new process. There, `load_all` imports these modules, so that all processes build
the same objects. If `fingerprint` is equal in two processes, they have the same code.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from research.core import checks, paths, registry
from research.core.text import quoted

_HERE = __name__.partition(".")[0]


class Source(NamedTuple):
  """A module to import, and the folder that contains it."""

  name: str  # as in `import NAME`
  folder: str  # absolute


_loaded: dict[str, Source] = {}  # by name, in order of import


def load(text: str) -> bool:
  """Imports a module that registers names.

  Args:
    text: the name of a module such as my_package.my_module, which may be in the current folder; the
      path of a .py file, which may import modules from its own folder; or the path of a package's
      folder.

  Returns:
    True if the module, or a module that it imports, has registered a name.

  Raises:
    ValueError: if the module or file does not exist, or another module has the same name as the
      file.
    Exception: if the module itself raises it.
  """
  source = _of_file(text) if text.endswith(".py") or os.sep in text else _of_module(text)
  before = set(_registering())
  try:
    load_all([source])
  except ModuleNotFoundError as error:
    name = error.name or ""
    if not f"{source.name}.".startswith(f"{name}."):
      raise  # the module was found, but it imports one that is missing
    package, _, missing = name.rpartition(".")
    folders = getattr(sys.modules.get(package), "__path__", [])
    hint = checks.hint(missing, [found for folder in folders for found in _modules(folder)])
    raise ValueError(f"there is no module '{missing}' in '{package}'{hint}".rstrip(";")) from error
  now = set(_registering())
  return now != before or any(f"{name}.".startswith(f"{source.name}.") for name in now)


def load_all(sources: Iterable[Source]) -> None:
  """Imports the modules that another process has loaded.

  Args:
    sources: the result of `carried()` in the other process.
  """
  for source in sources:
    if source.folder not in sys.path:
      sys.path.append(source.folder)
    importlib.invalidate_caches()
    module = importlib.import_module(source.name)
    _loaded[source.name] = _source_of(module) or source


def carried() -> tuple[Source, ...]:
  """Returns the modules that registered names here, for `load_all` in another process."""
  others = [sys.modules[name] for name in _registering() if name in sys.modules]
  found = dict(_loaded)
  for module in others:
    if source := _source_of(module):
      found.setdefault(source.name, source)
  return tuple(found.values())


def files() -> list[Path]:
  """Returns all source files of the modules that registered names, or of their packages."""
  found: set[Path] = set()
  for name in {*_loaded, *_registering()}:
    top = sys.modules.get(name.partition(".")[0])
    for folder in getattr(top, "__path__", ()):
      found |= set(Path(folder).resolve().rglob("*.py"))
    if (file := getattr(sys.modules.get(name), "__file__", None)) and file.endswith(".py"):
      found.add(Path(file).resolve())
  return sorted(found)


def fingerprint() -> str:
  """Returns a digest of `files` that does not depend on their location; '' if there are none."""
  digest = hashlib.sha256()
  for path in (found := files()):
    digest.update(path.name.encode() + path.read_bytes())
  return digest.hexdigest()[:12] if found else ""


def _registering() -> list[str]:
  """Returns the names of the modules outside this package that registered functions."""
  factories = (factory for of_kind in registry.ADDED.values() for factory in of_kind.values())
  modules = dict.fromkeys(factory.__module__ for factory in factories)
  return [name for name in modules if name.partition(".")[0] != _HERE]


def _source_of(module: ModuleType) -> Source | None:
  """Returns the source from which another process can import a module; None if there is none."""
  file = getattr(module, "__file__", None)
  if module.__name__ == "__main__" or not file:
    return None
  above = module.__name__.count(".") + hasattr(module, "__path__")  # index of the import folder
  return Source(module.__name__, str(Path(file).resolve().parents[above]))


def _of_file(text: str) -> Source:
  path = paths.local(text)
  if (path / "__init__.py").is_file():
    return _of_package(path.resolve())
  if path.suffix != ".py" or not path.is_file():
    near = checks.nearest(path.name, _importable(path.parent))
    hint = f"; did you mean '{path.parent / near}'?" if near else ""
    raise ValueError(f"there is no such file or package{hint}")
  if not path.stem.isidentifier():
    raise ValueError(f"the file cannot be imported: {quoted(path.stem)} is not a name")
  path = path.resolve()
  if path.name == "__init__.py":
    return _of_package(path.parent)
  _check_free(path.stem, path)
  return Source(path.stem, str(path.parent))


def _of_package(folder: Path) -> Source:
  _check_free(folder.name, folder / "__init__.py")
  return Source(folder.name, str(folder.parent))


def _check_free(name: str, path: Path) -> None:
  taken = _file_of(name)
  if taken and Path(taken).resolve() != path:
    raise ValueError(f"the name '{name}' is already that of the module {taken}; rename the file")


def _of_module(text: str) -> Source:
  here = str(Path.cwd())
  if not all(part.isidentifier() for part in text.split(".")):
    raise ValueError("is neither a module such as my_package.my_module nor a .py file")
  top = text.partition(".")[0]
  if not _file_of(top) and not _file_of(top, here):
    near = checks.nearest(top, _modules(here))
    hint = f"; did you mean '{near}'?" if near else ""
    raise ValueError(f"there is no module '{top}'{hint}")
  return Source(text, here)


def _file_of(name: str, folder: str = "") -> str:
  """Returns the file of a top-level module: 'built-in' if it has none, '' if there is no module."""
  if name in sys.modules:
    module = sys.modules[name]
    return getattr(module, "__file__", None) or str(list(getattr(module, "__path__", ["built-in"])))
  if folder:
    spec = importlib.machinery.PathFinder.find_spec(name, [folder])
  else:
    spec = importlib.util.find_spec(name)
  if spec is None:
    return ""
  return spec.origin or str(list(spec.submodule_search_locations or ["built-in"]))


def _importable(folder: Path) -> list[str]:
  """Returns the names of the .py files and packages in a folder."""
  there = folder.iterdir() if folder.is_dir() else []
  return [p.name for p in there if p.suffix == ".py" or (p / "__init__.py").is_file()]


def _modules(folder: str) -> list[str]:
  """Returns the modules and packages in a folder."""
  there = Path(folder).iterdir() if Path(folder).is_dir() else []
  return [path.name.removesuffix(".py") for path in there if path.suffix == ".py" or path.is_dir()]
