"""launch/slurm.sh under a real Slurm: a controller and nodes of its own, all on this machine."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sh"
RUN = ROOT / "experiments" / "run.py"
TIMEOUT = 150
DAEMONS = ("munged", "slurmctld", "slurmd")
lacking = [tool for tool in (*DAEMONS, "sbatch") if not shutil.which(tool)]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or bool(lacking),
    reason="needs Linux, root and: apt-get install slurm-wlm munge",
  ),
]

# JAX takes the first node's name for the coordinator's address. `cred_expire` is also how long a
# job waits after a requeue. On the third and fourth node, jobs run against their time limits, which
# Slurm looks at every 30 s, beside the other tests. The last node has GPUs by name alone. With a
# short `MessageTimeout` a lost node is noticed sooner, and with `MinJobAge` an ended job is kept.
HOST = socket.gethostname().partition(".")[0]
NODES = tuple(f"{HOST}{name}" for name in ("", "-second", "-third", "-fourth", "-gpus"))
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
KillWait=20
MessageTimeout=4
MinJobAge=3600
SlurmdTimeout=5
GresTypes=gpu
{nodes}
PartitionName=low Nodes={host},{host}-second Default=YES PriorityTier=1 GraceTime=60
PartitionName=abrupt Nodes={host},{host}-second PriorityTier=1 GraceTime=0
PartitionName=high Nodes={host},{host}-second PriorityTier=10 PreemptMode=OFF
PartitionName=timed Nodes={host}-third,{host}-fourth
PartitionName=gpus Nodes={host}-gpus
"""
NODE = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=2"
UNTIMED = "low,abrupt,high,gpus"

# On SIGTERM it saves and ends with 0; it has finished once it finds what it saved.
PROGRAM = """#!/bin/bash
note() { echo "$1 $SLURM_PROCID" >>log; }
trap 'touch saved.$SLURM_PROCID; note saved; exit 0' TERM
note started
[ -e saved.$SLURM_PROCID ] && note finished && exit 0
while :; do sleep 0.1; done
"""
SLOW = PROGRAM.replace("touch", "sleep 2; touch")
STEPS = 2000
TRAINING = (
  "--executor=spmd",
  "--mesh=data:2",
  "--task=least_squares(noise=0.5)",
  "--method=data_parallel(adam(1e-2), mean())",
  "--batch_size=40",
  "--steps_per_dispatch=5",
  "--checkpoint_seconds=0",
  f"--steps={STEPS}",
  "--log_every=200",
  "--checkpoint_every=100",
)


def wait_for(condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.1)


def free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for one in sockets:
      one.bind(("127.0.0.1", 0))
    return [one.getsockname()[1] for one in sockets]


