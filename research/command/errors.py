"""Ends a failed command with an error line and an exit code; errors in user code show a traceback.

Exit codes:
  0: the command is done, or the run was saved after SIGTERM.
  1: the devices' copies of replicated state differ.
  2: a flag is invalid.
  3: no checkpoint is readable.
  4: the loss, the state or an evaluation is not finite.
  5: the disk is full.
  130: the run was saved after Ctrl-C.
  143: the command was terminated before it had anything to save.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from absl import flags

from research.core import blame, paths
from research.core.text import one_line
from research.training import environment
from research.training.config import UsageError

FLAGS = flags.FLAGS


def fail(code: int, line: str, error: BaseException | None = None) -> NoReturn:
  """Prints one line on stderr, preceded by the traceback if --debug is set, and exits.

  Args:
    code: the exit code.
    line: the error message.
    error: the exception whose traceback is printed if --debug is set.
  """
  if error is not None and debugging():
    traceback.print_exception(error)
  print(one_line(f"error: {line}"), file=sys.stderr, flush=True)
  sys.exit(code)


def debugging() -> bool:
  """Returns whether the flag --debug is defined and set."""
  return FLAGS.is_parsed() and "debug" in FLAGS and bool(FLAGS.debug)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Converts expected errors in this context to one line on stderr and an exit code.

  For an error in a user's own code, one line names the function, and the traceback follows.
  """
  before = signal.signal(signal.SIGTERM, terminated)
  try:
    environment.import_jax()
    if debugging():
      import jax

      jax.config.update("jax_traceback_filtering", "off")
    yield
  except KeyboardInterrupt:
    interrupted()
  except Exception as error:  # every error is reported, by a line or by its traceback
    if code := expected(error):
      fail(5 if paths.is_full(error) else code, str(error), error)
    known = foreseen(error)
    if joined():  # after an error, a process of a multi-process job must not continue
      leave(error, known)
    if known:
      fail(*known, error)
    report_fault(error)
    raise
  finally:
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # as at the end of a job
      signal.signal(signal.SIGTERM, before)


def terminated(number: int, frame: Any) -> NoReturn:
  """Handles SIGTERM until `signals.watch` takes over.

  Args:
    number: the number of the signal.
    frame: unused.
  """
  del frame
  os.write(2, b"error: terminated before there was anything to save\n")
  sys.exit(128 + number)


def interrupted() -> NoReturn:
  """Ends a command that was interrupted by Ctrl-C before it had anything to save."""
  fail(130, "interrupted before there was anything to save")


def exit_if_stopped(summary: Mapping[str, Any], saved: bool = True) -> None:
  """Exits if a signal has stopped a run: with 130 after Ctrl-C, and with 0 or 143 after SIGTERM.

  Args:
    summary: the contents of the run's summary.json.
    saved: whether the same command can resume the run; if not, the code after SIGTERM is 143.
  """
  codes = {"interrupted": 130, "terminated": 0 if saved else 143}
  if (reason := summary["stopped_because"]) in codes:
    sys.exit(codes[reason])


def expected(error: Exception) -> int:
  """Returns the exit code for an expected error of a run; 0 for any other error.

  Args:
    error: the exception.
  """
  if isinstance(error, UsageError):
    return 2
  from research.training import loop
  from research.training.checkpoint import checkpoint

  codes = {checkpoint.CheckpointError: 3, loop.NonFinite: 4, loop.ReplicasDiffer: 1}
  return next((code for kind, code in codes.items() if isinstance(error, kind)), 0)


def joined() -> bool:
  """Returns whether this process belongs to a job of several processes."""
  import jax

  return jax.distributed.is_initialized()


def report_fault(error: Exception) -> None:
  """Prints which function of the user's own code failed, if the error is in such code.

  Args:
    error: the exception.
  """
  if fault := blame.fault(error):
    print(f"error: {fault}", file=sys.stderr, flush=True)


def foreseen(error: Exception) -> tuple[int, str] | None:
  """Returns the exit code and the message for an error of the machine; None for any other error.

  Args:
    error: the exception.
  """
  import jax

  from research.training.checkpoint import checkpoint

  if isinstance(error, checkpoint.SaveError):
    return 5, str(error)
  if isinstance(error, blame.WrongReturn):
    return 2, str(error)
  if paths.is_full(error):
    where = getattr(error, "filename", None) or FLAGS.out or "a file of the run"
    return 5, f"the disk is full: {where}; free some space and go on"
  says = str(error) if isinstance(error, jax.errors.JaxRuntimeError) else ""
  if joined() and "gloo" in says.lower() and " by peer" in says:
    return 1, "another process of the job has ended; start the job again to resume it"
  is_jax = any(words in says for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
  too_many = isinstance(error, OverflowError) and not blame.fault(error)  # more than 64 bits
  if is_jax or too_many or isinstance(error, MemoryError):
    return 2, f"the model, its state or its data do not fit the memory: {str(error)[:200]}"
  return None


def leave(error: Exception, known: tuple[int, str] | None) -> NoReturn:
  """Ends a process of a multi-process job immediately, without waiting for other processes.

  Args:
    error: the exception.
    known: the result of `foreseen` for this exception.
  """
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
