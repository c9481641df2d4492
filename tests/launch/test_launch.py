"""Launchers with small commands in place of a training run: who ends whom, and with which code."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
TIMEOUT = 60  # seconds, for what takes few

# What each of two processes does; `at` is a folder that both see, `me` a process's number.
HEAD = """
import os, pathlib, signal, sys, time
at, me = pathlib.Path(os.environ["AT"]), int(os.environ["JAX_PROCESS_ID"])
beat = pathlib.Path(os.environ["JOB_HEARTBEAT"])
"""


class Launched:
  """A launcher that runs."""

  def __init__(self, folder: Path, *flags: str, program: str):
    self.logs = folder / "logs"
    command = [sys.executable, str(LOCAL), f"--logs={self.logs}", *flags]
    self.process = subprocess.Popen(
      [*command, "--", "python", "-c", HEAD + program],
      cwd=folder,
      env=os.environ | {"AT": str(folder)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def end(self) -> tuple[int, str, str]:
    """Its exit code, what its processes have printed, and what it says itself."""
    out, err = self.process.communicate(timeout=TIMEOUT)
    return self.process.returncode, out, err


@pytest.fixture
def launch(tmp_path):
  """Starts a launcher on a Python program, and has nothing left of it at the end."""
  launched = []

  def launch(*flags: str, program: str) -> Launched:
    launched.append(Launched(tmp_path, *flags, program=program))
    return launched[-1]

  yield launch
  for one in launched:
    one.process.kill()
    one.process.communicate()


def wait_for(condition: Callable[[], object]) -> None:
  until = time.monotonic() + TIMEOUT
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.02)


def is_running(pid: int) -> bool:
  """Whether a process is there and no zombie, which nobody may collect in a container."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def pids(folder: Path, count: int) -> list[int]:
  """What so many processes have written of themselves."""
  found = lambda: [p for p in folder.glob("pid*") if p.read_text().endswith("\n")]
  wait_for(lambda: len(found()) == count)
  return [int(path.read_text()) for path in found()]


# Writes its own number and that of a child.
WITH_CHILD = """
import subprocess
child = subprocess.Popen(["sleep", "1000"])
(at / f"pid{me}").write_text(f"{os.getpid()}\\n")
(at / f"pid{me}-child").write_text(f"{child.pid}\\n")
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
SLEEP = "time.sleep(1000)"


def test_processes_are_told_their_places_and_their_lines_are_told_apart(launch):
  program = """
import json
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith("JAX_")}))
print("no newline", file=sys.stderr, end="")
"""
  flags = ("--processes=3", "--devices_per_process=2")
  launched = launch(*flags, program=program)
  code, out, _ = launched.end()
  assert code == 0
  lines = sorted(out.splitlines())
  assert [line[:4] for line in lines] == ["[0] ", "[0] ", "[1] ", "[1] ", "[2] ", "[2] "]
  found = [json.loads(line[4:]) for line in lines if line.endswith("}")]
  assert [one["JAX_PROCESS_ID"] for one in found] == ["0", "1", "2"]
  assert [one["JAX_LOCAL_DEVICE_IDS"] for one in found] == ["0,1", "2,3", "4,5"]
  assert {one["JAX_NUM_PROCESSES"] for one in found} == {"3"}
  assert {one["JAX_NUM_CPU_DEVICES"] for one in found} == {"2"}
  (address,) = {one["JAX_COORDINATOR_ADDRESS"] for one in found}
  assert address.startswith("127.0.0.1:")
  for number in range(3):
    (line,) = (line for line in lines if line.startswith(f"[{number}] {{"))
    assert (launched.logs / f"{number}.log").read_text() == f"{line[4:]}\nno newline"


@pytest.mark.slow
def test_the_first_failure_decides_and_ends_the_others(launch, tmp_path):
  launched = launch(program=WITH_CHILD + "sys.exit(7) if me else time.sleep(1000)")
  code, _, err = launched.end()
  assert code == 7
  assert "launch: process 1 failed with exit code 7" in err
  assert not any(map(is_running, pids(tmp_path, 4)))


def test_a_process_killed_by_a_signal_is_reported_as_by_a_shell(launch):
  code, _, err = launch(program="os.kill(os.getpid(), signal.SIGKILL) if me else None").end()
  assert code == 128 + signal.SIGKILL
  assert "launch: process 1 was killed by SIGKILL" in err


def test_a_kill_is_the_cause_where_a_peer_is_seen_to_fail_first(launch):
  program = "time.sleep(1) if me else sys.exit(1); os.kill(os.getpid(), signal.SIGKILL)"
  code, _, err = launch(program=program).end()
  assert code == 128 + signal.SIGKILL
  assert "launch: process 1 was killed by SIGKILL" in err


def test_nothing_is_left_where_the_launcher_is_killed(launch, tmp_path):
  launched = launch(program=DEAF + WITH_CHILD + SLEEP)
  started = pids(tmp_path, 4)
  assert all(map(is_running, started))
  launched.process.kill()
  wait_for(lambda: not any(map(is_running, started)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_processes_are_told_to_stop_and_may_do_it_in_order(launch, tmp_path, number, code):
  program = """
