"""One job of two processes with two devices each: what one process with four computes."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from problems import distance

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[2] / "experiments" / "run.py"
LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
TIMEOUT = 120  # seconds, for what takes some

# Mini-batches, noise and constant steps: every step matters to the last bit of the result.
JOB = (
  "--executor=spmd",
  "--mesh=data:4",
  "--task=least_squares(noise=0.5)",
  "--batch_size=40",
  "--steps=200",
  "--steps_per_dispatch=5",
  "--log_every=5",
  "--eval_every=100",
  "--checkpoint_every=10",
  "--checkpoint_seconds=0",
)
# Optimizer and aggregator, and how the two processes find each other.
JOBS = {
  "adam": ("adam(1e-2), mean()", "flags"),
  "compressed": ("sgd(0.1), error_feedback(two_phase(int8()))", "slurm"),
}

# Python imports it at its start: at the end it lists the files that were opened for writing.
SITECUSTOMIZE = """
import atexit, os, pathlib, sys
opened = set()
def listen(event, args):
  if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
    opened.add(str(args[0]))
sys.addaudithook(listen)
report = lambda: pathlib.Path(os.environ["OPENED"]).write_text("\\n".join(sorted(opened)))
atexit.register(report)
"""


def environment() -> dict[str, str]:
  """The variables of a job outside Slurm, which compiles fast."""
  outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
  return outside | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="session")
def start(tmp_path_factory):
  """Starts the command with an environment; whatever still runs at the end is killed."""
  compiled, site = (tmp_path_factory.mktemp(name) for name in ("compiled", "site"))
  (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
  path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
  clean = environment() | {"PYTHONPATH": path}
  processes = []

  def start(folder: Path, *arguments: str, **environ: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(RUN), *JOB, f"--compilation_cache={compiled}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = clean | {"OPENED": f"{folder}.opened"} | environ
    processes.append(subprocess.Popen(command, cwd=folder, env=env, **pipes))
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def pair(start):
  """Starts the two processes of a job, each in a folder of its own, as JOBS says."""

  def pair(folder: Path, name: str, *more: str, devices: int = 2) -> list[subprocess.Popen]:
    pieces, launcher = JOBS[name]
    joining = {"flags": by_flags, "slurm": by_slurm}[launcher]()
    arguments = (f"--method=data_parallel({pieces})", f"--out={folder / 'out'}", *more)
    return [
      start(folder / f"cwd{i}", *arguments, *flags, JAX_NUM_CPU_DEVICES=str(devices), **environ)
      for i, (flags, environ) in enumerate(joining)
    ]

  return pair


def by_flags() -> list[tuple[list[str], dict[str, str]]]:
  """The flags and the environment of each process."""
  port = free_port(range(20000, 30000))
  joining = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
  return [([*joining, f"--process_id={i}"], {}) for i in range(2)]


def by_slurm() -> list[tuple[list[str], dict[str, str]]]:
  """No flags; what Slurm sets. JAX makes the port from the last 12 bits of the job's number."""
  job = {
    "SLURM_JOB_ID": str(free_port(range(61440, 65536)) - 61440),
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
  }
  return [([], job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]


def free_port(among: Iterable[int]) -> int:
  for port in np.random.default_rng().permutation(list(among)).tolist():
    with socket.socket() as tried:
      try:
        tried.bind(("127.0.0.1", port))
      except OSError:
        continue
      return port
  raise AssertionError("no port is free")


def end(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """Exit codes, stdout and stderr."""
  ends = []
  for process in processes:
    out, err = process.communicate(timeout=TIMEOUT)
    ends.append((process.returncode, out, err))
  return ends


def summary(folder: Path) -> dict[str, Any]:
  return json.loads((folder / "out" / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
  lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def checkpoints(folder: Path) -> list[int]:
  names = [path.name for path in (folder / "out" / "checkpoints").glob("*")]
  return sorted(int(name) for name in names if name.isdecimal())


def state(folder: Path) -> dict[str, np.ndarray]:
  """The method's state at the newest checkpoint, by name."""
  path = folder / "out" / "checkpoints" / str(checkpoints(folder)[-1]) / "default"
  with ocp.PyTreeCheckpointer() as reader:
    saved = reader.metadata(path).item_metadata.tree
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    found = reader.restore(path, restore_args=plain)["state"]
  return {name: leaf for name, leaf in found.items() if name.startswith("method.")}


def after_a_checkpoint(processes: list[subprocess.Popen], folder: Path) -> int:
  """Waits for the first complete checkpoint; its step."""
  until = time.monotonic() + TIMEOUT
  while not checkpoints(folder):
    for process in processes:
      assert process.poll() is None, process.communicate()
    assert time.monotonic() < until
    time.sleep(0.01)
  return checkpoints(folder)[-1]


@pytest.fixture(scope="module")
def undisturbed(pair, tmp_path_factory):
  """By name, the folder of a job of two processes that nobody disturbs, and how they ended."""

  @functools.cache
  def of(name: str) -> tuple[Path, list[tuple[int, str, str]]]:
    folder = tmp_path_factory.mktemp(name)
    ends = end(pair(folder, name))
    assert [code for code, _, _ in ends] == [0, 0], ends
    return folder, ends

  return of


def test_two_processes_compute_what_one_does(undisturbed, start, tmp_path):
  name = "compressed"
  method = f"--method=data_parallel({JOBS[name][0]})"
  single = start(tmp_path, method, f"--out={tmp_path / 'out'}", JAX_NUM_CPU_DEVICES="4")
  assert end([single])[0][0] == 0
  two, one = undisturbed(name)[0], tmp_path
  found, want = state(two), state(one)
  assert set(found) == set(want) >= {"method.params.kernel"}
  assert distance(found, want) <= 1e-5
  assert summary(two)["train_loss"] == pytest.approx(summary(one)["train_loss"], rel=1e-5)
  assert summary(two)["eval"] == pytest.approx(summary(one)["eval"], rel=1e-5)
  assert summary(two)["wire"] == summary(one)["wire"]
  losses = lambda folder: [row["loss"] for row in rows(folder)]
  assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_only_the_first_process_writes_and_prints(undisturbed):
  folder, ((_, out, err), (_, other_out, other_err)) = undisturbed("compressed")
  assert "training loss" in out
  assert "step " in err
  assert "training loss" not in other_out  # Gloo prints there, too
  assert "step " not in other_err
  assert [row["step"] for row in rows(folder)] == list(range(5, 201, 5))
  found = json.loads((folder / "out" / "env.json").read_text())
  assert (found["processes"], found["devices"]) == (2, 4)
  opened = [set((folder / f"cwd{i}.opened").read_text().splitlines()) for i in range(2)]
  mine = [{path for path in paths if path.startswith(f"{folder}/out/")} for paths in opened]
  mine = [{path for path in paths if "/checkpoints/" not in path} for paths in mine]
  assert str(folder / "out" / "metrics.jsonl") in mine[0]
  assert mine[1] == set()
  assert list((folder / "cwd0").iterdir()) == list((folder / "cwd1").iterdir()) == []


def test_a_job_survives_a_death_and_a_hang_and_ends_as_an_unbroken_one(undisturbed, tmp_path):
  """One of two processes is killed, then one is stopped for good; the launcher starts both anew."""
  launched = launch(tmp_path, "adam", "--restarts=4", "--hang_seconds=12")
  try:
    first = after_a_checkpoint([launched], tmp_path)
    os.kill(children(launched.pid)[1], signal.SIGKILL)
    wait_for(lambda: checkpoints(tmp_path)[-1] > first, launched)
    os.kill(children(launched.pid)[0], signal.SIGSTOP)
    ((code, out, err),) = end([launched])
  finally:
    launched.kill()
  assert code == 0, err
  assert "launch: process 1 was killed by SIGKILL" in err
  assert "launch: no process has advanced for 12 s: processes 0, 1" in err
  resumed = [int(line.rpartition(" ")[2]) for line in out.splitlines() if "resuming at" in line]
  assert [step >= first for step in resumed] == [True, True], out
  assert summary(tmp_path)["params_sha256"] == summary(undisturbed("adam")[0])["params_sha256"]
  assert [row["step"] for row in rows(tmp_path)] == list(range(5, 201, 5))


def test_all_processes_stop_where_one_is_told_to_and_fewer_go_on(pair, start, tmp_path):
  """A preemption notice to one saves on both, at the same step; one of half the devices goes on."""
  told = pair(tmp_path, "adam", "--steps=1000")
  after_a_checkpoint(told, tmp_path)
  told[1].terminate()
  ends = end(told)
  assert [code for code, _, _ in ends] == [0, 0], ends
  stopped = summary(tmp_path)
  assert stopped["stopped_because"] == "terminated"
  assert stopped["steps"] == checkpoints(tmp_path)[-1] < 1000
  more = stopped["steps"] + 10
  flags = (f"--method=data_parallel({JOBS['adam'][0]})", f"--out={tmp_path / 'out'}")
  changes = ("--mesh=data:2", f"--steps={more}", "--allow_changes")
  ends = end([start(tmp_path, *flags, *changes, JAX_NUM_CPU_DEVICES="2")])
  assert ends[0][0] == 0, ends
  assert f"resuming at step {stopped['steps']}" in ends[0][2]
  assert f"checkpoint {stopped['steps']}, saved on data:4, is put on data:2" in ends[0][2]
  assert (summary(tmp_path)["stopped_because"], summary(tmp_path)["steps"]) == ("steps", more)


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of a few bytes takes root to mount")
def test_a_full_disk_ends_a_job_in_a_line_and_it_goes_on_when_there_is_room(tmp_path):
  """Whoever's write fails leaves, and the launcher does not start again what would fail again."""
  (tmp_path / "out").mkdir()
  disk = ["mount", "-t", "tmpfs", "-o"]
  subprocess.run([*disk, "size=160k", "tmpfs", tmp_path / "out"], check=True)
  try:
    more = ("--model=mlp(hidden=[500])", "--steps=20")
    launched = launch(tmp_path, "adam", "--restarts=3", more=more)
    ((code, out, err),) = end([launched])
    assert code == 5
    said = [line for line in out.splitlines() if "error: no checkpoint can be saved" in line]
    assert len(said) in (1, 2)  # the other may have waited for it, or be ended before it says so
    assert any("the disk is full" in line for line in said)
    assert all("is full" in line or "another process has not" in line for line in said)
    assert "Traceback" not in out
    assert "restart" not in err
    before = checkpoints(tmp_path)[-1:]
    subprocess.run([*disk, "remount,size=2m", "tmpfs", tmp_path / "out"], check=True)
    ((code, out, err),) = end([launch(tmp_path, "adam", more=more)])
    assert code == 0, err
    assert [f"resuming at step {step}" in out for step in before] == [True] * len(before)
    assert summary(tmp_path)["steps"] == 20
  finally:
    subprocess.run(["umount", "--lazy", tmp_path / "out"], check=True)


def launch(folder: Path, name: str, *flags: str, more: tuple[str, ...] = ()) -> subprocess.Popen:
  """The job under a launcher, of two processes with two devices each."""
  sizes = ("--processes=2", "--devices_per_process=2", *flags)
  method = f"--method=data_parallel({JOBS[name][0]})"
  job = [str(RUN), *JOB, method, f"--out={folder / 'out'}", *more]
  command = [sys.executable, str(LOCAL), *sizes, f"--logs={folder / 'logs'}", "--", "python", *job]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=folder, env=environment(), **pipes)


def children(pid: int) -> list[int]:
  """A launcher's processes, in the order in which it started them; before them is its watchman."""
  return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()][1:]


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
  until = time.monotonic() + TIMEOUT
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < until
    time.sleep(0.01)


OVERLAPPED = (
  "--executor=overlapped",
  "--mesh=data:4",
  "--method=late(diloco(sgd(0.1), sgd(0.7, momentum=0.5), "
  "error_feedback(gather_mean(top_k(0.3))), period=5), 7)",
  "--steps=80",
  "--log_every=20",
  "--checkpoint_every=20",
)


def test_a_job_whose_exchanges_overlap_survives_a_death_and_an_interruption(pair, tmp_path):
  """Each time, two exchanges are on their way, and the memory is on the communication devices."""
  pair = functools.partial(pair, devices=4)  # two that compute, two that exchange
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  whole.mkdir()
  broken.mkdir()
  assert [code for code, _, _ in end(pair(whole, "adam", *OVERLAPPED))] == [0, 0]

  processes = pair(broken, "adam", *OVERLAPPED)
  first = after_a_checkpoint(processes, broken)
  processes[1].kill()
  survivor, _ = end(processes)
  assert survivor[0] not in (0, None), survivor
  assert "Traceback" not in survivor[2], survivor

  processes = pair(broken, "adam", *OVERLAPPED)
  until = time.monotonic() + TIMEOUT
  while checkpoints(broken)[-1] <= first and time.monotonic() < until:
    time.sleep(0.01)
  for process in processes:
    process.send_signal(signal.SIGTERM)
  assert [code for code, _, _ in end(processes)] == [0, 0]
  assert [code for code, _, _ in end(pair(broken, "adam", *OVERLAPPED))] == [0, 0]
  found, want = state(broken), state(whole)
  assert set(found) == set(want)
  for name, leaf in want.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)
  assert summary(broken)["params_sha256"] == summary(whole)["params_sha256"]


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_signal_at_the_end_does_not_hold_up_a_job_that_is_done(pair, tmp_path, seconds):
  """Whether a process is about to print the summary or has left, the job ends at once, and well."""
  processes = pair(tmp_path, "adam", "--steps=20")
  until = time.monotonic() + TIMEOUT
  while not (tmp_path / "out" / "summary.json").exists():
    assert time.monotonic() < until
    time.sleep(0.01)
  time.sleep(seconds)
  for process in processes:
    process.terminate()
  assert [code for code, _, _ in end(processes)] == [0, 0]


def test_with_one_computing_device_each_collectives_keep_their_order(pair, start, tmp_path):
  """Metrics and checkpoints communicate, too, beside exchanges that are still on their way."""
  two, one = tmp_path / "two", tmp_path / "one"
  two.mkdir()
  flags = (*OVERLAPPED, "--mesh=data:2", "--steps=200")
  assert [code for code, _, _ in end(pair(two, "adam", *flags))] == [0, 0]
  single = start(one, *flags, f"--out={one / 'out'}", JAX_NUM_CPU_DEVICES="4")
  assert end([single])[0][0] == 0
  assert distance(state(two), state(one)) <= 1e-5
