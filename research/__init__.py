"""Distributed optimization in JAX: compressors, aggregators and methods that compose.

    import research as dx

    method = dx.diloco(optax.adamw(3e-4), dx.error_feedback(dx.two_phase(dx.int8())), period=50)

Names are imported when they are first used, so that `import research` costs nothing and does not
import JAX. The file `__init__.pyi` lists all public names; type checkers and this module read it.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _public() -> dict[str, str]:
  """Returns the module of each public name, as the stub imports them."""
  stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
  imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
  return {name.name: str(node.module) for node in imports for name in node.names}


_MODULES = _public()
__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(_MODULES[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_MODULES})
