"""Slurm, Kubernetes and SkyPilot: what their files say, run with stand-ins for the schedulers."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.comm import join

LAUNCH = Path(__file__).parents[1] / "launch"
TIMEOUT = 60
# Stand-ins tell what they were called with; srun runs the command, and passes on SIGTERM.
TOOLS = {
  "srun": '#!/bin/bash\nshift\n"$@" &\necho $! >$AT/task\nwait $!\nexit $?\n',
  "scancel": '#!/bin/bash\necho "scancel $*" >>$AT/calls\nkill -TERM $(cat $AT/task)\n',
  "scontrol": '#!/bin/bash\necho "scontrol $*" >>$AT/calls\n',
}


@pytest.fixture
def slurm(tmp_path):
  """Runs launch/slurm.sh on a command; its exit code, output, and the calls of Slurm's commands."""
  for name, text in TOOLS.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  (tmp_path / "calls").touch()

  def slurm(*command: str, **environ: str) -> tuple[int, str, list[str]]:
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "AT": str(tmp_path)}
    env |= {"SLURM_JOB_ID": "17"} | environ
    script = ["bash", str(LAUNCH / "slurm.sh"), *command]
    ended = subprocess.run(script, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    return (
      ended.returncode,
      ended.stdout + ended.stderr,
      (tmp_path / "calls").read_text().split("\n")[:-1],
    )

  return slurm


def test_a_slurm_job_that_has_finished_ends(slurm):
  assert slurm("echo", "a b", "$x", "{") == (0, "a b $x {\n", [])


@pytest.mark.parametrize(("code", "requeued"), [(1, True), (134, True), (2, False), (5, False)])
def test_a_slurm_job_goes_back_to_the_queue_where_that_helps(slurm, code, requeued):
  found, _, calls = slurm("bash", "-c", f"exit {code}")
  assert calls == ["scontrol requeue 17"] * requeued
  assert found == (0 if requeued else code)


def test_a_slurm_job_gives_up(slurm):
  code, out, calls = slurm("bash", "-c", "exit 7", SLURM_RESTART_COUNT="20")
  assert (code, calls) == (7, [])
  assert "error: exit code 7 after 20 restarts" in out


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_slurm_job_saves_before_its_time_is_up_and_goes_back_to_the_queue(slurm, number):
  """The signal comes to the script; the run gets SIGTERM, saves and ends with 0."""
  program = f"kill -{number} $(ps -o ppid= $PPID)"
  program = f"trap 'echo saved; exit 0' TERM; {program}; while sleep 0.1; do :; done"
  code, out, calls = slurm("bash", "-c", program)
  assert code == 0
  assert "saved" in out
  assert calls == ["scancel --signal=TERM 17", "scontrol requeue 17"]


@pytest.mark.parametrize(("task", "line"), [("0", "a=0.1,x plain"), ("2", "a=1,z plain")])
def test_a_slurm_array_takes_alternatives(slurm, task, line):
  words = ("echo", "a={0.1|0.3|1},{x|y|z}", "plain")
  assert slurm(*words, SLURM_ARRAY_TASK_ID=task)[:2] == (0, f"{line}\n")


def test_a_slurm_array_with_too_few_alternatives_is_refused(slurm):
  code, out, calls = slurm("echo", "{a|b}", SLURM_ARRAY_TASK_ID="2")
  assert (code, calls) == (2, [])
  assert out == "error: {a|b}: there is no alternative 2\n"


def test_slurm_is_asked_for_a_process_per_gpu_and_for_time_to_save():
  lines = (LAUNCH / "slurm.sh").read_text().splitlines()
  given = [line.removeprefix("#SBATCH --").partition("=") for line in lines if "#SBATCH" in line]
  flags = {name: value for name, _, value in given}
  assert flags["gpus-per-node"] == flags["ntasks-per-node"]
  assert flags["signal"].startswith("B:USR1@")
  assert {"requeue", "open-mode"} <= set(flags)


# ---- Kubernetes and SkyPilot


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
  (job,) = jobset["spec"]["replicatedJobs"]
  return job


def test_the_jobset_tells_each_host_its_place():
  jobset = yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())
  job = job_of(jobset)
  spec = job["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  environ = {one["name"]: one.get("value", "0") for one in container["env"]}
  address, processes, number = join._of_environment(environ)
  assert (processes, number) == (spec["completions"], 0)
  assert spec["completions"] == spec["parallelism"]
  assert spec["completionMode"] == "Indexed"
  name, network = jobset["metadata"]["name"], jobset["spec"]["network"]
  port = container["ports"][0]["containerPort"]
  assert address == f"{name}-{job['name']}-0-0.{network['subdomain']}:{port}"
  assert spec["backoffLimit"] == 0
  gpus = container["resources"]["limits"]["nvidia.com/gpu"]
  assert f"--mesh=data:{processes * gpus} " in container["args"][0]


@pytest.mark.parametrize(
  ("python", "code"),
  [
    ("exit 0", 0),
    ("exit 3", 3),
    ('trap "exit 0" TERM; kill -TERM $PPID; while sleep 0.1; do :; done', 143),
  ],
)
def test_a_pod_that_was_told_to_stop_has_not_finished(python, code, tmp_path):
  jobset = yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())
  (container,) = job_of(jobset)["template"]["spec"]["template"]["spec"]["containers"]
  (tmp_path / "python").write_text(f"#!/bin/bash\nsleep 0.3\n{python}\n")
  (tmp_path / "python").chmod(0o755)
  env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  ended = subprocess.run([*container["command"], *container["args"]], env=env, timeout=TIMEOUT)
  assert ended.returncode == code


def test_skypilot_tells_each_host_its_place(tmp_path):
  job = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  python = tmp_path / ".venv" / "bin" / "python"
  python.write_text("#!/bin/bash\nenv | grep ^JAX_ | sort\necho $*\n")
  python.chmod(0o755)
  told = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
  env = os.environ | told | {"SKYPILOT_NODE_RANK": "1"}
  line = ["bash", "-c", job["run"]]
  ended = subprocess.run(
    line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=TIMEOUT
  )
  *environ, command = ended.stdout.splitlines()
  found = join._of_environment(dict(one.split("=", 1) for one in environ))
  assert found == ("10.0.0.1:8476", 2, 1)
  gpus = int(job["resources"]["accelerators"].partition(":")[2])
  assert f"--mesh=data:{job['num_nodes'] * gpus} " in command
