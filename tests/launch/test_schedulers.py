"""Slurm, Kubernetes and SkyPilot: what their files say, run with stand-ins for the schedulers."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.comm import join

LAUNCH = Path(__file__).parents[2] / "launch"
TIMEOUT = 60
# Stand-ins record their calls; srun runs the command, scancel passes SIGTERM on to it, and squeue
# prints $STATE: the job's state, when its preemption began, and a reason. Slurm's SIGTERM, which
# comes more than once, also reaches the commands that the script calls.
TOOLS = {
  "srun": "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
  '"$@" &\necho $! >$AT/task\nwait $!\nexit $?\n',
  "squeue": '#!/bin/bash\nkill -TERM $$\necho "$STATE"\n',
  "scancel": '#!/bin/bash\necho "scancel $*" >>$AT/calls\nkill -TERM $(cat $AT/task)\n',
  "scontrol": '#!/bin/bash\nkill -TERM $$\necho "scontrol $*" >>$AT/calls\n',
}
RUNNING = "RUNNING N/A None"


@pytest.fixture
def slurm(tmp_path):
  """Runs launch/slurm.sh on a command; its exit code, output, and the calls of Slurm's commands."""
  for name, text in TOOLS.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  (tmp_path / "calls").touch()

  def slurm(*command: str, **environ: str) -> tuple[int, str, list[str]]:
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "AT": str(tmp_path)}
    env |= {"SLURM_JOB_ID": "17", "STATE": RUNNING} | environ
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


FAILED = "srun: error: {}: Exited with exit code {}"


@pytest.mark.parametrize(
  ("said", "code", "requeued"),
  [
    ((FAILED.format("n2: task 1", 5), "srun: error: n1: tasks 0,2: Killed"), 5, False),
    ((FAILED.format("n2: tasks 1-3", 2), FAILED.format("n1: task 0", 134)), 2, False),
    (("srun: error: n1: task 0: Aborted", FAILED.format("n2: task 1", 3)), 0, True),
    ((FAILED.format("n1: task 0", 1), FAILED.format("n2: task 1", 2)), 0, True),
  ],
)
def test_the_slurm_process_that_fails_first_decides(slurm, tmp_path, said, code, requeued):
  """srun kills the others, and ends with the largest code, here 137."""
  lines = "\n".join(("step 5", *said, "no newline"))
  (tmp_path / "srun").write_text(f"#!/bin/bash\nprintf %s '{lines}' >&2\nexit 137\n")
  found, out, calls = slurm("run")
  assert (found, calls) == (code, ["scontrol requeue 17"] * requeued)
  assert lines in out


def test_a_slurm_job_gives_up(slurm):
  code, out, calls = slurm("bash", "-c", "exit 7", SLURM_RESTART_COUNT="20")
  assert (code, calls) == (7, [])
  assert "error: exit code 7 after 20 restarts" in out


SAVING = "trap 'echo saved; exit 0' TERM; {}; while sleep 0.1; do :; done"
TO_THE_SCRIPT = "kill -{} $(ps -o ppid= $(ps -o ppid= $PPID))"  # command, srun, subshell, script


