"""Runs a job on Cloud TPU VMs, of one slice or several, through gcloud.

    python launch/tpu_vm.py create --name=pod --zone=us-east5-a --type=v5p-128 --spot
    python launch/tpu_vm.py setup  --name=pod --zone=us-east5-a
    python launch/tpu_vm.py run    --name=pod --zone=us-east5-a --until_finished -- \\
        python experiments/run.py --executor=spmd --mesh=data:8,fsdp:8 --out=shared/runs/first
    python launch/tpu_vm.py status|logs|kill|delete --name=pod --zone=us-east5-a

`create` requests a queued resource and waits for it; `setup` copies the code to every worker of
every slice and installs it; `run` starts the command on all of them, detached, so that it survives
the terminal. With --until_finished it waits, and restarts the command, on new machines if the old
ones were preempted, until it has ended with 0 on all workers. --out must be on storage that all
workers share: --prepare mounts it. --dry_run prints the commands and runs none.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from launch.supervisor import FINAL, say
from research.command.errors import fail
from research.command.flags import launch

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[1]
FOLDER = "distributed-optimization-jax"  # of the code, in each worker's home
GONE = ("SUSPENDING", "SUSPENDED", "FAILED")  # final states of a queued resource
RUNTIMES = {  # of the software on the VM, by prefix of the accelerator type
  "v4-": "tpu-ubuntu2204-base",
  "v5litepod-": "v2-alpha-tpuv5-lite",
  "v5p-": "v2-alpha-tpuv5",
  "v6e-": "v2-alpha-tpuv6e",
}
INSTALL = (
  "python3 -m pip install --quiet --user uv && "
  "python3 -m uv venv --quiet --allow-existing --python 3.12 .venv && "
  "python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
)


class Failed(Exception):
  """A gcloud command failed; the message has its last line."""


class Pod(NamedTuple):
  """Slices that are requested, and preempted, together."""

  name: str
  zone: str
  project: str
  slices: int
  dry: bool

  @property
  def nodes(self) -> list[str]:
    """The slices' names."""
    return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

  def gcloud(self, group: str, *words: str, show: bool = False) -> str:
    """Runs a gcloud command on TPUs; returns its output, or '' in a dry run."""
    place = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
    return execute(["gcloud", "compute", "tpus", group, *words, *place], self.dry, show)

  def on_workers(self, line: str, show: bool = False) -> str:
    """Runs a shell command in the code's folder on all workers, slice by slice."""
    inside = f"cd {FOLDER} && {line}"
    ssh = lambda node: self.gcloud(
      "tpu-vm", "ssh", node, "--worker=all", f"--command={inside}", show=show
    )
    return "".join(ssh(node) for node in self.nodes)


def execute(words: Sequence[str], dry: bool, show: bool) -> str:
  """Runs a command, or prints it in a dry run; returns its output, unless it is shown live."""
  if dry:
    print(shlex.join(words))
    return ""
  if show:
    subprocess.run(words, check=False)
    return ""
  ended = subprocess.run(words, capture_output=True, text=True)
  if ended.returncode:
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    raise Failed(f"{shlex.join(words[:5])}: {lines[-1]}")
  return ended.stdout


# ---- the machines


def create(pod: Pod, line: Sequence[str]) -> int:
  """Requests the slices, and waits until they are active."""
  del line
  nodes = [f"--node-id={pod.name}"]
  if pod.slices > 1:
    nodes = [f"--node-count={pod.slices}", f"--node-prefix={pod.name}"]
  spot = ["--spot"] * FLAGS.spot
  kind = [f"--accelerator-type={FLAGS.type}", f"--runtime-version={runtime()}"]
  pod.gcloud("queued-resources", "create", pod.name, *nodes, *kind, *spot, "--quiet")
  while True:
    state = state_of(pod)
    if state == "ACTIVE":
      return 0
    if state in GONE:
      raise Failed(f"the request for {pod.name} is {state}; 'delete' removes it")
    say(f"{pod.name} is {state}")
    time.sleep(FLAGS.poll_seconds)


def runtime() -> str:
  """The runtime of the flag, or the default for the accelerator type."""
  if not FLAGS.type:
    such = ", ".join(f"{kind}8" for kind in RUNTIMES)
    fail(2, f"--type='': what to create, such as {such}")
  found = FLAGS.runtime or next((v for k, v in RUNTIMES.items() if FLAGS.type.startswith(k)), "")
  if not found:
    known = ", ".join(f"{k}N" for k in RUNTIMES)
    hint = f"legal: {known}, or others with --runtime"
    fail(2, f"--type='{FLAGS.type}': unknown; {hint}")
  return found


