"""Runs several processes as one job on this machine, and restarts a job that failed."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from launch.watchman import Watchman, dies_with_parent, kill
from research.training.hooks import heartbeat

TICK = 0.2  # seconds between polls
SETTLE = 5.0  # seconds after a failure in which the other processes may end by themselves
HUNG = 124  # the exit code of a job that hung, as in timeout(1)
FINAL = (2, 3, 4, 5, 126, 127)  # exit codes of failures that a restart would repeat


class Process(NamedTuple):
  """One process of a job, before it is started."""

  name: str  # prefix of the output lines, and name of the log file
  command: Sequence[str]
  environ: Mapping[str, str]


class Rules(NamedTuple):
  """The rules for ending and restarting a job."""

  restarts: int = 0
  start_seconds: float = 1800.0  # time limit until any process makes progress; 0: no limit
  hang_seconds: float = 300.0  # time limit without progress of any process; 0: no limit
  grace_seconds: float = 60.0  # time between SIGTERM and SIGKILL


class Ended(NamedTuple):
  """The result of one attempt to run a job."""

  code: int
  why: str  # the reason for a failure; '' without a failure
  stopped: bool = False  # whether a signal to the launcher stopped the job

  @property
  def is_final(self) -> bool:
    return self.stopped or self.code == 0 or self.code in FINAL


class Running(NamedTuple):
  """A process that was started."""

  process: Process
  popen: subprocess.Popen
  log: IO[bytes]
  beat: Path  # file that the process touches on progress (research/training/hooks/heartbeat.py)
  rest: bytearray  # the output after the last complete line


def supervise(
  processes: Callable[[], Sequence[Process]],
  logs: Path,
  rules: Rules,
  disturb: Callable[[Sequence[Running]], None] = lambda running: None,
) -> int:
  """Runs a job to the end, and restarts the job from checkpoints if a process dies or hangs.

  If one process fails, the other processes cannot continue and are terminated. SIGTERM and SIGINT
  are forwarded as SIGTERM, which makes `experiments/run.py` save and stop. Processes that do not
  end are killed; if the launcher dies, all processes are killed. Each line of output is written to
  stdout, after the process name, and to LOGS/NAME.log.

  Args:
    processes: a function that returns the job's processes; it is called before every start, since
      each start needs a new port.
    logs: an existing folder for log files and for the files that processes touch on progress.
    rules: limits on restarts and times.
    disturb: a function that is called several times a second with the running processes.

  Returns:
    0 if all processes ended with 0; 130 after SIGINT; otherwise the exit code of the process whose
    failure caused the others, 128 + N if signal N ended that process, or 124 if the job hung.
  """
  with contextlib.ExitStack() as stack:
    watchman = Watchman()
    stack.callback(watchman.close)
    received = stack.enter_context(_signals())
    for attempt in range(rules.restarts + 1):
      job = _Job(watchman, logs, rules, received, disturb)
      ended = job.run(processes())
      if ended.why:
        say(ended.why)
      if ended.is_final:
        return 130 if signal.SIGINT in received else ended.code
      if attempt < rules.restarts:
        say(f"restart {attempt + 1} of {rules.restarts}")
    return ended.code


def say(line: str) -> None:
  """Prints a message of the launcher to stderr."""
  print(f"launch: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals():
  """Collects SIGTERM, SIGINT and SIGHUP in a list; a context manager that yields the list."""
  received: list[int] = []
  note = lambda number, frame: received.append(number)
  before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class _Job:
  """One attempt to run a job."""

  def __init__(
    self,
    watchman: Watchman,
    logs: Path,
    rules: Rules,
    received: Sequence[int],
    disturb: Callable[[Sequence[Running]], None],
  ):
    self.watchman, self.logs, self.rules = watchman, logs, rules
    self.received, self.disturb = received, disturb
    self.running: list[Running] = []
    self.failed: list[Running] = []  # in the order in which their ends were seen
    self.started = time.time()
    self.streams = selectors.DefaultSelector()

  def run(self, processes: Sequence[Process]) -> Ended:
    """Starts the processes, and returns when all processes have ended."""
    try:
      for process in processes:
        self._start(process)
      return self._watch()
    finally:
      self._kill()
      self._drain()

  def _start(self, process: Process) -> None:
    beat = (self.logs / f"{process.name}.beat").absolute()
    beat.unlink(missing_ok=True)
    log = (self.logs / f"{process.name}.log").open("ab", buffering=0)
    try:
      popen = subprocess.Popen(
        process.command,
        env={**process.environ, heartbeat.PLACE: str(beat)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=dies_with_parent(),
      )
    except OSError as error:
      log.close()
      raise SystemExit(f"error: {process.command[0]}: {error.strerror}") from error
    self.watchman.watch(popen.pid)
    found = Running(process, popen, log, beat, bytearray())
    self.running.append(found)
    assert popen.stdout
    os.set_blocking(popen.stdout.fileno(), False)
    self.streams.register(popen.stdout, selectors.EVENT_READ, found)

  def _watch(self) -> Ended:
    """Watches the processes until all processes have ended or must be ended."""
    deadline = None
    while any(r.popen.poll() is None for r in self.running):
      self._read(TICK)
      self.disturb(self.running)
      if self.received and deadline is None:
        say(
          f"{signal.Signals(self.received[0]).name}: stopping; a second signal kills all processes"
        )
        deadline = time.monotonic() + self.rules.grace_seconds
        for one in self.running:
          kill(one.popen.pid, signal.SIGTERM)
      failed = self._first_failure()
      if failed and deadline is None:
        deadline = time.monotonic() + SETTLE
      if hung := "" if self.received or failed else self._hung():
        return self._ended(Ended(HUNG, hung))
      if (deadline and time.monotonic() > deadline) or len(self.received) > 1:
        break
    return self._ended(self._first_failure())

  def _ended(self, failed: Ended | None) -> Ended:
    alive = [r.process.name for r in self.running if r.popen.poll() is None]
    if not self.received:
      return failed or Ended(0, "")
    late = f"{_names(alive)} did not stop and {_were(alive)} killed" if alive else ""
    code = 128 + signal.SIGKILL if alive else failed.code if failed else 0
    return Ended(code, late or (failed.why if failed else ""), stopped=True)

  def _first_failure(self) -> Ended | None:
    """Returns the failure that caused the others, as far as exit codes tell.

    A process that lost a peer exits with a code or is aborted by JAX, possibly before the peer's
    death is seen here. Another signal comes from outside or is a crash, and so is a cause.
    """
    self.failed += [r for r in self.running if r.popen.poll() and r not in self.failed]
    if not self.failed:
      return None
    rank = lambda code: 2 if code == -signal.SIGABRT else int(code > 0)
    one = min(self.failed, key=lambda r: rank(r.popen.returncode))
    code = one.popen.returncode
    name = f"process {one.process.name}"
    if code < 0:
      return Ended(128 - code, f"{name} was killed by {signal.Signals(-code).name}")
    return Ended(code, f"{name} failed with exit code {code}")

  def _hung(self) -> str:
    """Returns a message if no running process has made progress for too long, else ''."""
    running = [r for r in self.running if r.popen.poll() is None]
    beats = [r.beat.stat().st_mtime for r in running if r.beat.exists()]
    if not beats:  # the processes have ended, or do not report progress
      return ""
    if newest := max(beats):
      limit, since, what = self.rules.hang_seconds, newest, "advanced for"
    else:
      limit, since, what = self.rules.start_seconds, self.started, "made a step within"
    if limit <= 0 or time.time() - since < limit:
      return ""
    return f"no process has {what} {limit:g} s: {_names([r.process.name for r in running])}"

  def _read(self, seconds: float) -> None:
    """Forwards the output of the processes; waits at most `seconds` for output."""
    for key, _ in self.streams.select(seconds):
      try:
        chunk = os.read(key.fd, 1 << 16)
      except BlockingIOError:
        continue
      if not chunk:
        self.streams.unregister(key.fileobj)
      self._pass_on(key.data, chunk)

  def _pass_on(self, running: Running, chunk: bytes) -> None:
    running.log.write(chunk)
    running.rest.extend(chunk if chunk or not running.rest else b"\n")
    *lines, rest = running.rest.split(b"\n")
    running.rest[:] = rest
    with contextlib.suppress(BrokenPipeError):
      for line in lines:
        sys.stdout.buffer.write(b"[%s] %s\n" % (running.process.name.encode(), line))
      sys.stdout.buffer.flush()

  def _kill(self) -> None:
    """Kills all remaining processes of each process group, including children."""
    for one in self.running:
      kill(one.popen.pid)
      one.popen.wait()
      self.watchman.release(one.popen.pid)

  def _drain(self) -> None:
    until = time.monotonic() + 1.0  # an unrelated process may keep a stream open
    while self.streams.get_map() and time.monotonic() < until:
      self._read(0.1)
    self.streams.close()
    for one in self.running:
      assert one.popen.stdout
      one.popen.stdout.close()
      one.log.close()


def _were(names: Sequence[str]) -> str:
  return "were" if len(names) > 1 else "was"


def _names(names: Sequence[str]) -> str:
  return f"process{'es' * (len(names) > 1)} {', '.join(names)}"
