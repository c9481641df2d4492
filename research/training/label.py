"""Labels objects for results and messages."""

import dataclasses
import re
from typing import Any

from research.core.part import Part
from research.core.task import Task

_MOST = 200  # maximum number of characters in a label


def label(value: Any) -> str:
  """Returns a label for an object: a spec unchanged, otherwise its repr or type.

  Different objects may have the same label; `fingerprint.of_objects` distinguishes them.

  Args:
    value: a spec or an object.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, Part):
    return repr(value)  # the spec of an object that was built from names
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= _MOST else f"{type(value).__name__}(...)"
  if isinstance(value, Task):
    return value.title
  name = getattr(value, "__qualname__", None) or type(value).__qualname__
  return name.replace(".<locals>", "")
