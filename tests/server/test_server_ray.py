"""A server's run on Ray: killed worker, servers and driver; what listens; what is left."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from research.server import events
from research.server.events import Push

pytest.importorskip("ray")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 800
FLAGS = (
  "--executor=server",
  "--workers=2",
  "--shards=2",
  "--batch_size=64",
  f"--steps={STEPS}",
  "--eval_every=0",
  "--checkpoint_every=100",
  "--method=asgd(sgd(0.05, momentum=0.5), error_feedback(gather_mean(top_k(0.1))))",
)


def start(out: Path, *flags: str) -> subprocess.Popen[str]:
  environ = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "IT_IS": str(out)}
  command = [sys.executable, str(ROOT / "experiments" / "run.py"), f"--out={out}", *flags]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, env=environ, **pipes)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
  """The first of its values that is true."""
  until = time.monotonic() + 240
  while time.monotonic() < until:
    if found := what():
      return found
    if process is not None and process.poll() is not None:
      raise AssertionError(process.communicate()[1])
    time.sleep(0.1)
  raise AssertionError("waited for two minutes")


def reached(out: Path, step: int) -> Callable[[], bool]:
  """Whether a run has come so far."""
  path = out / "metrics.jsonl"
  rows = lambda: [json.loads(line) for line in path.read_text().splitlines()]
  return lambda: path.exists() and any(row["step"] >= step for row in rows())


def descendants(out: Path) -> list[int]:
  """Processes that a run has started, by a variable that they have inherited."""
  found = []
  for path in Path("/proc").glob("[0-9]*"):
    try:
      if f"IT_IS={out}".encode() in (path / "environ").read_bytes().split(b"\0"):
        found.append(int(path.name))
    except OSError:
      continue
  return found


def listening(pids: list[int]) -> Iterator[str]:
  """The local addresses, in hexadecimal, on which processes wait for TCP connections."""
  inodes = {}
  for name in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
      fields = line.split()
      if fields[3] == "0A":
        inodes[fields[9]] = fields[1].split(":")[0]
  for pid in pids:
    try:
      for link in (Path(f"/proc/{pid}") / "fd").iterdir():
        target = str(link.readlink())
        if target.startswith("socket:[") and target[8:-1] in inodes:
          yield inodes[target[8:-1]]
    except OSError:
      continue


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[dict[str, Any]]:
  """A run whose driver is killed and started again, then a worker is killed, then a server.

  Another cluster has left its address, which no process answers.
  """
  out = tmp_path_factory.mktemp("ray") / "run"
  with (
    tempfile.TemporaryDirectory(dir="/tmp") as folder,  # a short path, for Ray's sockets
    pytest.MonkeyPatch.context() as environ,
  ):
    (Path(folder) / "ray").mkdir()
    (Path(folder) / "ray" / "ray_current_cluster").write_text("10.77.0.1:1234")
    environ.setenv("RAY_TMPDIR", folder)
    process = start(out, *FLAGS)
    wait_for(reached(out, 150), process)
    found: dict[str, Any] = {"out": out, "listening": set(listening(descendants(out)))}
    process.kill()
    process.communicate()
    wait_for(lambda: not descendants(out))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    process = start(out, *FLAGS)
    wait_for(reached(out, last + 50), process)
    pids = json.loads((out / "processes.json").read_text())
    os.kill(pids["workers"]["1"], signal.SIGKILL)
    wait_for(reached(out, last + 150), process)
    os.kill(pids["shards"][0], signal.SIGKILL)
    found["shown"], found["err"] = process.communicate(timeout=240)
    found["code"] = process.returncode
    found["left"] = descendants(out)
    found["summary"] = json.loads((out / "summary.json").read_text())
    yield found


def test_nothing_listens_beyond_the_loopback(run):
  assert run["listening"]
  assert run["listening"] <= LOOPBACK


def test_a_run_survives_its_driver_its_workers_and_its_servers(run):
  assert run["code"] == 0, run["err"]
  assert re.search(r"resuming at step \d+", run["err"])
  assert "the servers start again at step" in run["err"]
  assert "Traceback" not in run["err"]
  summary = run["summary"]
  assert (summary["stopped_because"], summary["steps"]) == ("steps", STEPS)
  assert summary["server"]["deaths"] == {"workers": 1, "servers": 1}
  assert summary["eval"]["accuracy"] > 0.9
  assert sum(summary["server"]["staleness"].values()) == STEPS
  assert all(row["pushes"] > 0 for row in summary["server"]["workers"])
  assert summary["wire"]["bytes_per_step_per_worker"]["push"] < 0.2 * 4 * 9610
  lines = (run["out"] / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines]  # no row of a lost update is left
  assert steps == sorted(set(steps))
  assert steps[-1] == STEPS


def test_no_process_is_left(run):
  assert run["left"] == []


def test_every_piece_of_work_is_counted_once(run):
  _, happened = events.read(run["out"] / events.FILE)
  assert sum(event.counted for event in happened) == STEPS
  names = [push.name for event in happened if event.counted for push in event.pushes]
  assert len(set(names)) == len(names) == STEPS


def test_the_simulator_gives_the_same_parameters(run):
  ended = start(run["out"] / "again", f"--replay={run['out']}")
  shown, said = ended.communicate(timeout=120)
  assert ended.returncode == 0, said
  found = json.loads((run["out"] / "again" / "replay.json").read_text())
  assert found["updates"] == found["pushes"] == STEPS
  assert found["distance"] <= 1e-5
  assert "distance" in shown


class Deaf:
  """A head that keeps what it is told."""

  def __init__(self):
    self.told: list[tuple[str, str]] = []
    self.deny = self

  def remote(self, kind: str, text: str) -> None:
    self.told.append((kind, text))


def test_a_full_object_store_is_waited_for(monkeypatch):
  """In a line, and counted."""
  from ray.exceptions import ObjectStoreFullError

  from research.server.worker import Servers, Worker

  waits: list[float] = []
  monkeypatch.setattr(time, "sleep", waits.append)
  head, left = Deaf(), [ObjectStoreFullError(), ObjectStoreFullError()]

  def send() -> str:
    if left:
      raise left.pop()
    return "sent"

  push = Push(3, 1, 7, 7, 1, (0,))
  assert Worker.patiently(object.__new__(Worker), Servers(head, []), push, send) == "sent"
  assert len(waits) == 2
  line = "push 7 of worker 3 waits: the object store is full (ObjectStoreFullError)"
  assert head.told == [("object store", line)] * 2


DRIVING = """
import jax, numpy as np
from experiments.applications import dqn
dqn.STEPS = 16
params, _, told = dqn.together(2, 0)
start = dqn.learner().init(0)
pairs = zip(*map(jax.tree.leaves, (params, start)))
print(told["updates"], sum(told["decisions"]), any(not np.array_equal(a, b) for a, b in pairs))
"""


def test_actors_that_drive_push_gradients_until_the_server_has_its_updates():
  pytest.importorskip("highway_env")
  environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  line = [sys.executable, "-c", DRIVING]
  ended = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=300)
  assert ended.returncode == 0, ended.stderr
  updates, decisions, moved = ended.stdout.split()[-3:]
  assert (updates, moved) == ("8", "True")
  assert 16 <= int(decisions) <= 16 + 2 * 2  # two actors may each have driven on for a gradient
