"""Sets the scheduling policy of the threads of gloo, the transport between CPU processes."""

import logging
import os
import platform
import sys
import time
from pathlib import Path

TASKS = Path("/proc/self/task")
# System call numbers of epoll_wait, epoll_pwait and epoll_pwait2.
WAITS = {"x86_64": {"232", "281", "441"}, "aarch64": {"22", "441"}}
PATIENCE = 1.0  # seconds to wait for a first thread
OTHERS = 0.1  # seconds to wait for more threads after the first


def threads() -> set[int]:
  """Returns the ids of this process's threads on Linux, and an empty set on other systems."""
  return {int(thread.name) for thread in TASKS.glob("*")}


def _waits(thread: int) -> bool:
  """Returns whether a thread is waiting for messages."""
  try:
    call = (TASKS / str(thread) / "syscall").read_text().partition(" ")[0]
  except OSError:
    return False  # the thread has ended, or its state cannot be read
  return call in WAITS[platform.machine()]


def let_work_go_first(before: set[int]) -> set[int]:
  """Keeps new gloo threads from preempting the computation when messages arrive.

  A gloo thread polls while there is data that nobody has requested yet, and every message wakes the
  thread. Under SCHED_BATCH, the thread gets its share of a core but does not preempt the
  computation. On two hosts where the gloo thread and the computation shared a core, SCHED_BATCH
  reduced the time of a step with 1.9 million parameters from 52 ms to 30 ms, and the time of a
  small all-reduce from 4 ms to 0.4 ms.

  Args:
    before: the result of `threads` before JAX initialized its devices; only later threads are
      changed.

  Returns:
    The ids of the threads that are now under SCHED_BATCH; empty if Linux does not allow the change.
  """
  if sys.platform != "linux" or platform.machine() not in WAITS:
    return set()
  found: set[int] = set()
  until = time.monotonic() + PATIENCE
  while time.monotonic() < until:
    if found := found | {thread for thread in threads() - before if _waits(thread)}:
      until = min(until, time.monotonic() + OTHERS)
    time.sleep(0.01)
  done = set()
  for thread in found:
    try:
      os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
      done.add(thread)
    except OSError:
      pass
  if not done:
    logging.getLogger(__name__).info("gloo's thread was not found and may interrupt computing")
  return done
