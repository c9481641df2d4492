"""A process that outlives its parent, and then kills the process groups that the parent started."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

PDEATHSIG = 1  # of prctl(2)


class Watchman:
  """Kills the process groups told to it when this process ends, however it ends.

  Groups are told over a pipe, which the kernel closes with its last writer: SIGKILL included. Make
  it before any thread is started: it is a fork.
  """

  def __init__(self):
    reader, self._writer = os.pipe()
    self.pid = os.fork()
    if self.pid == 0:
      os.close(self._writer)
      _watch(reader)
    os.close(reader)

  def watch(self, group: int) -> None:
    """Has it kill a process group at the end."""
    os.write(self._writer, f"+{group}\n".encode())

  def release(self, group: int) -> None:
    """Has it forget a group that has ended, whose number may come again."""
    os.write(self._writer, f"-{group}\n".encode())

  def close(self) -> None:
    """Returns when all groups are killed."""
    os.close(self._writer)
    os.waitpid(self.pid, 0)


def _watch(reader: int) -> NoReturn:
  """The life of the watchman: in a session of its own, deaf to what ends its parent."""
  os.setsid()
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  nothing = os.open(os.devnull, os.O_RDWR)
  for stream in range(3):
    os.dup2(nothing, stream)
  groups: set[int] = set()
  with os.fdopen(reader) as told:
    for line in told:
      (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
  for group in groups:
    kill(group)
  os._exit(0)


def kill(group: int, number: int = signal.SIGKILL) -> None:
  """Sends a signal to a process group, if there still is one."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(group, number)


def dies_with_parent() -> Callable[[], Any] | None:
  """On Linux, has the kernel kill a child whose parent dies, watchman or not."""
  if not sys.platform.startswith("linux"):
    return None
  prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

  def tell():
    prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(1)

  return tell
