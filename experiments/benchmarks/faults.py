"""Kills processes of a job on several hosts at random; compares it with an undisturbed run.

This is bench.py's suite faults. The hosts are network namespaces (launch/netlab.py).
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks.hosts import ended, flags_of, netlab, run, tell
from research.core.spec import calls


def faults(hosts: int, kills: int, every: float, steps: int) -> dict[str, Any]:
  """Kills processes of random hosts at random times; compares the run with an undisturbed run.

  Args:
    hosts: the number of hosts.
    kills: the number of processes to kill.
    every: the mean time in seconds between kills.
    steps: the number of steps; the run must not end before the last kill.
  """
  sgd = calls.sgd(calls.cosine_decay_schedule(0.1, steps), momentum=0.9)
  link = calls.error_feedback(calls.two_phase(calls.int8()))
  config = {
    "method": str(calls.data_parallel(sgd, link)),
    "executor": "spmd",
    "mesh": f"data:{hosts}",
    "steps": steps,
    "steps_per_dispatch": 25,
    "eval_every": 0,
    "check_every": 0,
    "checkpoint_every": 50,
    "checkpoint_seconds": 0,
  }
  spaces = _namespaces()
  with tempfile.TemporaryDirectory() as folder:
    whole = Path(folder) / "whole"
    line = lambda out: ["run.py", *flags_of(config | {"out": out})]
    run(netlab(hosts, [f"--logs={folder}/calm"], line(whole)))
    broken = Path(folder) / "broken"
    launcher = [f"--kills={kills}", f"--kill_every={every}", f"--restarts={2 * kills}"]
    found = _disturbed(netlab(hosts, [*launcher, f"--logs={folder}/logs"], line(broken)), broken)
    same = lambda name: name(whole) == name(broken)
    return found | {
      "hosts": hosts,
      "steps": steps,
      "spec": config["method"],
      "same_params": same(_params),
      "same_rows": same(_steps),
      "processes_left": processes(str(broken)),
      "namespaces_left": _namespaces() - spaces,
    }


def _params(out: Path) -> str:
  return json.loads((out / "summary.json").read_text())["params_sha256"]


def _steps(out: Path) -> list[int]:
  """Reads the steps of the rows of metrics."""
  return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def _disturbed(command: list[str], out: Path) -> dict[str, Any]:
  """Watches a run whose processes are killed; counts kills, restarts and lost steps.

  Raises:
    RuntimeError: if the run fails.
  """
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  killed = resumed = restarts = lost = saved = 0
  with subprocess.Popen(command, **pipes) as process, ended(process):
    for line in process.stdout or ():
      if "launch: killing process" in line:
        killed += 1
        saved = max([saved, *_whole(out / "checkpoints")])
      elif "launch: restart" in line:
        restarts += 1
      elif "] resuming at step" in line:
        resumed += 1
        lost += int(line.split()[-1]) < saved
        tell(f"after {killed} kills and {restarts} restarts at step {line.split()[-1]}")
  if process.returncode:
    raise RuntimeError(f"the run with {killed} kills ended with exit code {process.returncode}")
  return {
    "kills": killed,
    "restarts": restarts,
    "resumed": resumed,
    "resumed_before_the_last_checkpoint": lost,
  }


def _whole(folder: Path) -> Iterator[int]:
  """Yields the steps of the checkpoints that are complete at this moment."""
  for path in folder.glob("*/files.json"):
    if path.parent.name.isdecimal():
      yield int(path.parent.name)


def _namespaces() -> int:
  """Counts the network namespaces on this machine."""
  line = ["lsns", "--type", "net", "--noheadings"]
  return len(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines())


def processes(word: str) -> int:
  """Counts the processes whose command line contains a word."""
  found = 0
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
      found += word in path.read_text()
    except OSError:
      continue
  return found


def faults_table(found: dict[str, Any]) -> list[str]:
  """Formats the Markdown table of kills, restarts and their effect on a run."""
  names = ("hosts", "steps", "kills", "restarts", "resumed", "same_params", "same_rows")
  names = (*names, "resumed_before_the_last_checkpoint", "processes_left", "namespaces_left")
  shown = lambda value: (
    {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:,}"
  )
  lines = ["| | |", "|---|---|"]
  return lines + [f"| {name.replace('_', ' ')} | {shown(found[name])} |" for name in names]
