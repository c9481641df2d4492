"""Makes the processes of a job agree on a value, a text or an error."""

import contextlib
import zlib
from collections.abc import Iterator

import jax
import numpy as np

from research.training.config import UsageError


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Raises a usage error on all processes if one process raises it, before any process waits.

  Raises:
    UsageError: if a process raises a UsageError; on the other processes, the message refers to that
      process.
  """
  try:
    yield
  except UsageError:
    all_well(False)
    raise
  if not all_well(True):
    raise UsageError("another process of the job got an invalid flag; see its error message")


def of_first_process(value: bool) -> bool:
  """Broadcasts process 0's value to all processes.

  Args:
    value: this process's value.
  """
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.broadcast_one_to_all(value))


def same_everywhere(text: str) -> bool:
  """Returns whether all processes have the same text.

  Args:
    text: this process's text.
  """
  if jax.process_count() == 1:
    return True
  from jax.experimental import multihost_utils

  digest = np.asarray([zlib.crc32(text.encode())], np.uint32)
  return len(np.unique(multihost_utils.process_allgather(digest))) == 1


def all_well(well: bool) -> bool:
  """Returns whether all processes report success; blocks until each process has reported.

  Args:
    well: whether this process succeeded.
  """
  if jax.process_count() == 1:
    return well
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.asarray(well))))