def stop(*_):
  (at / f"saved{me}").touch()
  sys.exit(0)
signal.signal(signal.SIGTERM, stop)
"""
  launched = launch(program=program + WITH_CHILD + SLEEP)
  started = pids(tmp_path, 4)
  launched.process.send_signal(number)
  assert launched.end()[0] == code
  assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"]
  assert not any(map(is_running, started))


def test_who_does_not_stop_is_killed(launch, tmp_path):
  launched = launch("--grace_seconds=0.5", program=DEAF + WITH_CHILD + SLEEP)
  started = pids(tmp_path, 4)
  launched.process.terminate()
  code, _, err = launched.end()
  assert code == 128 + signal.SIGKILL
  assert "launch: processes 0, 1 did not stop and were killed" in err
  assert not any(map(is_running, started))


def test_a_second_signal_ends_all_at_once(launch, tmp_path):
  launched = launch(program=DEAF + WITH_CHILD + SLEEP)
  started = pids(tmp_path, 4)
  launched.process.send_signal(signal.SIGINT)
  time.sleep(0.5)
  launched.process.send_signal(signal.SIGINT)
  assert launched.end()[0] == 130
  assert not any(map(is_running, started))


# The number of this start, counted by each process.
COUNT = """
starts = at / f"starts{me}"
start = int(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text(str(start))
"""


def test_a_job_is_started_again_from_the_beginning(launch, tmp_path):
  program = COUNT + "os.abort() if me and start < 3 else time.sleep(0.2)"
  code, _, err = launch("--restarts=5", program=program).end()
  assert code == 0
  assert [(tmp_path / f"starts{i}").read_text() for i in range(2)] == ["3", "3"]
  assert err.count("launch: process 1 was killed by SIGABRT") == 2
  assert "launch: restart 2 of 5" in err
  assert "launch: restart 3 of 5" not in err


def test_restarts_end(launch, tmp_path):
  code, _, err = launch("--restarts=2", program=COUNT + "sys.exit(9) if me else None").end()
  assert code == 9
  assert (tmp_path / "starts1").read_text() == "3"
  assert "launch: restart 2 of 2" in err


@pytest.mark.parametrize("code", [2, 3, 4])
def test_what_would_fail_again_is_not_started_again(launch, tmp_path, code):
  assert launch("--restarts=2", program=COUNT + f"sys.exit({code})").end()[0] == code
  assert (tmp_path / "starts1").read_text() == "1"


@pytest.mark.slow
def test_a_job_that_hangs_is_ended(launch, tmp_path):
  """Process 0 goes on a little longer; both swallow SIGTERM, as JAX's preemption service does."""
  program = DEAF + WITH_CHILD + "beat.touch(); time.sleep(0.4 * (1 - me)); beat.touch(); " + SLEEP
  launched = launch("--hang_seconds=1", "--restarts=1", program=program)
  code, _, err = launched.end()
  assert code == 124
  assert err.count("launch: no process has advanced for 1 s: processes 0, 1") == 2
  assert not any(map(is_running, pids(tmp_path, 4)))


def test_a_run_that_makes_no_first_step_is_ended(launch, tmp_path):
  """It has announced that it will advance; compiling may take longer than `hang_seconds`."""
  program = WITH_CHILD + "beat.touch(); os.utime(beat, (0, 0)); " + SLEEP
  launched = launch("--hang_seconds=0.1", "--start_seconds=2", program=program)
  code, _, err = launched.end()
  assert code == 124
  assert "launch: no process has made a step within 2 s: processes 0, 1" in err
  assert not any(map(is_running, pids(tmp_path, 4)))


def test_a_job_that_announces_no_steps_is_not_taken_for_hung(launch):
  flags = "--hang_seconds=0.3", "--start_seconds=0.3"
  assert launch(*flags, program="time.sleep(1.5)").end()[0] == 0


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (("--processes=2",), "no command to run"),
    (("--processes=2", "--"), "no command to run"),
    (("--", "no-such-command"), "command not found: 'no-such-command'"),
    (("--processes=0", "--", "true"), "--processes=0"),
    (("--proceses=2", "--", "true"), "did you mean '--processes'?"),
    (("true",), "unexpected argument 'true'"),
  ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, says, tmp_path):
  command = [sys.executable, str(LOCAL), *arguments]
  ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
  assert ended.returncode == 2
  (line,) = ended.stderr.splitlines()
  assert line.startswith("error: ")
  assert says in line
  assert not [*tmp_path.iterdir()]


def test_a_port_that_is_taken_is_refused(launch):
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    code, _, err = launch(f"--port={port}", program="").end()
  assert code == 2
  assert f"error: --port={port}: Address already in use" in err
