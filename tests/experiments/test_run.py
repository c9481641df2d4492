"""The command as a user meets it: what it leaves behind, how it stops, goes on and refuses."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
from subset import slow_except

from research.training.assemble import Config

RUN = Path(__file__).parents[2] / "experiments" / "run.py"
PARAMETERS = 64 * 128 + 128 + 128 * 10 + 10  # of mlp(hidden=[128]) on the digits
TIMEOUT = 120  # seconds, for what takes some


class Ended(NamedTuple):
  """What is left of a process."""

  code: int
  out: str
  err: str


# To import what the command does takes seconds. So most commands run in forks of one process.
FORKING = """
import gc, json, os, runpy, signal, sys, warnings
import flax.linen
import matplotlib.backends.backend_agg
import research.command.run
import research.methods.data_parallel
import research.tasks.convex.synthetic
import research.tasks.vision.vision
import research.training.loop
warnings.simplefilter("ignore")  # JAX warns of forks, and no thread runs here
gc.freeze()  # a collection in a fork would copy what it looks at
for line in sys.stdin:
  told = json.loads(line)
  if os.fork() == 0:
    signal.alarm(told["seconds"])
    os.chdir(told["folder"])
    os.environ.update(told["environ"])
    for stream in (1, 2):
      flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
      os.dup2(os.open(told["streams"][stream - 1], flags), stream)
    sys.argv = told["command"]
    sys.path[0] = os.path.dirname(told["command"][0])
    code = 0
    try:
      runpy.run_path(told["command"][0], run_name="__main__")
    except SystemExit as ended:
      code = ended.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without tearing down what was imported
  print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
  """Variables of a command: it is offline, has one device, and compiles fast."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RESEARCH_"))}
  offline = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
  return clean | offline | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> str:
  """A flag: what a command compiles is kept for the next one."""
  return f"--compilation_cache={tmp_path_factory.mktemp('compiled')}"


@pytest.fixture(scope="session")
def start(environ, compiled):
  """Starts the command in a folder, as a process of its own."""
  processes = []

  def start(folder: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    command = [sys.executable, str(RUN), compiled, *arguments]
    env = environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes.append(subprocess.Popen(command, cwd=folder, env=env, **pipes))
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def run_forked(environ, tmp_path_factory):
  """Runs the command in a folder to its end, on one device."""
  streams = [tmp_path_factory.mktemp("forked") / name for name in ("out", "err")]
  command = [sys.executable, "-c", FORKING]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  forking = subprocess.Popen(command, env=environ, **pipes)
  asked, answers = forking.stdin, forking.stdout
  assert asked
  assert answers

  def run_forked(folder: Path, *arguments: str, **environ: str) -> Ended:
    told = {"folder": str(folder), "environ": environ, "streams": list(map(str, streams))}
    told |= {"command": [str(RUN), *arguments], "seconds": TIMEOUT}
    print(json.dumps(told), file=asked, flush=True)
    return Ended(int(answers.readline()), *(path.read_text() for path in streams))

  yield run_forked
  forking.kill()
  forking.communicate()


@pytest.fixture(scope="session")
def run(start, run_forked, compiled):
  """Runs the command in a folder to its end, on one device or several."""

  def run(folder: Path, *arguments: str, devices: int = 1) -> Ended:
    if devices == 1:
      return run_forked(folder, compiled, *arguments)
    return end(start(folder, *arguments, devices=devices))

  return run


def end(process: subprocess.Popen) -> Ended:
  out, err = process.communicate(timeout=TIMEOUT)
  return Ended(process.returncode, out, err)


def summary(folder: Path) -> dict[str, Any]:
  return json.loads((folder / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[int]:
  """The steps of the checkpoints that are complete: others have other names."""
  return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdecimal())


def contents(folder: Path) -> dict[str, bytes | None]:
  """All that a folder holds: bytes of files, None for folders."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }


def is_increasing(steps: list[int]) -> bool:
  return steps == sorted(set(steps))


# ---- the job without flags


