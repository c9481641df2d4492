"""Runs on_links.py on simulated hosts of one core each, and changes the links when it asks for it.

    python experiments/benchmarks/changing.py HOSTS JSON

The hosts are network namespaces (launch/netlab.py). The program prints the JSON of each cell.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from launch import command, netlab
from launch.watchman import dies_with_parent

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "experiments" / "benchmarks" / "on_links.py"
BURST = "256kb"


def measure(hosts: int, asked: str) -> None:
  """Runs the job between `hosts` hosts, and prints its cells.

  Args:
    hosts: the number of hosts.
    asked: the argument of on_links.py.

  Raises:
    RuntimeError: if a process of the job fails.
  """
  first_link = json.loads(asked)["links"][0]
  with (
    tempfile.TemporaryDirectory() as logs,
    netlab.network([netlab.ShapedLink(first_link, BURST)] * hosts) as lab,
  ):
    processes = _started(lab, asked, Path(logs))
    first = processes[0]
    assert first.stdin
    assert first.stdout
    for said in first.stdout:
      kind, _, rest = said.strip().partition(" ")
      if kind == "link":
        _change(lab, rest)
        first.stdin.write("\n")
        first.stdin.flush()
      elif kind == "cell":
        print(rest, flush=True)
    codes = [process.wait() for process in processes]
    if any(codes):
      text = "\n".join(path.read_text()[-2000:] for path in sorted(Path(logs).iterdir()))
      raise RuntimeError(f"a host's process failed:\n{text}")


def _started(lab: netlab.Lab, asked: str, logs: Path) -> list[subprocess.Popen[str]]:
  """Starts one process per host; the first can be written to and read from."""
  address = f"{lab.hosts[0].address}:21000"
  cores, found = sorted(os.sched_getaffinity(0)), []
  for number, host in enumerate(lab.hosts):
    environ = command.environment(address, number, len(lab.hosts))
    pinned = ["taskset", "--cpu-list", str(cores[number % len(cores)])]
    with (logs / str(number)).open("w") as log:
      found.append(
        subprocess.Popen(
          host.command([*pinned, sys.executable, str(PROGRAM), asked]),
          stdin=subprocess.PIPE if number == 0 else subprocess.DEVNULL,
          stdout=subprocess.PIPE if number == 0 else log,
          stderr=log,
          text=True,
          env=environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
          preexec_fn=dies_with_parent(),
        )
      )
  return found


def _change(lab: netlab.Lab, rate: str) -> None:
  """Changes the rate of both directions of every host's link."""
  ends = [(host.holder, netlab.LINK) for host in lab.hosts]
  ends += [(lab.switch, f"port{number}") for number in range(len(lab.hosts))]
  for holder, device in ends:
    enter = ["nsenter", f"--target={holder}", "--net", "--"]
    shape = f"qdisc change dev {device} root tbf rate {rate} burst {BURST} latency 100ms"
    subprocess.run([*enter, "tc", *shape.split()], check=True)


if __name__ == "__main__":
  measure(int(sys.argv[1]), sys.argv[2])
