"""Being told to stop: signals to one process, preemption notices to the processes of a job."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], str]]:
  """Gives `stopped(step)`: '' or why to stop, the same on all processes at the same step.

  A single process listens for SIGTERM and SIGINT itself; a second SIGINT ends it at once. With
  several processes JAX's preemption service hears SIGTERM on any of them and names the step at
  which all stop.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    yield lambda step: "terminated" * multihost_utils.reached_preemption_sync_point(step)
    return
  received: list[str] = []

  def note(number, frame):
    del frame
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append("terminated" if number == signal.SIGTERM else "interrupted")

  before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield lambda step: received[0] if received else ""
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def of_first_process(value: bool) -> bool:
  """Process 0's value, on every process."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return bool(multihost_utils.broadcast_one_to_all(value))


def everyone_is_here() -> None:
  """Waits for all processes, so that what is written next was still missing to all of them."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("everyone is here")
