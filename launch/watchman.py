"""Starts a process that waits until its parent ends, and then kills the parent's process groups."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

PDEATHSIG = 1  # option number of prctl(2)


class Watchman:
  """Kills the registered process groups when this process ends, for any reason.

  Groups are registered over a pipe. The kernel closes the pipe when the last writing process ends,
  even after SIGKILL. Create a watchman before any thread is started, because the constructor forks.
  """

  def __init__(self):
    reader, self._writer = os.pipe()
    self.pid = os.fork()
    if self.pid == 0:
      os.close(self._writer)
      _watch(reader)
    os.close(reader)

  def watch(self, group: int) -> None:
    """Registers a process group to kill at the end."""
    os.write(self._writer, f"+{group}\n".encode())

  def release(self, group: int) -> None:
    """Unregisters a group that has ended, since the group's number may be reused."""
    os.write(self._writer, f"-{group}\n".encode())

  def close(self) -> None:
    """Kills all registered groups, and returns when the groups are gone."""
    os.close(self._writer)
    os.waitpid(self.pid, 0)


def _watch(reader: int) -> NoReturn:
  """Runs the watchman's main loop in a new session, and ignores signals that end the parent."""
  os.setsid()
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  nothing = os.open(os.devnull, os.O_RDWR)
  for stream in range(3):
    os.dup2(nothing, stream)
  groups: set[int] = set()
  with os.fdopen(reader) as messages:
    for line in messages:
      (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
  for group in groups:
    kill(group)
  os._exit(0)


def kill(group: int, number: int = signal.SIGKILL) -> None:
  """Sends a signal to a process group, if the group still exists."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(group, number)


def dies_with_parent() -> Callable[[], Any] | None:
  """Returns a function that makes the Linux kernel kill a child whose parent dies."""
  if not sys.platform.startswith("linux"):
    return None
  prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

  def tell():
    prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(1)

  return tell
