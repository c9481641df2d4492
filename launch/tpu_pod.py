"""Requests, describes, deletes and sets up the machines of a Cloud TPU pod, through gcloud."""

import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from launch.supervisor import say
from research.command.errors import fail

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[1]
FOLDER = "distributed-optimization-jax"  # the code's folder in each worker's home folder
GONE = ("SUSPENDING", "SUSPENDED", "FAILED")  # final states of a queued resource
RUNTIMES = {  # software version of the VM, by prefix of the accelerator type
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
  """Reports that a gcloud command failed; the message contains the last line of the output."""


class Pod(NamedTuple):
  """A set of slices that are requested together and preempted together."""

  name: str
  zone: str
  project: str
  slices: int
  dry: bool

  @property
  def nodes(self) -> list[str]:
    """The names of the slices."""
    return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

  def gcloud(self, group: str, *words: str, show: bool = False) -> str:
    """Runs a gcloud command for TPUs; returns the output, or '' in a dry run."""
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
  """Runs a command, or only prints it in a dry run; returns the output unless `show` is set."""
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


def define_flags() -> None:
  """Defines the flags that select the machines and specify how to create them."""
  flags.DEFINE_string("name", "", "Name of the queued resource and its slices.")
  flags.DEFINE_string("zone", "", "Google Cloud zone, such as us-east5-a.")
  flags.DEFINE_string("project", "", "Google Cloud project; empty: gcloud's default.")
  flags.DEFINE_integer("slices", 1, "Number of slices of the pod.", 1)
  flags.DEFINE_string("type", "", "Accelerator type of each slice, such as v5p-128.")
  flags.DEFINE_string("runtime", "", "Software version of the VMs; empty: the default of the type.")
  flags.DEFINE_bool("spot", False, "Requests machines that may be preempted.")
  flags.DEFINE_string("prepare", "", "Shell command that `setup` runs last on each worker.")
  flags.DEFINE_float(
    "poll_seconds", 30.0, "Seconds between two checks of the machines and the job.", 0.0
  )
  flags.DEFINE_bool("dry_run", False, "Prints the commands without running them.")


def pod_of_flags() -> Pod:
  """Returns the pod that the flags describe; a missing flag ends the program."""
  for name in ("name", "zone"):
    if not getattr(FLAGS, name):
      fail(2, f"--{name}='': required")
  return Pod(FLAGS.name, FLAGS.zone, FLAGS.project, FLAGS.slices, FLAGS.dry_run)


def create(pod: Pod, line: Sequence[str]) -> int:
  """Requests the slices, and waits until the slices are active."""
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
  """Returns the runtime from the flag, or the default for the accelerator type."""
  if not FLAGS.type:
    such = ", ".join(f"{kind}8" for kind in RUNTIMES)
    fail(2, f"--type='': required, such as {such}")
  found = FLAGS.runtime or next((v for k, v in RUNTIMES.items() if FLAGS.type.startswith(k)), "")
  if not found:
    known = ", ".join(f"{k}N" for k in RUNTIMES)
    hint = f"legal: {known}, or others with --runtime"
    fail(2, f"--type='{FLAGS.type}': unknown; {hint}")
  return found


def state_of(pod: Pod) -> str:
  """Returns the pod's state, such as PROVISIONING, ACTIVE or SUSPENDED; ACTIVE in a dry run."""
  found = pod.gcloud("queued-resources", "describe", pod.name, "--format=value(state.state)")
  return "ACTIVE" if pod.dry else found.strip()


def delete(pod: Pod, line: Sequence[str] = ()) -> int:
  """Deletes the slices and the queued resource of the pod."""
  del line
  pod.gcloud("queued-resources", "delete", pod.name, "--force", "--quiet")
  return 0


# ---- the code


def setup(pod: Pod, line: Sequence[str] = ()) -> int:
  """Copies all files that git does not ignore to all workers, and installs the code."""
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
