"""Names of objects, for results and for messages."""

import dataclasses
import re
from typing import Any

from research.core.part import Part

_MOST = 200  # characters


def label(value: Any) -> str:
  """The text by which an object is known: a spec as it is, an object by its repr or its type.

  It names objects and does not tell them apart; `fingerprint.of_objects` does.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, Part):
    return repr(value)  # its spec, if names made it
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= _MOST else f"{type(value).__name__}(...)"
  if isinstance(value, tuple):
    return f"{type(value).__name__}(...)"
  name = getattr(value, "__qualname__", None) or type(value).__qualname__
  return name.replace(".<locals>", "")