class Job(NamedTuple):
  cwd: Path
  out: Path
  ended: Ended


@pytest.fixture(scope="module")
def job(start, tmp_path_factory) -> Job:
  """The command without any flag of its own."""
  cwd = tmp_path_factory.mktemp("job")
  ended = end(start(cwd))
  (out,) = (cwd / "runs").iterdir()
  return Job(cwd, out, ended)


def test_the_job_without_flags_learns(job):
  assert job.ended.code == 0
  assert summary(job.out)["eval"]["accuracy"] >= 0.96
  assert "Traceback" not in job.ended.err


def test_the_folder_is_named_after_task_and_method(job):
  task, method, digest = job.out.name.split("-")
  assert (task, method) == ("digits", "data_parallel")
  assert len(digest) == 8
  assert [path.name for path in job.cwd.iterdir()] == ["runs"]


def test_the_summary_says_what_ran_and_how_it_went(job):
  found = summary(job.out)
  described = ("task", "model", "method", "executor", "mesh", "seed", "steps")
  assert {name: found[name] for name in described} == {
    name: Config().as_dict()[name] for name in described
  }
  assert found["workers"] == 8
  assert found["stopped_because"] == "steps"
  assert 0 < found["compile_seconds"] < found["seconds"]
  assert found["steps_per_second"] > 0
  assert 0 < found["train_loss"] < 0.1
  assert set(found["eval"]) == {"accuracy", "loss"}
  assert len(bytes.fromhex(found["params_sha256"])) == 32


def test_the_bytes_are_those_of_a_ring(job):
  """An all-reduce over W workers sends 2 (W - 1) / W of the gradient's bytes from each."""
  wire, dense = summary(job.out)["wire"], 2 * 7 / 8 * 4 * PARAMETERS
  assert wire["bytes_per_step_per_worker"] == {"data": dense}
  assert wire["dense_bytes_per_step_per_worker"] == dense
  assert wire["total_bytes_per_worker"] == 400 * dense
  assert rows(job.out)[-1]["bytes"] == 400 * dense


def test_the_configuration_holds_every_flag_and_its_default(job):
  assert json.loads((job.out / "config.json").read_text()) == Config().as_dict()


def test_the_environment_says_what_ran_it(job):
  found = json.loads((job.out / "env.json").read_text())
  assert {"commit", "python", "versions", "cores", "device", "processes"} <= set(found)
  assert (found["backend"], found["devices"], found["processes"]) == ("cpu", 1, 1)
  assert found["versions"]["jax"]
  assert found["command"][0] == "run.py"


def test_the_metrics_have_a_row_at_every_tenth_step(job):
  found = rows(job.out)
  assert [row["step"] for row in found] == list(range(10, 401, 10))
  assert all({"step", "loss", "seconds", "bytes"} <= set(row) for row in found)
  seconds = [row["seconds"] for row in found]
  assert seconds == sorted(seconds)
  evaluated = [row for row in found if "eval" in row]
  assert [row["step"] for row in evaluated] == list(range(50, 401, 50))
  assert evaluated[-1]["eval"] == summary(job.out)["eval"]
  assert evaluated[-1]["train_loss"] == summary(job.out)["train_loss"]