class Cluster:
  """Daemons of a Slurm that nobody else sees; `stop` ends them and what they have started."""

  def __init__(self, folder: Path) -> None:
    self.folder = folder
    self.daemons: dict[str, subprocess.Popen[bytes]] = {}
    self.timed: dict[str, Job] = {}
    self.environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    self.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "JAX_NUM_CPU_DEVICES": "1"}
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    ports = free_ports(1 + len(NODES))
    nodes = [NODE.format(name, HOST, port) for name, port in zip(NODES, ports[1:], strict=True)]
    nodes[-1] += " Gres=gpu:2"
    config = CONFIG.format(folder=folder, host=HOST, port=ports[0], nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(config)
    gpus = [f"NodeName={NODES[-1]} Name=gpu File=/dev/{name}\n" for name in ("null", "zero")]
    (folder / "gres.conf").write_text("".join(gpus))

  def start(self) -> None:
    files = {"socket": "munge.socket", "key-file": "key", "pid-file": "munge.pid",
             "log-file": "munge.log", "seed-file": "munge.seed"}  # fmt: skip
    files = [f"--{flag}={self.folder / name}" for flag, name in files.items()]
    self.daemon("munged", "munged", "--foreground", "--force", *files)
    wait_for((self.folder / "munge.socket").exists, 10)
    self.daemon("slurmctld", "slurmctld", "-D")
    for node in NODES:
      self.start_node(node)
    wait_for(lambda: set(self.says("sinfo", "-h", "-o", "%T").split()) == {"idle"}, 30)

  def start_node(self, node: str) -> None:
    self.daemon(node, "slurmd", "-D", "-N", node)

  def daemon(self, name: str, *command: str) -> None:
    with (self.folder / f"{name}.out").open("ab") as out:
      self.daemons[name] = subprocess.Popen(
        command,
        stdout=out,
        stderr=out,
        env=self.environ | {"DAEMON": name},  # which a node's step daemons have too
        cwd=self.folder,
        start_new_session=True,
      )

  def says(self, *command: str) -> str:
    at: dict[str, Any] = {"env": self.environ, "cwd": self.folder}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, **at)
    return ended.stdout

  def processes(self, **environ: str) -> list[int]:
    """Of this cluster, its daemons' and its jobs', those with these variables."""
    environ |= {"SLURM_CONF": self.environ["SLURM_CONF"]}
    wanted = {f"{name}={value}".encode() for name, value in environ.items()}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
      with contextlib.suppress(OSError):
        if wanted <= set(path.read_bytes().split(b"\0")):
          found.append(int(path.parent.name))
    return found

  def stop(self) -> None:
    for process in self.daemons.values():
      process.terminate()
    for process in self.daemons.values():
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for pid in self.processes():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for process in self.daemons.values():
      process.wait(10)

  def submit(
    self,
    folder: Path,
    *flags: str,
    command: tuple[str, ...] = ("./program",),
    program: str = PROGRAM,
  ) -> "Job":
    """Submits launch/slurm.sh with a command, by default a program that lies in its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "program").write_text(program)
    (folder / "program").chmod(0o755)
    line = ["sbatch", "--parsable", *flags, str(SCRIPT), *command]
    at: dict[str, Any] = {"env": self.environ, "cwd": folder}
    sent = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT, **at)
    assert sent.returncode == 0, sent.stderr
    return Job(self, folder, sent.stdout.strip())


class Job:
  """A job, or with `task` one of an array."""

  def __init__(self, cluster: Cluster, folder: Path, name: str) -> None:
    self.cluster, self.folder, self.name = cluster, folder, name

  def fields(self) -> dict[str, str]:
    line = self.cluster.says("scontrol", "show", "job", "-o", self.name)
    return {name: value for name, _, value in (word.partition("=") for word in line.split())}

  def log(self) -> list[str]:
    path = self.folder / "log"
    return path.read_text().splitlines() if path.exists() else []

  def printed(self) -> str:
    """What the script, srun and Slurm have written."""
    return "".join(path.read_text() for path in self.folder.glob("slurm-*.log"))

  def until(self, condition: Callable[[], object]) -> None:
    try:
      wait_for(condition)
    except AssertionError:
      raise AssertionError(f"{self.fields()}\n{self.log()}\n{self.printed()}") from None

  def until_started(self, times: int = 1) -> None:
    self.until(lambda: sum("started" in line for line in self.log()) == 2 * times)

  def ends(self) -> dict[str, str]:
    """Its fields once it is in its last state."""
    last = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
    self.until(lambda: self.fields().get("JobState") in last)
    return self.fields()

  def tell(self, *command: str) -> None:
    self.cluster.says(*command, self.name)


# Jobs that reach their time limit: how sbatch is asked to tell the script of it.
TIMED = {"with notice": "B:USR1@50", "without notice": "B:CONT@1"}


@pytest.fixture(scope="module")
def daemons(tmp_path_factory) -> Iterator[Cluster]:
  cluster = Cluster(tmp_path_factory.mktemp("slurm"))
  try:
    try:
      cluster.start()
    except (AssertionError, OSError):
      outputs = [path.read_text().splitlines() for path in cluster.folder.glob("*.out")]
      said = [line for lines in outputs for line in lines[-1:]]
      pytest.skip(f"Slurm's daemons do not start here: {said}")
    for name, signal_ in TIMED.items():
      flags = ("--partition=timed", "--time=1", f"--signal={signal_}")
      cluster.timed[name] = cluster.submit(cluster.folder / name.replace(" ", "-"), *flags)
    yield cluster
  finally:
    cluster.stop()


@pytest.fixture
def cluster(daemons) -> Iterator[Cluster]:
  """The cluster, without other jobs than the timed ones before and after."""
  yield daemons
  jobs = lambda: daemons.says("squeue", "-h", "-o", "%i", f"--partition={UNTIMED}").split()
  daemons.says("scancel", *jobs())
  wait_for(lambda: not jobs())


def preempt(job: Job) -> None:
  line = ["sbatch", "--partition=high", "--cpus-per-task=2", "--nodes=2", "--output=/dev/null"]
  job.cluster.says(*line, "--wrap=sleep 1")


def save(job: Job) -> None:
  """In the program's place, where it does not get so far."""
  for process in range(2):
    (job.folder / f"saved.{process}").touch()


