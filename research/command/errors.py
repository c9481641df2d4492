"""How a command ends: one line on stderr and an exit code, or the traceback of a user's own code.

Exit codes: 0 done, or saved after SIGTERM; 1 replicas differ; 2 a wrong flag; 3 no readable
checkpoint; 4 not finite; 5 the disk is full; 130 saved after Ctrl-C; 143 terminated before there
was anything to save.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import flags

from research.core import blame, paths
from research.core.text import one_line
from research.training import environment
from research.training.config import UsageError

FLAGS = flags.FLAGS


def fail(code: int, line: str, error: BaseException | None = None) -> NoReturn:
  """Prints one line on stderr, under --debug after the traceback, and exits with the code."""
  if error is not None and debugging():
    traceback.print_exception(error)
  print(one_line(f"error: {line}"), file=sys.stderr, flush=True)
  sys.exit(code)


def debugging() -> bool:
  """Whether the command has --debug, and it is set."""
  return FLAGS.is_parsed() and "debug" in FLAGS and bool(FLAGS.debug)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Turns the errors that a run foresees into one line on stderr and their exit code.

  An error in a user's own code keeps its traceback, after one line that names the function.
  """
  before = signal.signal(signal.SIGTERM, terminated)
  try:
    environment.import_jax()
  except UsageError as error:
    fail(2, str(error), error)
  import jax

  if debugging():
    jax.config.update("jax_traceback_filtering", "off")

  from research.training import loop
  from research.training.checkpoint import checkpoint

  codes = {
    UsageError: 2,
    checkpoint.CheckpointError: 3,
    loop.NonFinite: 4,
    loop.ReplicasDiffer: 1,
  }
  try:
    yield
  except KeyboardInterrupt:
    fail(130, "interrupted before there was anything to save")
  except tuple(codes) as error:
    fail(5 if paths.is_full(error) else codes[type(error)], str(error), error)
  except Exception as error:  # whatever it was, one process of several must not stay behind
    known = foreseen(error)
    if jax.distributed.is_initialized():
      leave(error, known)
    if known:
      fail(*known, error)
    report_fault(error)
    raise
  finally:
    signal.signal(signal.SIGTERM, before)


def terminated(number: int, frame: Any) -> NoReturn:
  """Handles SIGTERM while `interrupt.watch` does not."""
  del frame
  os.write(2, b"error: terminated before there was anything to save\n")
  sys.exit(128 + number)


def report_fault(error: Exception) -> None:
  """Prints which function of the user's own code failed, if one did."""
  if fault := blame.fault(error):
    print(f"error: {fault}", file=sys.stderr, flush=True)


def foreseen(error: Exception) -> tuple[int, str] | None:
  """The exit code and line of an error that the machine causes; None for a programming error."""
  import jax

  from research.training.checkpoint import checkpoint

  if isinstance(error, checkpoint.SaveError):
    return 5, str(error)
  if paths.is_full(error):
    where = getattr(error, "filename", None) or FLAGS.out or "a file of the run"
    return 5, f"the disk is full: {where}; free some space and go on"
  is_jax = isinstance(error, jax.errors.JaxRuntimeError) and any(
    words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")
  )
  too_many = isinstance(error, OverflowError) and not blame.fault(error)  # bytes for 64 bits
  if is_jax or too_many or isinstance(error, MemoryError):
    return 2, f"the model, its state or its data do not fit the memory: {str(error)[:200]}"
  return None


def leave(error: Exception, known: tuple[int, str] | None) -> NoReturn:
  """Ends one process of several at once: on a normal exit JAX would wait for the others."""
  if known:
    if debugging():
      traceback.print_exception(error)
    print(one_line(f"error: {known[1]}"), file=sys.stderr)
  else:
    report_fault(error)
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(known[0] if known else 1)