def test_the_plot_is_a_picture_and_the_end_is_saved(job):
  assert (job.out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
  assert checkpoints(job.out)[-1] == 400


def test_the_table_shows_accuracy_speed_bytes_and_the_plot(job):
  table = dict(line.split("  ", 1) for line in job.ended.out.splitlines())
  table = {name: value.strip() for name, value in table.items()}
  found = summary(job.out)
  assert float(table["test accuracy"]) == pytest.approx(found["eval"]["accuracy"], rel=1e-5)
  speed = float(table["steps per second"].replace(",", ""))
  assert speed == pytest.approx(found["steps_per_second"], rel=1e-3)
  assert table["bytes per step and worker over data"] == "67,270"
  assert job.cwd / table["plot"] == job.out / "loss.png"


def test_the_same_command_again_shows_the_result_and_changes_nothing(job, run):
  before = contents(job.cwd)
  again = run(job.cwd)
  assert again.code == 0
  assert again.out == job.ended.out
  assert "complete" in again.err
  assert "step " not in again.err
  assert contents(job.cwd) == before


# ---- stopping and going on

# Mini-batches, noise and a constant step: every step matters to the last bit of the result.
LONG = (
  "--task=least_squares(noise=0.5)",
  "--method=data_parallel(adam(1e-2), mean())",
  "--mesh=data:4",
  "--batch_size=40",
  "--steps=500",
  "--steps_per_dispatch=25",
  "--log_every=5",
  "--eval_every=25",
  "--checkpoint_every=25",
  "--checkpoint_seconds=0",
)
EXECUTIONS = {"simulate": 1, "spmd": 4}  # and their devices


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory) -> Callable[[str], Path]:
  """The folder of an uninterrupted run in a given execution."""
  folder = tmp_path_factory.mktemp("unbroken")

  def of(execution: str) -> Path:
    if not (folder / execution).exists():
      flags = (*LONG, f"--executor={execution}", f"--out={execution}")
      assert run(folder, *flags, devices=EXECUTIONS[execution]).code == 0
    return folder / execution

  return of


@pytest.fixture
def copied(unbroken, tmp_path) -> Path:
  """A copy of the uninterrupted run at its last checkpoint, without its summary."""
  shutil.copytree(unbroken("simulate"), tmp_path / "simulate")
  (tmp_path / "simulate" / "summary.json").unlink()
  return tmp_path


def after_a_checkpoint(process: subprocess.Popen, folder: Path) -> int:
  """Waits for the first complete checkpoint; its step."""
  until = time.monotonic() + TIMEOUT
  while not checkpoints(folder):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < until
    time.sleep(0.01)
  return checkpoints(folder)[-1]


STOPS = [
  ("simulate", signal.SIGTERM, 0, "terminated"),
  ("simulate", signal.SIGKILL, -signal.SIGKILL, None),
  ("simulate", signal.SIGINT, 130, "interrupted"),
  ("spmd", signal.SIGKILL, -signal.SIGKILL, None),
]


@pytest.mark.parametrize(("execution", "signal_", "code", "reason"), slow_except(STOPS[:1], STOPS))
def test_a_stopped_run_ends_as_an_unbroken_one(
  execution, signal_, code, reason, unbroken, start, run, tmp_path
):
  devices, out = EXECUTIONS[execution], tmp_path / execution
  command = (*LONG, f"--executor={execution}", f"--out={execution}")
  process = start(tmp_path, *command, devices=devices)
  seen = after_a_checkpoint(process, out)
  process.send_signal(signal_)
  stopped = end(process)
  saved = checkpoints(out)[-1]
  assert stopped.code == code
  assert seen <= saved < 500
  if reason:
    assert summary(out)["stopped_because"] == reason
    assert summary(out)["steps"] == saved
    assert reason in stopped.out
    assert "Traceback" not in stopped.err

  resumed = run(tmp_path, *command, devices=devices)
  assert resumed.code == 0
  assert f"resuming at step {saved}" in resumed.err
  assert summary(out)["stopped_because"] == "steps"
  assert summary(out)["params_sha256"] == summary(unbroken(execution))["params_sha256"]
  assert summary(out)["eval"] == summary(unbroken(execution))["eval"]
  assert is_increasing([row["step"] for row in rows(out)])
  untimed = lambda folder: [row | {"seconds": 0} for row in rows(folder)]
  assert untimed(out) == untimed(unbroken(execution))


@pytest.mark.slow
def test_a_run_stopped_before_it_evaluates_ends_in_order(start, tmp_path):
  process = start(tmp_path, *LONG, "--out=here", "--eval_every=0")
  after_a_checkpoint(process, tmp_path / "here")
  process.terminate()
  stopped = end(process)
  assert summary(tmp_path / "here")["stopped_because"] == "terminated"
  assert "Traceback" not in stopped.err
  assert stopped.code == 0


