"""The threads of gloo, which carries what processes on CPUs exchange."""

import logging
import os
import platform
import sys
import time
from pathlib import Path

TASKS = Path("/proc/self/task")
# The numbers of the system calls epoll_wait, epoll_pwait and epoll_pwait2.
WAITS = {"x86_64": {"232", "281", "441"}, "aarch64": {"22", "441"}}
PATIENCE = 1.0  # seconds, for a thread to begin
OTHERS = 0.1  # seconds after the first, for others


def threads() -> set[int]:
  """This process's threads, by number; empty where there is no Linux to tell."""
  return {int(thread.name) for thread in TASKS.glob("*")}


def _waits(thread: int) -> bool:
  """Whether a thread waits for messages."""
  try:
    call = (TASKS / str(thread) / "syscall").read_text().partition(" ")[0]
  except OSError:
    return False  # it ended meanwhile, or is not to be read
  return call in WAITS[platform.machine()]


def let_work_go_first(before: set[int]) -> set[int]:
  """Keeps threads begun since `before` from interrupting the computation when a message comes.

  Gloo's thread goes round and round as long as there is something that nobody has asked for yet,
  and each message wakes it. On a core that it shares with the computation, a step of 1.9 million
  parameters between two hosts took 52 ms, and 30 with the thread scheduled as a batch (SCHED_BATCH:
  it gets its share, but does not interrupt); a small all-reduce 4 ms and 0.4.

  Args:
    before: what `threads` found before JAX began to use its devices.

  Returns:
    The threads that are scheduled so now; none where Linux does not allow it.
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
