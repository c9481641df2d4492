"""Cloud TPU VMs: the commands of each action as recorded, and all of it on a stand-in gcloud."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TPU_VM = ROOT / "launch" / "tpu_vm.py"
DETACHED = ROOT / "launch" / "detached.sh"
STAND_IN = Path(__file__).parent / "stand_in_gcloud.py"
RECORDED = Path(__file__).parent / "recorded" / "tpu_vm.txt"
WHERE = ("--name=pod", "--zone=us-east5-a")
TIMEOUT = 60


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, str(TPU_VM), *words]
  env = os.environ | environ
  return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=env)


# ---- what would be run


def recorded() -> list[tuple[str, str]]:
  """Pairs of an action with its flags, after '$', and the commands that it prints."""
  parts = RECORDED.read_text().split("$ ")[1:]
  return [(line, rest) for line, _, rest in (part.partition("\n") for part in parts)]


@pytest.mark.parametrize(("line", "commands"), recorded(), ids=[line for line, _ in recorded()])
def test_a_dry_run_prints_what_is_recorded(line, commands):
  words = shlex.split(line)
  at = words.index("--") if "--" in words else len(words)
  ended = run(*words[:at], "--dry_run", *words[at:], PATH="/nowhere")
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.replace(str(ROOT), "ROOT") == commands


@pytest.mark.parametrize(
  ("words", "says"),
  [
    ((), "legal: create, setup, run, status, logs, kill, delete"),
    (("crate", *WHERE), "unknown action 'crate'"),
    (("status", "--zone=z"), "--name='': required"),
    (("status", "--name=pod"), "--zone='': required"),
    (("create", *WHERE), "--type='': required, such as v4-8"),
    (("create", *WHERE, "--type=v99-8"), "--type='v99-8': unknown; legal: v4-N"),
    (("run", *WHERE), "no command to run"),
    (("logs", *WHERE, "--follow", "--slices=2"), "--slices=2"),
    (("status", *WHERE, "--slice=2"), "did you mean '--slices'?"),
  ],
)
def test_what_cannot_be_is_refused_in_one_line(words, says):
  ended = run(*words[:1], *words[1:], *["--dry_run"] * bool(words))
  assert ended.returncode == 2
  assert ended.stdout == ""
  (line,) = ended.stderr.splitlines()
  assert line.startswith("error: ")
  assert says in line


def test_without_gcloud_it_says_so():
  ended = run("status", *WHERE, PATH="/nowhere")
  assert ended.returncode == 2
  assert "gcloud not found" in ended.stderr


# ---- on the stand-in


class Cloud:
  """A stand-in of gcloud, and the command with it in front."""

  def __init__(self, folder: Path):
    self.at, tools = folder / "cloud", folder / "tools"
    self.at.mkdir()
    tools.mkdir()
    for name in ("gcloud", "python3"):
      (tools / name).write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
      (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    self.environ = {"PATH": path, "STAND_IN": str(self.at), "SHARED": str(folder)}

  def run(self, action: str, *words: str) -> subprocess.CompletedProcess[str]:
    return run(action, *WHERE, "--poll_seconds=0.1", *words, **self.environ)

  def calls(self) -> list[list[str]]:
    return [json.loads(line) for line in (self.at / "calls").read_text().splitlines()]

  def homes(self) -> list[Path]:
    return sorted(self.at.glob("*-worker*"))

  def preempt(self) -> None:
    """Takes the machines away, with what runs there."""
    (self.at / "state").write_text("SUSPENDED")
    self.clear()

  def clear(self) -> None:
    for pid in self.at.glob("*-worker*/*/.job/pid"):
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        continue


@pytest.fixture
def cloud(tmp_path):
  found = Cloud(tmp_path)
  yield found
  found.clear()


def wait_for(condition: Callable[[], object]) -> None:
  until = time.monotonic() + TIMEOUT
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.02)


# Each worker counts its starts in what they share; the job ends in its second one.
JOB = """
import os, pathlib, sys, time
me = pathlib.Path(os.environ["HOME"]).name
starts = pathlib.Path(os.environ["SHARED"]) / f"starts-{me}"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
print("start", len(starts.read_text()), os.environ.get("WHAT"), flush=True)
if len(starts.read_text()) == 1:
  time.sleep(1000)