@pytest.mark.slow
def test_a_run_killed_before_it_told_its_result_tells_it(copied, unbroken, run):
  told = run(copied, *LONG, "--executor=simulate", "--out=simulate")
  assert told.code == 0
  found, want = map(summary, (copied / "simulate", unbroken("simulate")))
  told_again = ("steps", "stopped_because", "params_sha256", "train_loss", "eval")
  assert {name: found[name] for name in told_again} == {name: want[name] for name in told_again}


@pytest.mark.slow
def test_a_second_start_in_the_same_folder_is_refused(unbroken, start, run, tmp_path):
  command = (*LONG, "--executor=simulate", "--out=here")
  first = start(tmp_path, *command)
  after_a_checkpoint(first, tmp_path / "here")
  first.send_signal(signal.SIGSTOP)
  second = run(tmp_path, *command)
  first.send_signal(signal.SIGCONT)
  assert end(first).code == 0
  found, want = summary(tmp_path / "here"), summary(unbroken("simulate"))
  assert found["params_sha256"] == want["params_sha256"]
  assert second.code == 2
  assert second.err.startswith("error: --out='here': ")


def cut(folder: Path) -> None:
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(copied, unbroken, run):
  cut(copied / "simulate" / "checkpoints" / "500")
  resumed = run(copied, *LONG, "--executor=simulate", "--out=simulate")
  assert resumed.code == 0
  assert "checkpoint 500 is damaged" in resumed.err
  assert "resuming at step 475" in resumed.err
  assert "Traceback" not in resumed.err
  found, want = map(summary, (copied / "simulate", unbroken("simulate")))
  assert found["params_sha256"] == want["params_sha256"]
  assert is_increasing([row["step"] for row in rows(copied / "simulate")])


@pytest.mark.slow
def test_where_no_checkpoint_is_whole_the_command_says_so_and_does_not_start_anew(copied, run):
  steps = checkpoints(copied / "simulate")
  for step in steps:
    cut(copied / "simulate" / "checkpoints" / str(step))
  ended = run(copied, *LONG, "--executor=simulate", "--out=simulate")
  assert ended.code == 3
  *warnings, last = ended.err.splitlines()
  assert last.startswith("error: none of the checkpoints in ")
  assert len(warnings) == len(steps)
  assert "Traceback" not in ended.err
  assert not (copied / "simulate" / "summary.json").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_other_flags_if_told_so(copied, run):
  """Among them devices inside a worker, where there were none."""
  before = rows(copied / "simulate")
  mesh = "data:2,fsdp:2"
  changes = ("--steps=550", f"--mesh={mesh}", "--allow_changes")
  ended = run(copied, *LONG, "--executor=spmd", "--out=simulate", *changes, devices=4)
  assert ended.code == 0
  assert f"checkpoint 500, saved on data:4, is put on {mesh}" in ended.err
  assert "resuming at step 500" in ended.err
  found, after = summary(copied / "simulate"), rows(copied / "simulate")
  assert (found["steps"], found["workers"], found["mesh"]) == (550, 2, mesh)
  assert after[len(before)]["loss"] < 2 * before[-1]["loss"]
  assert after[: len(before)] == before
  assert after[-1]["step"] == 550
  assert is_increasing([row["step"] for row in after])
  assert json.loads((copied / "simulate" / "config.json").read_text())["steps"] == 550


@pytest.mark.slow
def test_a_state_of_other_shapes_is_refused_and_its_checkpoints_stay(copied, run):
  changes = ("--steps=550", "--task=least_squares(features=5)", "--allow_changes")
  before = contents(copied)
  ended = run(copied, *LONG, "--executor=simulate", "--out=simulate", *changes)
  assert ended.code in (2, 3)
  assert "Traceback" not in ended.err
  assert "damaged" not in ended.err
  after = contents(copied)
  assert {name: after.get(name) for name in before} == before


# ---- ends of other kinds


