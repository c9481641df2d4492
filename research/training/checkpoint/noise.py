"""What Orbax's threads print when a save or a restore fails, beside the exception raised."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def deaf_to_writers() -> Iterator[None]:
  """Passes over what threads print that still write when a save has failed: its loop is gone."""
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
  """Silences for good what is left of a failed save: the process ends by the exception raised.

  Its futures and coroutines complain whenever they are collected, the last of them as Python ends.
  """
  sys.unraisablehook = lambda unraisable: None
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Silences what Orbax's threads print of a failure beside the exception that they raise."""
  hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
  level = logger.level
  sys.unraisablehook = lambda unraisable: None
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception:  # whatever it was: it is raised again
    gc.collect()  # lets what will complain do so now
    raise
  finally:
    sys.unraisablehook = hook
    logger.setLevel(level)