def state_of(pod: Pod) -> str:
  """WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, ...; in a dry run ACTIVE."""
  found = pod.gcloud("queued-resources", "describe", pod.name, "--format=value(state.state)")
  return "ACTIVE" if pod.dry else found.strip()


def delete(pod: Pod, line: Sequence[str] = ()) -> int:
  """Deletes the slices, and the request for them."""
  del line
  pod.gcloud("queued-resources", "delete", pod.name, "--force", "--quiet")
  return 0


# ---- the code


def setup(pod: Pod, line: Sequence[str] = ()) -> int:
  """Copies the files that git tracks or does not ignore to all workers, and installs them."""
  del line
  with tempfile.TemporaryDirectory() as folder:
    archive = "/tmp/code.tar.gz" if pod.dry else f"{folder}/code.tar.gz"
    listed = "git ls-files -z --cached --others --exclude-standard"
    pack = f"cd {shlex.quote(str(ROOT))} && {listed} | tar -czf {archive} --null -T -"
    execute(["bash", "-o", "pipefail", "-c", pack], pod.dry, False)
    for node in pod.nodes:
      pod.gcloud("tpu-vm", "scp", archive, f"{node}:{FOLDER}.tar.gz", "--worker=all")
      unpack = f"mkdir -p {FOLDER} && tar -xzf {FOLDER}.tar.gz -C {FOLDER}"
      pod.gcloud("tpu-vm", "ssh", node, "--worker=all", f"--command={unpack}")
  pod.on_workers(INSTALL)
  if FLAGS.prepare:
    pod.on_workers(FLAGS.prepare)
  return 0


# ---- the job


def run(pod: Pod, line: Sequence[str]) -> int:
  """Starts the command on all workers; with --until_finished waits until it has finished."""
  if FLAGS.until_finished and not pod.dry and running(pod):
    say("the job runs already; waiting for it")
  else:
    start(pod, line)
  return wait(pod, line) if FLAGS.until_finished else 0


def start(pod: Pod, line: Sequence[str]) -> None:
  """Starts the command on all workers, detached."""
  words = shlex.join(["env", *FLAGS.environ, *line] if FLAGS.environ else line)
  pod.on_workers(f'PATH="$PWD/.venv/bin:$PATH" bash launch/detached.sh start {words}')


def wait(pod: Pod, line: Sequence[str]) -> int:
  """Polls the job and restarts it if it was lost; returns its exit code."""
  for restart in range(FLAGS.restarts + 1):
    code, why = watch(pod)
    if code is not None:
      return code
    if restart == FLAGS.restarts:
      break
    say(f"{why}; restart {restart + 1} of {FLAGS.restarts}")
    again(pod, line)
  say(f"{why}; no restarts are left")
  return 1


def watch(pod: Pod) -> tuple[int | None, str]:
  """Polls until the job has finished (its code, '') or is lost (None, the reason)."""
  while True:
    state = state_of(pod)
    if state in GONE:
      return None, f"{pod.name} is {state}"
    found = []
    with contextlib.suppress(Failed):  # machines may be disappearing
      found = statuses(pod)
    if pod.dry or (found and all(status == "ended 0" for status in found)):
      return 0, ""
    ended = [int(status.split()[1]) for status in found if status.startswith("ended")]
    if final := [code for code in ended if code in FINAL]:
      say(f"the job ended with exit code {final[0]}, as it would again")
      return final[0], ""
    bad = [status for status in found if status in ("lost", "not started")]
    bad += [f"ended {code}" for code in ended if code]
    if bad:
      return None, f"of {len(found)} workers {len(bad)} are without the job, one has '{bad[0]}'"
    time.sleep(FLAGS.poll_seconds)


def again(pod: Pod, line: Sequence[str]) -> None:
  """Restarts a lost job, on new machines if the old ones are gone."""
  if state_of(pod) in GONE:
    delete(pod)
    create(pod, line)
    setup(pod)
  else:
    kill(pod)
  start(pod, line)


def statuses(pod: Pod) -> list[str]:
  """The output of `launch/detached.sh status` on each worker."""
  shown = pod.on_workers('echo "$(hostname): $(bash launch/detached.sh status)"')
  return re.findall(r"^\S+: (running \d+|ended \d+|lost|not started)$", shown, re.MULTILINE)


def running(pod: Pod) -> bool:
  return any(status.startswith("running") for status in statuses(pod))