@pytest.mark.slow
def test_the_last_row_has_what_was_measured_at_the_end(run, tmp_path):
  flags = ("--steps=8", "--checkpoint_every=4", "--checkpoint_seconds=0", "--eval_every=0")
  assert run(tmp_path, *flags, "--out=here").code == 0
  summary = json.loads((tmp_path / "here" / "summary.json").read_text())
  assert rows(tmp_path / "here")[-1]["eval"] == summary["eval"]
  assert checkpoints(tmp_path / "here") == [4, 8]


def test_a_diverging_run_names_the_step_and_keeps_what_was_good(run, tmp_path):
  flags = ("--steps=200", "--steps_per_dispatch=4", "--checkpoint_every=4", "--eval_every=0")
  ended = run(
    tmp_path,
    "--task=least_squares()",
    "--method=data_parallel(sgd(5.0), mean())",
    "--batch_size=all",
    "--checkpoint_seconds=0",
    "--out=here",
    *flags,
  )
  assert ended.code == 4
  assert "Traceback" not in ended.err
  last = ended.err.splitlines()[-1]
  kept = checkpoints(tmp_path / "here")[-1]
  # the largest eigenvalue is 1: each step multiplies the error by 1 - 5, the loss by 2^4
  found = re.match(r"error: the loss is not finite at step (\d+)", last)
  assert found
  first = int(found[1])
  assert 28 <= first <= 36  # floats end at 2^128
  assert kept == (first - 1) // 4 * 4
  assert last.endswith(f"checkpoint {kept} is kept")
  assert rows(tmp_path / "here")[-1]["step"] == kept


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of a few bytes takes root to mount")
@pytest.mark.parametrize("size", ["4k", "60k"])  # for no file of a run; for no checkpoint
def test_a_full_disk_is_one_line_and_exit_code_5(size, run, tmp_path):
  (tmp_path / "disk").mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path / "disk"]
  subprocess.run(mount, check=True)
  try:
    ended = run(tmp_path, "--steps=200", "--log_every=1", "--out=disk/here")
  finally:
    subprocess.run(["umount", tmp_path / "disk"], check=True)
  assert ended.code == 5
  *evaluations, last = ended.err.splitlines()
  assert last.startswith("error: ")
  assert re.search("No space left|disk is full", last)
  assert all(line.startswith("step ") for line in evaluations), ended.err


@pytest.fixture(scope="module")
def converged(run, tmp_path_factory) -> tuple[Path, Ended]:
  """Gradient descent on a quadratic until its gradient is small."""
  folder = tmp_path_factory.mktemp("converged")
  ended = run(folder, *QUADRATIC, "--tolerance=1e-3", "--out=here")
  return folder, ended


QUADRATIC = ("--task=least_squares()", "--batch_size=all", "--eval_every=20")


@pytest.mark.slow
def test_a_run_stops_at_its_tolerance(converged):
  folder, ended = converged
  assert ended.code == 0
  found = summary(folder / "here")
  assert found["stopped_because"] == "converged"
  assert found["steps"] < 400
  norms = [row["gradient_norm"] for row in rows(folder / "here") if "gradient_norm" in row]
  assert len(norms) == found["steps"] // 20
  assert norms[-1] < 1e-3 <= min(norms[:-1])
  assert checkpoints(folder / "here")[-1] == found["steps"] == rows(folder / "here")[-1]["step"]
  assert "converged" in ended.out


@pytest.mark.slow
def test_a_converged_run_goes_on_to_a_smaller_tolerance(converged, run, tmp_path):
  shutil.copytree(converged[0] / "here", tmp_path / "here")
  ended = run(tmp_path, *QUADRATIC, "--tolerance=1e-5", "--allow_changes", "--out=here")
  assert ended.code == 0
  assert rows(tmp_path / "here")[-1]["gradient_norm"] < 1e-5


