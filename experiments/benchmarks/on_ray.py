"""Trains with a parameter server, with a Ray node on every host and run.py on the first host.

    python experiments/benchmarks/on_ray.py --executor=server --workers=2 --out=FOLDER ...

A launcher starts one process per host; the flags are those of run.py. The first host runs the
server and one worker, and each other host runs one worker. Process 0 prints a JSON line: the bytes
per step that all hosts together sent between the first and the last row of metrics, without
headers.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from research.comm import counters

RUN = Path(__file__).parents[1] / "run.py"


@contextlib.contextmanager
def node(*flags: str) -> Iterator[None]:
  """Context manager that runs a Ray node on this host."""
  ray = str(Path(sys.executable).parent / "ray")
  line = [ray, "start", *flags, "--block", "--disable-usage-stats"]
  line.append("--object-store-memory=500000000")
  process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
  try:
    yield
  finally:
    process.terminate()
    process.wait()


def connected(host: str, port: int) -> socket.socket:
  """Connects to a port that may not be open yet."""
  while True:
    try:
      return socket.create_connection((host, port))
    except OSError:
      time.sleep(0.1)


def first(address: str, port: int, others: int, flags: list[str]) -> None:
  """Starts Ray's head node and the run; the other hosts end after the run."""
  head = ["--head", f"--node-ip-address={address}", f"--port={port + 1}", "--num-cpus=2"]
  with socket.create_server((address, port)) as ending, node(*head, "--include-dashboard=false"):
    connected(address, port + 1).close()
    peers = [ending.accept()[0] for _ in range(others)]
    try:
      print(json.dumps({"bytes": trained(f"{address}:{port + 1}", flags)}), flush=True)
    finally:
      for peer in peers:
        peer.close()


def other(address: str, head: str, port: int) -> None:
  """Joins Ray's head node, and waits until the first host's run has ended."""
  connected(head, port + 1).close()
  with (
    node(f"--address={head}:{port + 1}", f"--node-ip-address={address}", "--num-cpus=1"),
    connected(head, port) as run,
  ):
    run.recv(1)


def trained(ray: str, flags: list[str]) -> float:
  """Runs run.py on the Ray nodes; returns the bytes per step."""
  (out,) = [flag.partition("=")[2] for flag in flags if flag.startswith("--out=")]
  rows, kernel = Path(out) / "metrics.jsonl", counters.told(os.environ)
  assert kernel
  joining = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  environ = {name: value for name, value in os.environ.items() if name not in joining}
  line = [sys.executable, str(RUN), *flags, f"--ray_address={ray}"]
  process = subprocess.Popen(line, env=environ)
  begun, before = 0, np.zeros(())
  while process.poll() is None:
    time.sleep(0.02)
    if not begun and (begun := last_step(rows)):
      before = kernel.read()
  if process.returncode:
    sys.exit(process.returncode)
  sent = counters.per_step(kernel.read() - before, last_step(rows) - begun)
  return sum(host["tx_payload_bytes"] for host in sent)


def last_step(rows: Path) -> int:
  """Returns the step of the last row of metrics; 0 without a row."""
  if not rows.exists():
    return 0
  whole = rows.read_text().rpartition("\n")[0]
  return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def main(flags: list[str]) -> None:
  """Runs this host's part of the job."""
  host, _, port = os.environ["JAX_COORDINATOR_ADDRESS"].partition(":")
  here, count = (int(os.environ[f"JAX_{name}"]) for name in ("PROCESS_ID", "NUM_PROCESSES"))
  own = socket.gethostbyname(socket.gethostname())
  if here == 0:
    first(own, int(port), count - 1, flags)
  else:
    other(own, host, int(port))


if __name__ == "__main__":
  main(sys.argv[1:])
