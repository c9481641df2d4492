"""Whose mistake an exception is, read off its traceback.

A mistake in a flag or a spec is refused by a check: a `raise` statement of this codebase makes the
ValueError, which becomes one line. A mistake in a user's own code (a task's loss, a method's sync)
fails in the user's file, in a library that it calls, or where the result is used. It is no wrong
flag: the traceback is shown, after one line that says what failed.
"""

import contextlib
import dis
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

from research.core import text

_HERE = Path(__file__).parents[2]
_OURS = tuple(str(_HERE / name) + "/" for name in ("research", "experiments", "launch"))
# What this codebase stands on; a package that is not named is taken for a user's own.
_LIBRARIES = sys.stdlib_module_names | {
  *("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "flax", "optax", "chex", "orbax", "absl"),
  *("sklearn", "matplotlib", "rich", "google", "ray", "tokenizers", "grain", "tensorboardX"),
  *("equinox", "jaxtyping"),
}
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_refusal(error: BaseException) -> bool:
  """Whether an exception says what is wrong with a value that was given.

  True of a ValueError made by a `raise` statement of this codebase, and of a file, a number or an
  amount of memory that cannot be had, unless a user's code asked for it.
  """
  if isinstance(error, ValueError):
    return is_raised(error) and _is_ours(_frames(error)[-1][0])
  return isinstance(error, OSError | OverflowError | MemoryError) and not fault(error)


def is_raised(error: BaseException) -> bool:
  """Whether a `raise` statement made the exception, in the innermost frame that is left of it.

  JAX removes its own frames: then the innermost one is at a call.
  """
  last = error.__traceback__
  while last and last.tb_next:
    last = last.tb_next
  return bool(last) and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE


@contextlib.contextmanager
def of_libraries() -> Iterator[None]:
  """Around code in which a library's ValueError too is about a value that was given."""
  try:
    yield
  except ValueError as error:
    if is_refusal(error) or fault(error):
      raise
    raise ValueError(text.one_line(error, 300)) from error


def fault(error: BaseException) -> str:
  """One line that says which part of a user's code failed, and where; '' if none did.

  The part is the function of theirs that this codebase called last.
  """
  part: CodeType | None = None
  where, before_is_ours = "", False
  for frame, line in _frames(error):
    if _is_ours(frame):
      before_is_ours = True
    elif not _is_library(frame) and (before_is_ours or part):
      part = frame.f_code if before_is_ours else part
      where, before_is_ours = f"{Path(frame.f_code.co_filename).name}, line {line}", False
  if not part:
    return ""
  *owners, name = part.co_qualname.replace(".<locals>", "").split(".")
  name = "a lambda" if name == "<lambda>" else name
  of = f" of {owners[-1]}" if owners else ""
  return text.one_line(f"{name}{of} failed ({where}): {type(error).__name__}: {error}")


def is_users(module: str) -> bool:
  """Whether a module, by its dotted name, is neither this codebase's nor a library's."""
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
  return name.partition(".")[0] in _LIBRARIES or frame.f_code.co_filename.startswith("<frozen")