@pytest.fixture(scope="module")
def clients(run, tmp_path_factory) -> Job:
  """Two passes with a cohort of 8 of 16 clients of unlike data, traced and reported."""
  cwd = tmp_path_factory.mktemp("clients")
  flags = ("--epochs=2", "--batch_size=64", "--log_every=5", "--eval_every=20")
  data = ("--population=16", "--partition=dirichlet(0.3)")
  ended = run(cwd, *flags, *data, "--tensorboard", "--profile", "--out=here")
  return Job(cwd, cwd / "here", ended)


@pytest.mark.slow
def test_clients_in_turn_learn_from_unlike_data(clients):
  assert clients.ended.code == 0
  found = summary(clients.out)
  assert found["workers"] == 8
  assert found["eval"]["accuracy"] > 0.8
  assert rows(clients.out)[0]["loss"] > 4 * found["train_loss"]


@pytest.mark.slow
def test_epochs_are_passes_over_the_training_data(clients):
  assert summary(clients.out)["steps"] == 2 * 1440 / 64


@pytest.mark.slow
def test_tensorboard_events_are_written(clients):
  (path,) = (clients.out / "tensorboard").iterdir()
  assert path.name.startswith("events.out.tfevents.")
  for tag in (b"loss", b"train_loss", b"eval/accuracy", b"bytes"):
    assert tag in path.read_bytes()