def lose(node: str, job: Job) -> None:
  """All that runs on a node is killed; it is back once the controller has noticed."""
  save(job)
  cluster = job.cluster
  for pid in (*cluster.processes(DAEMON=node), *cluster.processes(SLURMD_NODENAME=node)):
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  cluster.daemons[node].wait()
  try:
    job.until(lambda: int(job.fields()["Restarts"]) == 1)
  finally:
    cluster.start_node(node)


def crash(job: Job) -> None:
  (pid, *_) = job.cluster.processes(SLURM_JOB_ID=job.name, SLURM_PROCID="1")
  save(job)
  os.kill(pid, signal.SIGKILL)


# What interrupts a job, whether the job can save before that, and sbatch's flags for it.
INTERRUPTIONS = {
  "preemption": (preempt, True, ()),
  "abrupt preemption": (preempt, True, ("--partition=abrupt",)),
  "requeue": (lambda job: job.tell("scontrol", "requeue"), True, ()),
  "crash": (crash, False, ()),
  "lost node": (partial(lose, NODES[1]), False, ()),
  "lost node of the script": (partial(lose, NODES[0]), False, ()),
}


def check_second_start(job: Job, saves: bool) -> None:
  """The job was interrupted once, ran again on two nodes, and has finished."""
  fields = job.ends()
  assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), job.printed()
  assert fields["Restarts"] == "1"
  assert sum("started" in line for line in job.log()) == 4
  assert {"finished 0", "finished 1"} <= set(job.log())
  if saves:
    assert {"saved 0", "saved 1"} <= set(job.log())


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_job_runs_again_and_completes(cluster, name, tmp_path):
  interrupt, saves, flags = INTERRUPTIONS[name]
  job = cluster.submit(tmp_path, *flags)
  job.until_started()
  interrupt(job)
  check_second_start(job, saves)


# What else has happened to a job that is cancelled.
BEFORE = {
  "running": lambda job: None,
  "saving": lambda job: job.tell("scancel", "--batch", "--signal=USR1"),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_cancelled_job_saves_and_stays_cancelled(cluster, name, tmp_path):
  job = cluster.submit(tmp_path, program=SLOW)
  job.until_started()
  BEFORE[name](job)
  job.tell("scancel")
  fields = job.ends()
  assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
  assert {"saved 0", "saved 1"} <= set(job.log())
  assert "back to the queue" not in job.printed()


def test_a_run_that_is_told_to_stop_takes_its_time_and_does_not_run_again(cluster, tmp_path):
  job = cluster.submit(tmp_path, program=SLOW)
  job.until_started()
  job.tell("scancel", "--signal=TERM")
  fields = job.ends()
  assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0")
  assert {"saved 0", "saved 1"} <= set(job.log())


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (2, "FAILED"), (5, "FAILED")])
def test_a_job_that_ends_by_itself_does_not_run_again(cluster, code, state, tmp_path):
  job = cluster.submit(tmp_path, command=("bash", "-c", f"exit {code}"))
  fields = job.ends()
  assert (fields["JobState"], fields["ExitCode"]) == (state, f"{code}:0")
  assert fields["Restarts"] == "0"


def test_a_process_that_must_not_run_again_ends_the_others_and_the_job(cluster, tmp_path):
  program = "[ $SLURM_PROCID = 0 ] && sleep 60; sleep 1; exit 5"
  job = cluster.submit(tmp_path, command=("bash", "-c", program))
  fields = job.ends()
  assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "5:0")
  assert fields["Restarts"] == "0"