def status(pod: Pod, line: Sequence[str]) -> int:
  """Prints the state of the machines, and of the job on each worker."""
  del line
  state = state_of(pod)
  if not pod.dry:
    print(f"{pod.name}: {state}", flush=True)
  if state == "ACTIVE":
    pod.on_workers('echo "$(hostname): $(bash launch/detached.sh status)"', show=True)
  return 0


def logs(pod: Pod, line: Sequence[str]) -> int:
  """Prints the end of each worker's log, with the host's name before each line."""
  del line
  follow = " follow" if FLAGS.follow else ""
  tail = f'bash launch/detached.sh logs {FLAGS.lines}{follow} | sed -u "s/^/[$(hostname)] /"'
  pod.on_workers(tail, show=True)
  return 0


def kill(pod: Pod, line: Sequence[str] = ()) -> int:
  """Lets the job save and stop, and kills it after the grace period."""
  del line
  pod.on_workers(f"bash launch/detached.sh kill {FLAGS.grace_seconds}")
  return 0


ACTIONS: dict[str, Callable[[Pod, Sequence[str]], int]] = {
  "create": create,
  "setup": setup,
  "run": run,
  "status": status,
  "logs": logs,
  "kill": kill,
  "delete": delete,
}


def define_flags() -> None:
  """Defines the flags; all but --name and --zone have defaults."""
  flags.DEFINE_string("name", "", "Of the queued resource and its slices.")
  flags.DEFINE_string("zone", "", "Google Cloud's, such as us-east5-a.")
  flags.DEFINE_string("project", "", "Google Cloud's; empty: gcloud's own.")
  flags.DEFINE_integer("slices", 1, "How many slices make the pod.", 1)
  flags.DEFINE_string("type", "", "Of each slice, such as v5p-128.")
  flags.DEFINE_string("runtime", "", "The VM's software; empty: that of the type.")
  flags.DEFINE_bool("spot", False, "Machines that may be preempted.")
  flags.DEFINE_string("prepare", "", "A shell command that `setup` runs on each worker at its end.")
  text = "Variables of the job, NAME=VALUE,..."
  flags.DEFINE_list("environ", [], text)
  text = "Stays, and starts the job again, until it has ended with 0 on all workers."
  flags.DEFINE_bool("until_finished", False, text)
  flags.DEFINE_integer("restarts", 100, "With --until_finished, at most so many.", 0)
  flags.DEFINE_integer("lines", 100, "Of each worker's log.", 1)
  flags.DEFINE_bool("follow", False, "Shows what is added to the logs, too; of one slice.")
  flags.DEFINE_integer("grace_seconds", 60, "Between SIGTERM and SIGKILL.", 0)
  flags.DEFINE_float("poll_seconds", 30.0, "Between looks at the machines and the job.", 0.0)
  flags.DEFINE_bool("dry_run", False, "Prints the commands and runs none.")


def main(action: str, line: Sequence[str]) -> int:
  """Runs an action; returns its exit code."""
  for name in ("name", "zone"):
    if not getattr(FLAGS, name):
      fail(2, f"--{name}='': which TPU is meant")
  if action == "run" and not line:
    fail(2, "what to run comes after --: tpu_vm.py run FLAGS -- python SCRIPT FLAGS")
  if FLAGS.follow and FLAGS.slices > 1:
    fail(2, f"--follow: of one slice, and --slices={FLAGS.slices}")
  if not FLAGS.dry_run and not shutil.which("gcloud"):
    fail(2, "there is no gcloud: install the Google Cloud CLI, or take --dry_run")
  pod = Pod(FLAGS.name, FLAGS.zone, FLAGS.project, FLAGS.slices, FLAGS.dry_run)
  try:
    return ACTIONS[action](pod, line)
  except Failed as error:
    fail(1, str(error))
  except KeyboardInterrupt:
    fail(130, "interrupted; what was started goes on")


if __name__ == "__main__":
  define_flags()
  argv = sys.argv
  at = argv.index("--") if "--" in argv else len(argv)
  own, after = argv[:at], argv[at + 1 :]
  if len(own) < 2 or own[1] not in ACTIONS:
    if not {"--help", "-help", "-h"} & set(own):
      given = own[1] if len(own) > 1 else ""
      fail(2, f"'{given}': not what can be done; legal: {', '.join(ACTIONS)}")
  else:
    action = own.pop(1)
  launch(lambda _: sys.exit(main(action, after)), __doc__, own)
