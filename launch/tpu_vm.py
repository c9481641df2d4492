"""Runs a job on the Cloud TPU VMs of one or several slices, through gcloud.

    python launch/tpu_vm.py create --name=pod --zone=us-east5-a --type=v5p-128 --spot
    python launch/tpu_vm.py setup  --name=pod --zone=us-east5-a
    python launch/tpu_vm.py run    --name=pod --zone=us-east5-a --until_finished -- \\
        python experiments/run.py --executor=spmd --mesh=data:8,fsdp:8 --out=shared/runs/first
    python launch/tpu_vm.py status|logs|kill|delete --name=pod --zone=us-east5-a

`create` requests a queued resource and waits until the machines are ready. `setup` copies the code
to every worker of every slice and installs it. `run` starts the command on all workers, detached
from the terminal. With --until_finished, `run` waits until the command has ended with exit code 0
on all workers. If the command is lost, `run` restarts it, after a preemption on new machines. --out
must be on storage that all workers share; --prepare is the command that mounts this storage.
--dry_run prints the commands without running them.
"""

import contextlib
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from absl import flags

from launch import tpu_pod
from launch.supervisor import FINAL, say
from launch.tpu_pod import GONE, Failed, Pod, create, delete, setup, state_of
from research.command.errors import fail
from research.command.flags import launch

FLAGS = flags.FLAGS


def run(pod: Pod, line: Sequence[str]) -> int:
  """Starts the command on all workers; with --until_finished, waits until the job has finished."""
  if FLAGS.until_finished and not pod.dry and running(pod):
    say("the job is already running; waiting for it")
  else:
    start(pod, line)
  return wait(pod, line) if FLAGS.until_finished else 0


def start(pod: Pod, line: Sequence[str]) -> None:
  """Starts the command on all workers, detached from the terminal."""
  words = shlex.join(["env", *FLAGS.environ, *line] if FLAGS.environ else line)
  pod.on_workers(f'PATH="$PWD/.venv/bin:$PATH" bash launch/detached.sh start {words}')


def wait(pod: Pod, line: Sequence[str]) -> int:
  """Polls the job, restarts a lost job, and returns the exit code."""
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
  """Polls the job; returns (code, '') when it has finished, or (None, reason) when it is lost."""
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
      say(f"the job ended with exit code {final[0]}; a restart would end in the same way")
      return final[0], ""
    bad = [status for status in found if status in ("lost", "not started")]
    bad += [f"ended {code}" for code in ended if code]
    if bad:
      return (
        None,
        f"{len(bad)} of {len(found)} workers do not run the job; the first says '{bad[0]}'",
      )
    time.sleep(FLAGS.poll_seconds)


def again(pod: Pod, line: Sequence[str]) -> None:
  """Restarts a lost job, on new machines if the old machines are gone."""
  if state_of(pod) in GONE:
    delete(pod)
    create(pod, line)
    setup(pod)
  else:
    kill(pod)
  start(pod, line)


def statuses(pod: Pod) -> list[str]:
  """Returns the output of `launch/detached.sh status` from each worker."""
  shown = pod.on_workers('echo "$(hostname): $(bash launch/detached.sh status)"')
  return re.findall(r"^\S+: (running \d+|ended \d+|lost|not started)$", shown, re.MULTILINE)


def running(pod: Pod) -> bool:
  return any(status.startswith("running") for status in statuses(pod))


def status(pod: Pod, line: Sequence[str]) -> int:
  """Prints the state of the machines, and the state of the job on each worker."""
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
  """Makes the job save and stop, and kills a job that is still running after the grace period."""
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
  """Defines the flags; all flags except --name and --zone have defaults."""
  tpu_pod.define_flags()
  flags.DEFINE_list("environ", [], "Environment variables of the job, NAME=VALUE,...")
  text = "Waits until the job has ended with 0 on all workers, and restarts a lost job."
  flags.DEFINE_bool("until_finished", False, text)
  flags.DEFINE_integer("restarts", 100, "Maximum number of restarts with --until_finished.", 0)
  flags.DEFINE_integer("lines", 100, "Number of lines of each worker's log.", 1)
  flags.DEFINE_bool("follow", False, "Also prints new lines of the logs; only for a single slice.")
  flags.DEFINE_integer("grace_seconds", 60, "Seconds between SIGTERM and SIGKILL.", 0)


def main(action: str, line: Sequence[str]) -> int:
  """Runs an action; returns the exit code."""
  pod = tpu_pod.pod_of_flags()
  if action == "run" and not line:
    fail(2, "no command to run: tpu_vm.py run FLAGS -- python SCRIPT FLAGS")
  if FLAGS.follow and FLAGS.slices > 1:
    fail(2, f"--follow works for a single slice, not for --slices={FLAGS.slices}")
  if not FLAGS.dry_run and not shutil.which("gcloud"):
    fail(2, "gcloud not found: install the Google Cloud CLI, or use --dry_run")
  try:
    return ACTIONS[action](pod, line)
  except Failed as error:
    fail(1, str(error))
  except KeyboardInterrupt:
    fail(130, "interrupted; what runs in the cloud keeps running")


if __name__ == "__main__":
  define_flags()
  argv = sys.argv
  at = argv.index("--") if "--" in argv else len(argv)
  own, after = argv[:at], argv[at + 1 :]
  if len(own) < 2 or own[1] not in ACTIONS:
    if not {"--help", "-help", "-h"} & set(own):
      given = own[1] if len(own) > 1 else ""
      fail(2, f"unknown action '{given}'; legal: {', '.join(ACTIONS)}")
  else:
    action = own.pop(1)
  launch(lambda _: sys.exit(main(action, after)), __doc__, own)
