"""Hides the output that Orbax's threads print when a save or restore raises an exception."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def deaf_to_writers() -> Iterator[None]:
  """Context manager that hides errors of threads that are still writing after a failed save."""
  before = sys.unraisablehook, sys.excepthook
  is_late = lambda error: isinstance(error, RuntimeError) and "loop is closed" in str(error)

  def unraisable(found):
    if not is_late(found.exc_value):
      before[0](found)

  def uncaught(kind, error, trace):
    if not is_late(error):
      before[1](kind, error, trace)

  sys.unraisablehook, sys.excepthook = unraisable, uncaught
  try:
    yield
  finally:
    sys.unraisablehook, sys.excepthook = before


def silence() -> None:
  """Hides the output of a failed save permanently; the save's exception ends the process.

  The futures and coroutines of the save print warnings when they are garbage-collected, at the
  latest when Python exits.
  """
  sys.unraisablehook = lambda unraisable: None
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Context manager that hides what Orbax's threads print about an exception that is raised."""
  hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
  level = logger.level
  sys.unraisablehook = lambda unraisable: None
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception:  # any exception is raised again
    gc.collect()  # triggers the pending warnings now
    raise
  finally:
    sys.unraisablehook = hook
    logger.setLevel(level)
