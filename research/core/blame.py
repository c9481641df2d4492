"""Attributes an exception to invalid input or to a user's code, based on its traceback.

A check rejects an invalid flag or spec: a `raise` statement of this codebase creates the
ValueError, which is shown as one line. An error in a user's code (a task's loss, a method's sync)
occurs in the user's file, in a library that this file calls, or where the result is used. The
traceback of such an error is shown after one line that says what failed.
"""

import contextlib
import dis
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from research.core import text

_HERE = Path(__file__).parents[2]
_OURS = tuple(str(_HERE / name) + "/" for name in ("research", "experiments", "launch"))
# The dependencies of this codebase; code in any other package counts as a user's.
_LIBRARIES = sys.stdlib_module_names | {
  *("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "flax", "optax", "chex", "orbax", "absl"),
  *("sklearn", "matplotlib", "rich", "google", "ray", "tokenizers", "grain", "tensorboardX"),
  *("equinox", "jaxtyping", "rdkit"),
}
_BUILDERS = tuple(str(_HERE / "research" / "core" / name) for name in ("registry.py", "part.py"))
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_refusal(error: BaseException) -> bool:
  """Returns whether an exception describes an invalid input value.

  A ValueError describes an invalid value if a `raise` statement of this codebase raised the error.
  An OSError, OverflowError or MemoryError describes one unless a user's code caused the error.
  """
  if isinstance(error, ValueError):
    return is_raised(error) and _is_ours(_frames(error)[-1][0])
  return isinstance(error, OSError | OverflowError | MemoryError) and not fault(error)


def is_raised(error: BaseException) -> bool:
  """Returns whether the innermost remaining frame of an exception is at a `raise` statement.

  JAX removes its own frames; for its errors, the innermost remaining frame is at a call.
  """
  last = error.__traceback__
  while last and last.tb_next:
    last = last.tb_next
  return bool(last) and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE


@contextlib.contextmanager
def of_libraries() -> Iterator[None]:
  """Makes ValueErrors that libraries raise in this context count as invalid input values, too."""
  try:
    yield
  except ValueError as error:
    if is_refusal(error) or fault(error):
      raise
    raise ValueError(text.one_line(error, 300)) from error


class WrongReturn(TypeError):
  """Raised if a user's function does not return what its contract requires.

  The traceback no longer contains the function, so the message names the function and its file.
  """


def fault(error: BaseException) -> str:
  """Describes in one line which function of a user's code failed, and where.

  The line names the last of the user's functions that this codebase called.

  Args:
    error: the exception, with its traceback.

  Returns:
    The description; '' if the error is not in a user's code.
  """
  part, where, _ = _part(error)
  if not part:
    return ""
  return text.one_line(f"{_named(part)} failed ({where}): {type(error).__name__}: {error}")


def is_choice(error: BaseException) -> bool:
  """Returns whether a user's factory has rejected its arguments.

  The result is True if a `raise` statement raised a ValueError while the registry called the
  factory, or in the `check` of the factory's object. The result is False if the error occurred in a
  method that this codebase calls to test the new object.
  """
  part, _, caller = _part(error)
  by_registry = not part or caller in _BUILDERS
  return isinstance(error, ValueError) and is_raised(error) and by_registry


def of_function(function: Callable[..., Any]) -> str:
  """Describes a function by its class and name, its file and its first line."""
  code = inspect.unwrap(function).__code__
  return f"{_named(code)} ({Path(code.co_filename).name}, line {code.co_firstlineno})"


def _part(error: BaseException) -> tuple[CodeType | None, str, str]:
  """Returns the last user function that our code called, its location, and the caller's file."""
  part: CodeType | None = None
  where, caller, before = "", "", ""  # `before`: our file that calls the next frame
  for frame, line in _frames(error):
    if _is_ours(frame):
      before = frame.f_code.co_filename
    elif not _is_library(frame) and (before or part):
      part, caller = (frame.f_code, before) if before else (part, caller)
      where, before = f"{Path(frame.f_code.co_filename).name}, line {line}", ""
  return part, where, caller


def _named(code: CodeType) -> str:
  *owners, name = code.co_qualname.replace(".<locals>", "").split(".")
  name = "a lambda" if name == "<lambda>" else name
  return f"{name} of {owners[-1]}" if owners else name


def is_users(module: str) -> bool:
  """Returns whether a module, given by its dotted name, is outside this codebase and libraries."""
  if module.partition(".")[0] in _LIBRARIES:
    return False
  file = getattr(sys.modules.get(module), "__file__", None) or ""
  return not file.startswith(_OURS)


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
  return list(traceback.walk_tb(error.__traceback__))


def _is_ours(frame: FrameType) -> bool:
  return frame.f_code.co_filename.startswith(_OURS)


def _is_library(frame: FrameType) -> bool:
  name = str(frame.f_globals.get("__name__", ""))
  is_made = frame.f_code.co_filename.startswith(("<frozen", "<string>"))  # such as by dataclasses
  return name.partition(".")[0] in _LIBRARIES or is_made