def test_a_task_of_an_array_is_saved_and_run_again_alone(cluster, tmp_path):
  """The number of the last task is the array's own, by which Slurm's commands mean all tasks."""
  command = ("bash", "-c", "mkdir -p {a|b}; cp program {a|b}; cd {a|b}; exec ./program")
  array = cluster.submit(tmp_path, "--array=0-1", "--nodes=1", command=command)
  a, b = (Job(cluster, tmp_path / name, f"{array.name}_{i}") for i, name in enumerate("ab"))
  array.until(lambda: a.log() == b.log() == ["started 0"])
  b.tell("scancel", "--batch", "--signal=USR1")
  assert b.ends()["JobState"] == "COMPLETED"
  assert b.log() == ["started 0", "saved 0", "started 0", "finished 0"]
  assert (a.fields()["JobState"], a.log()) == ("RUNNING", ["started 0"])
  a.tell("scancel")
  assert a.ends()["JobState"] == "CANCELLED"
  assert (a.fields()["Restarts"], b.fields()["Restarts"]) == ("0", "1")


def test_a_process_has_its_gpu_and_its_cpus(cluster, tmp_path):
  gpus = ("--partition=gpus", "--nodes=1", "--gpus-per-node=2")
  command = ("bash", "-c", "echo started $SLURM_PROCID $SLURM_NTASKS $CPUS >>log")
  job = cluster.submit(tmp_path, *gpus, "--ntasks-per-node=2", command=command)
  assert job.ends()["JobState"] == "COMPLETED"
  assert sorted(map(str.strip, job.log())) == ["started 0 2", "started 1 2"]


# ---- the run itself


def summary(folder: Path) -> dict[str, Any]:
  return json.loads((folder / "out" / "summary.json").read_text())


def losses(folder: Path) -> list[float]:
  lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


def training(folder: Path) -> tuple[str, ...]:
  out = (f"--out={folder / 'out'}", f"--compilation_cache={folder.parent / 'compiled'}")
  return (sys.executable, str(RUN), *TRAINING, *out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
  """Folder of all runs, which share what they have compiled."""
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def unbroken(daemons, runs) -> Path:
  """Folder of a run on two nodes that nothing interrupts."""
  folder = runs / "unbroken"
  job = daemons.submit(folder, command=training(folder))
  assert job.ends()["JobState"] == "COMPLETED", job.printed()
  return folder


def test_two_nodes_train_as_one_process_does(cluster, unbroken, runs):
  one = runs / "one"
  one.mkdir()
  environ = cluster.environ | {"JAX_NUM_CPU_DEVICES": "2"}
  subprocess.run(training(one), env=environ, cwd=one, check=True, timeout=TIMEOUT)
  environment = json.loads((unbroken / "out" / "env.json").read_text())
  assert (environment["processes"], environment["devices"]) == (2, 2)
  assert losses(unbroken) == pytest.approx(losses(one), rel=1e-5)
  assert summary(unbroken)["train_loss"] == pytest.approx(summary(one)["train_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["preempted", "cancelled"])
def test_an_interrupted_run_loses_nothing(cluster, unbroken, name, runs):
  """Preempted it ends as an unbroken one; cancelled it can be started again."""
  broken = runs / name
  job = cluster.submit(broken, command=training(broken))
  job.until(lambda: any((broken / "out" / "checkpoints").glob("[0-9]*")))
  if name == "cancelled":
    job.tell("scancel")
    assert job.ends()["JobState"] == "CANCELLED"
    assert summary(broken)["stopped_because"] == "terminated"
    assert 0 < summary(broken)["steps"] < STEPS
    job = cluster.submit(broken, command=training(broken))
  else:
    preempt(job)
  fields = job.ends()
  assert fields["JobState"] == "COMPLETED", job.printed()
  assert fields["Restarts"] == ("1" if name == "preempted" else "0")
  assert summary(broken)["stopped_because"] == "steps"
  assert summary(broken)["params_sha256"] == summary(unbroken)["params_sha256"]


# ---- what ran beside the other tests


@pytest.mark.parametrize("name", TIMED)
def test_a_job_out_of_time_runs_again_and_completes(daemons, name):
  check_second_start(daemons.timed[name], saves=True)
