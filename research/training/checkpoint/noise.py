"""Silences what Orbax's threads print, besides the exception, when a save or restore fails."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def deaf_to_writers() -> Iterator[None]:
  """Context that hides errors of threads still writing after a failed save has closed its loop."""
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
  """Silences the remains of a failed save permanently; the exception raised ends the process.

  Its futures and coroutines print warnings when they are collected, at the latest at Python's exit.
  """
  sys.unraisablehook = lambda unraisable: None
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Context that hides what Orbax's threads print about a failure besides raising it."""
  hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
  level = logger.level
  sys.unraisablehook = lambda unraisable: None
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception:  # of any kind; it is raised again
    gc.collect()  # triggers the pending warnings now
    raise
  finally:
    sys.unraisablehook = hook
    logger.setLevel(level)
