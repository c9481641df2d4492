"""Being told to stop: signals to one process, preemption notices to the processes of a job."""

import contextlib
import itertools
import signal
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], str]]:
  """Gives `stopped()`: '' or why to stop, the same on all processes at the same call.

  A single process listens for SIGTERM and SIGINT itself; a second SIGINT ends it at once. With
  several processes JAX's preemption service hears SIGTERM on any of them and names the call at
  which all stop.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    call = itertools.count()  # the service wants consecutive numbers, one at each chance to stop
    yield lambda: "terminated" * multihost_utils.reached_preemption_sync_point(next(call))
    return
  received: list[str] = []

  def note(number, frame):
    del frame
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append("terminated" if number == signal.SIGTERM else "interrupted")

  before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield lambda: received[0] if received else ""
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def of_first_process(value: bool) -> bool:
  """Process 0's value, on every process."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.broadcast_one_to_all(value))


def same_everywhere(text: str) -> bool:
  """Whether all processes have the same text."""
  if jax.process_count() == 1:
    return True
  from jax.experimental import multihost_utils

  digest = np.asarray([zlib.crc32(text.encode())], np.uint32)
  return len(np.unique(multihost_utils.process_allgather(digest))) == 1


def all_well(well: bool) -> bool:
  """Whether all processes are well; waits for all of them to say so."""
  if jax.process_count() == 1:
    return well
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.asarray(well))))