"""


def starts(folder: Path, count: int) -> bool:
  found = [path.read_text() for path in folder.glob("starts-*")]
  return len(found) == 4 and all(len(text) == count for text in found)


@pytest.mark.slow
def test_a_job_goes_on_on_new_machines_until_it_has_finished(cloud, tmp_path):
  """Two slices of two workers, preempted once: all is created, set up and started again."""
  assert cloud.run("create", "--type=v5p-16", "--slices=2", "--spot").returncode == 0
  assert [home.name for home in cloud.homes()] == [
    f"pod-{node}-worker{worker}" for node in range(2) for worker in range(2)
  ]
  more = ("--slices=2", "--type=v5p-16", "--spot")
  assert cloud.run("setup", *more).returncode == 0
  for home in cloud.homes():
    assert (home / "distributed-optimization-jax" / "research" / "core" / "base.py").exists()
    assert not list(home.rglob(".git"))
  command = [sys.executable, str(TPU_VM), "run", *WHERE, *more, "--poll_seconds=0.1"]
  job = [*command, "--until_finished", "--environ=WHAT=ever", "--", "python", "-c", JOB]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  waiting = subprocess.Popen(job, env=os.environ | cloud.environ, **pipes)
  try:
    wait_for(lambda: starts(tmp_path, 1))
    shown = cloud.run("status", "--slices=2").stdout
    assert shown.startswith("pod: ACTIVE\n")
    assert shown.count(": running ") == 4
    cloud.preempt()
    _, err = waiting.communicate(timeout=TIMEOUT)
  finally:
    waiting.kill()
  assert waiting.returncode == 0, err
  assert "restart 1 of 100" in err
  assert starts(tmp_path, 2)
  assert cloud.run("status", "--slices=2").stdout.count(": ended 0") == 4
  logs = cloud.run("logs", "--slices=2").stdout
  assert logs.count("start 2 ever") == 4
  assert all(line.startswith("[") for line in logs.splitlines())
  actions = [call[3] for call in cloud.calls() if call[2] == "queued-resources"]
  assert [action for action in actions if action != "describe"] == ["create", "delete", "create"]
  assert cloud.run("delete").returncode == 0
  assert not cloud.homes()


@pytest.mark.slow
def test_a_job_that_is_lost_is_started_again_on_the_same_machines(cloud, tmp_path):
  cloud.run("create", "--type=v5p-16", "--slices=2")
  cloud.run("setup", "--slices=2")
  cloud.run("run", "--slices=2", "--", "python", "-c", JOB)
  wait_for(lambda: starts(tmp_path, 1))
  cloud.clear()
  more = ("--slices=2", "--until_finished")
  ended = cloud.run("run", *more, "--restarts=1", "--", "python", "-c", JOB)
  assert ended.returncode == 0, ended.stderr
  assert starts(tmp_path, 2)
  actions = [call[3] for call in cloud.calls() if call[2] == "queued-resources"]
  assert "delete" not in actions


@pytest.mark.slow
@pytest.mark.parametrize(("code", "restarted"), [(4, False), (1, True)])
def test_a_job_that_would_fail_again_is_not_started_again(cloud, code, restarted):
  cloud.run("create", "--type=v5p-8")
  cloud.run("setup")
  flags = ("--until_finished", "--restarts=1")
  ended = cloud.run("run", *flags, "--", "python", "-c", f"raise SystemExit({code})")
  assert ended.returncode == code
  assert ("restart 1 of 1" in ended.stderr) == restarted


def test_a_second_job_is_refused_and_the_first_one_killed_in_order(cloud, tmp_path):
  cloud.run("create", "--type=v5p-8")
  cloud.run("setup")
  program = "import pathlib, signal, sys, time; "
  program += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved'))); "
  program += "print('up', flush=True); time.sleep(1000)"
  assert cloud.run("run", "--", "python", "-c", program).returncode == 0
  log = lambda: [home / "distributed-optimization-jax" / ".job" / "log" for home in cloud.homes()]
  wait_for(lambda: all("up" in path.read_text().splitlines() for path in log()))
  second = cloud.run("run", "--", "python", "-c", program)
  assert second.returncode == 1
  assert "a job is already running" in second.stderr
  assert cloud.run("kill", "--grace_seconds=20").returncode == 0
  assert cloud.run("status").stdout.count("ended 143") == 2
  assert all(path.read_text().endswith("saved\n") for path in log())


def test_a_request_that_fails_is_told(cloud):
  cloud.run("create", "--type=v5p-8")
  again = cloud.run("create", "--type=v5p-8")
  assert again.returncode == 1
  assert "ALREADY_EXISTS" in again.stderr.splitlines()[-1]
  cloud.preempt()
  assert cloud.run("status").stdout == "pod: SUSPENDED\n"