@pytest.mark.slow
def test_a_trace_is_written(clients):
  assert list((clients.out / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_checkpoints_do_not_grow_with_the_workers(run, tmp_path):
  flags = ("--task=least_squares()", "--model=mlp(hidden=[100])", "--steps=1")
  for workers in (2, 16):
    where = (f"--mesh=data:{workers}", f"--out=of_{workers:02}")
    assert run(tmp_path, *flags, "--batch_size=all", *where).code == 0
  few, many = (stored(tmp_path / out / "checkpoints" / "1") for out in ("of_02", "of_16"))
  assert few == many
  bytes_of = lambda shape, dtype: math.prod(shape) * np.dtype(dtype).itemsize
  parameters = 10 * 100 + 100 + 100 + 1
  assert sum(bytes_of(*leaf) for leaf in few.values()) > 2 * 4 * parameters  # and their momentum


def stored(step: Path) -> dict[str, tuple[tuple[int, ...], str]]:
  """Shape and type of each leaf in a checkpoint."""
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(step / "default").item_metadata.tree
  return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in tree["state"].items()}


# ---- what is refused


class Bad(NamedTuple):
  """A command that cannot be, what its error says, and what lies in the folder before."""

  flags: tuple[str, ...]
  says: tuple[str, ...]
  files: dict[str, str] | None = None


def other_run(**flags: Any) -> dict[str, str]:
  return {"old/config.json": json.dumps(Config(out="old", **flags).as_dict())}


SMALL = "--task=least_squares()"
METHODS = ("data_parallel", "averaged")
BAD = {
  "flag": Bad(("--stepz=3",), ("--stepz", "did you mean '--steps'?")),
  "argument": Bad(("digits",), ("'digits'", "--name=value")),
  "number": Bad(("--steps=many",), ("--steps=many",)),
  "sign": Bad(("--steps=0",), ("--steps=0", "range")),
  "task": Bad(("--task=digit()",), ("--task='digit()'", "'digits'?", "least_squares", "libsvm")),
  "model": Bad(("--model=mlpp()",), ("--model='mlpp()'", "'mlp'?", "linear", "resnet")),
  "method": Bad(
    ("--method=data_paralel(sgd(0.1), mean())",), ("--method='", "'data_parallel'?", *METHODS)
  ),
  "optimizer": Bad(
    ("--method=data_parallel(sgdd(0.1), mean())",), ("--method='", "'sgdd'", "'sgd'?", "adamw")
  ),
  "aggregator": Bad(
    ("--method=data_parallel(sgd(0.1), meen())",),
    ("--method='", "'meen'", "'mean'?", "hierarchical_mean"),
  ),
  "partition": Bad(("--partition=idd()",), ("--partition='idd()'", "'iid'?", "dirichlet")),
  "executor": Bad(("--executor=spdm",), ("--executor='spdm'", "'spmd'?", "simulate", "pmap")),
  "spec": Bad(("--task=digits(",), ("--task='digits('", "malformed at character 7")),
  "parameter": Bad(
    ("--method=data_parallel(sgd(0.1, momentun=0.9), mean())",),
    ("--method='", "'momentun'", "'momentum'?", "learning_rate"),
  ),
  "type": Bad(("--model=mlp(hidden=128)",), ("--model='", "hidden=128 is not a list")),
  "range": Bad(
    ("--method=data_parallel(sgd(-1.0), mean())",), ("--method='", "learning_rate=-1.0", "(0, inf)")
  ),
  "devices": Bad(
    (SMALL, "--executor=spmd"),
    ("--mesh='data:8'", "there is 1", "--executor=simulate", "JAX_NUM_CPU_DEVICES=8"),
  ),
  "axis": Bad(("--mesh=dat:8",), ("--mesh='dat:8'", "'data'?", "slice, data, stage, fsdp, expert")),
  "mesh": Bad(("--mesh=data",), ("--mesh='data'", "AXIS:SIZE")),
  "division": Bad(("--batch_size=100",), ("--batch_size=100", "8 workers", "96 and 104")),
  "examples": Bad((SMALL, "--batch_size=1600"), ("--batch_size=1600", "1000", "'all'")),
  "period": Bad(
    ("--method=data_parallel(sgd(0.1), mean(), period=3)",),
    ("--steps=400", "3 steps", "nearest: 402"),
  ),
  "population": Bad(("--population=12",), ("--population=12", "8 workers", "--mesh='data:8'")),
  "workers": Bad(
    ("--task=least_squares(samples=4, features=2)", "--mesh=data:5", "--batch_size=all"),
    ("5 workers", "4 examples"),
  ),
  "processes": Bad(("--processes=2",), ("--coordinator=''", "HOST:PORT")),
  "changed": Bad(
    ("--out=old",),
    ("--out='old'", "--steps=400 (was 500)", "--seed=0 (was 3)", "--allow_changes"),
    other_run(steps=500, seed=3),
  ),
  "file": Bad(("--out=plain",), ("--out='plain'", "not a writable folder"), {"plain": "text"}),
  "under": Bad(("--out=plain/run",), ("--out='plain/run'", "plain is not"), {"plain": "text"}),
  "foreign": Bad(("--out=mine",), ("--out='mine'", "other files"), {"mine/thesis.tex": "text"}),
  "url": Bad((SMALL, "--out=gs://bucket/run"), ("--out='gs://bucket/run'", "a URL", "mount")),
  "stranger": Bad((SMALL, "--out=~nosuchuser/run"), ("--out='~nosuchuser/run'", "no such user")),
  "bytes": Bad((SMALL, "--out=caf\udce9"), ("--out='caf", "not UTF-8 (it holds 0xe9)")),
  "data folder": Bad((SMALL, "--data_dir=s3://x"), ("--data_dir='s3://x'", "a URL")),
  "cache": Bad(
    (SMALL, "--compilation_cache=~nosuchuser/x"), ("--compilation_cache='~nosuchuser/x'", "user")
  ),
  "cache file": Bad(
    (SMALL, "--compilation_cache=plain"),
    ("--compilation_cache='plain'", "not a folder"),
    {"plain": ""},
  ),
  "replayed": Bad(("--replay=gs://bucket/run",), ("--replay='gs://bucket/run'", "a URL")),
  "text": Bad(("--task=text('~nosuchuser/x')",), ("--task=", "no such user")),
  "unwritable": Bad((SMALL, "--out=/proc/run"), ("--out='/proc/run'",)),
  "offline": Bad(
    ("--task=libsvm('a9a')",), ("libsvm/a9a is not in", "cannot be fetched", "https://", "save it")
  ),
  "truncated": Bad(
    ("--task=libsvm('a9a')", "--data_dir=data"),
    ("data/libsvm/a9a is truncated or another file", "sha256"),
    {"data/libsvm/a9a": "+1 1:1\n-1 2:1\n"},
  ),
  "epochs": Bad((SMALL, "--epochs=nan"), ("--epochs=nan",)),
  "few": Bad((SMALL, "--epochs=1e-9"), ("--epochs=1e-09",)),
  "tolerance": Bad((SMALL, "--tolerance=nan", "--steps=1"), ("--tolerance=nan",)),
  "clip": Bad((SMALL, "--clip_norm=nan", "--steps=1"), ("--clip_norm=nan",)),
  "seed": Bad((SMALL, "--seed=99999999999999999999"), ("--seed=99999999999999999999",)),
  "places": Bad(("--mesh=slice:8,data:4611686018427387904",), ("36893488147419103232",)),
  "ratings": Bad(
    ("--task=movielens('r.tsv')",), ("rating of 7", "1 to 5"), {"r.tsv": "1 1 5 0\n1 2 7 0\n"}
  ),
  "users": Bad(
    ("--task=movielens_als('r.tsv')",),
    ("user 2 of 3 has no ratings",),
    {"r.tsv": "1 1 5 0\n3 2 4 0\n"},
  ),
  "query": Bad(("--task=bm25(ask='of the')",), ("ask='of the' is empty",)),
  "graph": Bad(
    ("--task=pagerank('e.txt')", "--batch_size=all"), ("no edges",), {"e.txt": "# from to\n"}
  ),
  "covariance": Bad(
    ("--task=frontier('c.txt', returns=[0.1])",),
    ("not positive semidefinite", "an eigenvalue is -"),
    {"c.txt": "3\n0.1 1\n0.2 1\n0.3 1\n1 2 0.9\n1 3 0.9\n2 3 -0.9\n"},
  ),
  "return": Bad(
    ("--task=frontier('c.txt', returns=[0.3])",),
    ("a return of 0.3 is required", "0.1 to 0.2"),
    {"c.txt": "2\n0.1 1\n0.2 1\n1 2 0.5\n"},
  ),
  "constraints": Bad(
    (
      "--task=frontier('c.txt', returns=[0.15])",
      "--method=d_psgd(sgd(0.1), gossip(ring()))",
      "--batch_size=all",
    ),
    ("--method=", "convex set", "consensus_admm"),
    {"c.txt": "2\n0.1 1\n0.2 1\n1 2 0.5\n"},
  ),
  "own model": Bad(
    ("--task=pagerank('e.txt')", "--model=mlp()"), ("--model='mlp()'", "model of its own")
  ),
  "config": Bad((SMALL, "--out=old"), ("--out='old'", "config.json"), {"old/config.json": "[]"}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_no_trace(name, run_forked, tmp_path):
  bad, here = BAD[name], tmp_path / "here"
  here.mkdir()
  for path, text in (bad.files or {}).items():
    (here / path).parent.mkdir(parents=True, exist_ok=True)
    (here / path).write_text(text)
  before = contents(here)
  nowhere = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "RESEARCH_DATA_DIR": str(tmp_path / "none")}
  ended = run_forked(here, "--compilation_cache=off", *bad.flags, **nowhere)
  assert ended.code == 2, ended.err
  assert ended.out == ""
  assert "Traceback" not in ended.err
  last = ended.err.splitlines()[-1]
  assert last.startswith("error: ")
  for part in bad.says:
    assert part in last
  assert contents(here) == before


@pytest.mark.slow
def test_the_state_of_a_mesh_that_is_not_there_is_shown(run, tmp_path):
  ended = run(tmp_path, "--explain_sharding", "--executor=spmd", "--mesh=data:32,fsdp:2")
  assert ended.code == 0
  (row,) = (line for line in ended.out.splitlines() if "params.hidden_0.kernel" in line)
  assert row.split() == [
    "method.params.hidden_0.kernel", "[64,", "128]", "float32", "P(None,", "'fsdp')", "16,384",
  ]  # fmt: skip
  assert not [*tmp_path.iterdir()]