@pytest.mark.parametrize(
  ("array", "job"),
  [({}, "17"), ({"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}, "17_3")],
)
def test_a_slurm_job_saves_before_its_time_is_up_and_goes_back_to_the_queue(slurm, array, job):
  """The script gets USR1, the run SIGTERM; an array's last task, whose id is the array's, alone."""
  code, out, calls = slurm("bash", "-c", SAVING.format(TO_THE_SCRIPT.format("USR1")), **array)
  assert code == 0
  assert "saved" in out
  assert calls == [f"scancel --signal=TERM {job}", f"scontrol requeue {job}"]


PREEMPTED = "RUNNING 2026-01-01T00:00:00 None"
ENDING = "COMPLETING N/A None"
OUT_OF_TIME = "COMPLETING N/A TimeLimit"


@pytest.mark.parametrize(
  ("state", "to_script", "code", "requeued"),
  [
    (RUNNING, "", 0, False),
    (PREEMPTED, "", 0, True),  # within its grace time
    (PREEMPTED, "TERM", 0, True),
    (PREEMPTED, "", 2, False),
    (ENDING, "TERM", 0, False),  # cancelled, or requeued by Slurm itself
    (ENDING, "", 1, False),
    (RUNNING, "TERM", 0, False),  # scancel --full --signal=TERM
    (OUT_OF_TIME, "TERM", 0, True),
    (OUT_OF_TIME, "", 0, True),  # the run ended before the script had its own SIGTERM
    ("", "", 1, False),  # no answer
  ],
)
def test_slurm_decides_about_a_job_that_it_stops(slurm, state, to_script, code, requeued):
  signal = TO_THE_SCRIPT.format(to_script) if to_script else ":"
  found, _, calls = slurm("bash", "-c", f"{signal}; exit {code}", STATE=state)
  assert calls == ["scontrol requeue 17"] * requeued
  told = state != RUNNING or to_script
  assert found == (0 if requeued else code or (143 if told else 0))


def test_a_slurm_job_is_preempted_however_often(slurm):
  found, _, calls = slurm("true", STATE=PREEMPTED, SLURM_RESTART_COUNT="99")
  assert (found, calls) == (0, ["scontrol requeue 17"])


@pytest.mark.parametrize(("task", "line"), [("0", "a=0.1,x plain"), ("2", "a=1,z plain")])
def test_a_slurm_array_takes_alternatives(slurm, task, line):
  words = ("echo", "a={0.1|0.3|1},{x|y|z}", "plain")
  assert slurm(*words, SLURM_ARRAY_TASK_ID=task)[:2] == (0, f"{line}\n")


def test_a_slurm_array_with_too_few_alternatives_is_refused(slurm):
  code, out, calls = slurm("echo", "{a|b}", SLURM_ARRAY_TASK_ID="2")
  assert (code, calls) == (2, [])
  assert out == "error: {a|b}: there is no alternative 2\n"


def test_slurm_is_asked_for_time_to_save_and_for_nothing_that_cpu_nodes_lack():
  lines = (LAUNCH / "slurm.sh").read_text().splitlines()
  given = [line.removeprefix("#SBATCH --").partition("=") for line in lines if "#SBATCH" in line]
  flags = {name: value for name, _, value in given}
  assert flags["signal"].startswith("B:USR1@")
  assert {"requeue", "open-mode"} <= set(flags)
  assert not any("gpu" in name or "tasks" in name or "cpus" in name for name in flags)


@pytest.mark.parametrize(
  ("nodes", "gpus", "tasks", "legal"),
  [("2", "8", "8(x2)", True), ("2", "8", "1(x2)", False), ("1", "8", "4", False),
   ("1", "8", "1", True), ("2", "", "1(x2)", True), ("3", "2", "2,2(x2)", True)],
)  # fmt: skip
def test_each_gpu_of_a_slurm_job_has_a_process(slurm, nodes, gpus, tasks, legal):
  """Or a single process has them all."""
  environ = {"SLURM_JOB_NUM_NODES": nodes, "SLURM_TASKS_PER_NODE": tasks}
  environ |= {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
  code, out, _ = slurm("echo", "ran", **environ)
  assert code == (0 if legal else 2)
  assert out == ("ran\n" if legal else out)
  assert legal or ("pass --ntasks-per-node=8" in out and out.count("\n") == 1)


def test_slurm_processes_get_their_cpus(slurm, tmp_path):
  """srun takes --cpus-per-task for itself since Slurm 22.05."""
  (tmp_path / "srun").write_text('#!/bin/bash\necho "srun $*" >>$AT/calls\n')
  assert slurm("run", SLURM_CPUS_PER_TASK="4")[2] == [
    "srun --kill-on-bad-exit=1 --cpus-per-task=4 run"
  ]


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
