"""Hosts on one machine: networks of their own, shaped, counted, and gone with their launcher."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch import netlab
from research.comm import counters

ROOT = Path(__file__).parents[2]
NETLAB = ROOT / "launch" / "netlab.py"
RUN = ROOT / "experiments" / "run.py"
TIMEOUT = 120
lacking = [tool for tool in netlab.TOOLS if not shutil.which(tool)]
rooted = pytest.mark.skipif(
  not sys.platform.startswith("linux") or os.geteuid() != 0 or bool(lacking),
  reason=f"network namespaces need Linux, root and {', '.join(netlab.TOOLS)}",
)


def start(folder: Path, *flags: str, line: tuple[str, ...]) -> subprocess.Popen[str]:
  command = [sys.executable, str(NETLAB), f"--logs={folder / 'logs'}", *flags, "--", *line]
  env = os.environ | {"AT": str(folder)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def lines_of(folder: Path, *flags: str, program: str) -> list[str]:
  """What a Python program prints on each host."""
  process = start(folder, *flags, line=("python", "-c", program))
  out, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 0, err
  return sorted(out.splitlines())


def wait_for(condition: Callable[[], object]) -> None:
  until = time.monotonic() + TIMEOUT
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.02)


@rooted
def test_each_host_has_a_network_an_address_and_a_name_of_its_own(tmp_path):
  program = """
import os, pathlib, socket
name = socket.gethostname()
lines = pathlib.Path("/proc/self/net/dev").read_text().splitlines()
links = sorted(line.split(":")[0].strip() for line in lines if ":" in line)
print(name, socket.gethostbyname(name), *links, os.readlink("/proc/self/ns/net"))
"""
  lines = lines_of(tmp_path, "--hosts=3", program=program)
  words = [line.split() for line in lines]
  assert [found[:5] for found in words] == [
    [f"[{i}]", f"10.77.0.{i + 1}", f"10.77.0.{i + 1}", "eth0", "lo"] for i in range(3)
  ]
  spaces = {found[-1] for found in words}
  assert len(spaces) == 3
  assert str(Path("/proc/self/ns/net").readlink()) not in spaces


# The kernel's list of shaped links on each host and on the switch, and who held them.
LINKS = """
import json, subprocess
from launch import netlab
def rates(holder):
  command = ["nsenter", f"--target={holder}", "--net", "tc", "-json", "qdisc", "show"]
  found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
  return {one["dev"]: one["options"]["rate"] for one in found if one["kind"] == "tbf"}
shapes = [("100mbit", "256kb"), ("8mbit", "32kb"), ("", "")]
with netlab.network([netlab.ShapedLink(*shape) for shape in shapes]) as (switch, hosts):
  holders = [switch, *(host.holder for host in hosts)]
  print(json.dumps([holders, [rates(holder) for holder in holders]]))
"""


@rooted
def test_links_have_their_rates_in_both_directions():
  command = [sys.executable, "-c", LINKS]
  ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
  holders, (switch, *hosts) = json.loads(ended.stdout)
  assert hosts == [{"eth0": 12_500_000}, {"eth0": 1_000_000}, {}]
  assert switch == {"port0": 12_500_000, "port1": 1_000_000}
  assert not any(Path(f"/proc/{pid}").exists() for pid in holders)


# Process 1 sends a megabyte to process 0, and both tell what the kernel has counted for all hosts.
SEND = """
import os, pathlib, socket, sys, time
from research.comm import counters
host, port = os.environ["JAX_COORDINATOR_ADDRESS"].split(":")
kernel = counters.told(os.environ)
before = kernel.read()
if os.environ["JAX_PROCESS_ID"] == "0":
  peer, _ = socket.create_server((host, int(port))).accept()
  while peer.recv(1 << 16):
    pass
  peer.close()
else:
  while True:
    try:
      peer = socket.create_connection((host, int(port)))
      break
    except OSError:
      time.sleep(0.05)
  peer.sendall(bytes(1_000_000))
  peer.shutdown(socket.SHUT_WR)
  peer.recv(1)  # returns when the other one has closed
  print((kernel.read() - before).tolist())
"""


@rooted
def test_the_kernel_counts_what_crosses_the_links(tmp_path):
  (line,) = lines_of(tmp_path, "--hosts=2", program=SEND)
  counted = np.array(json.loads(line.removeprefix("[1] ")))
  receiver, sender = counters.per_step(counted, 1)
  assert sender["tx_payload_bytes"] == pytest.approx(1_000_000, rel=0.01)
  assert receiver["rx_bytes"] == pytest.approx(sender["tx_bytes"], rel=0.01)
  assert receiver["tx_payload_bytes"] < 10_000


@rooted
def test_nothing_is_left_where_the_launcher_is_killed(tmp_path):
  program = """
import os, pathlib, time
me = os.environ["JAX_PROCESS_ID"]
(pathlib.Path(os.environ["AT"]) / f"pid{me}").write_text(os.readlink("/proc/self/ns/net") + "\\n")
time.sleep(1000)
"""
  process = start(tmp_path, "--hosts=2", "--rate=1gbit", line=("python", "-c", program))
  found = lambda: [p.read_text().strip() for p in tmp_path.glob("pid*") if p.read_text()]
  wait_for(lambda: len(found()) == 2)
  spaces = set(found())
  assert spaces <= namespaces()
  process.kill()
  process.communicate()
  wait_for(lambda: not spaces & namespaces())


def namespaces() -> set[str]:
  """The network namespaces that some process is in."""
  found = set()
  for path in Path("/proc").glob("[0-9]*/ns/net"):
    try:
      found.add(str(path.readlink()))
    except OSError:
      continue
  return found


@pytest.mark.slow
@rooted
def test_a_run_sends_what_was_predicted(tmp_path):
  """Of a compressed exchange between two hosts, the kernel's bytes within 5% of those of `wire`."""
  job = (
    "--task=least_squares(features=200)",
    "--model=mlp(hidden=[500])",
    "--method=data_parallel(sgd(0.01), error_feedback(two_phase(int8())))",
    "--executor=spmd",
    "--mesh=data:2",
    "--batch_size=100",
    "--steps=60",
    "--steps_per_dispatch=20",
    "--log_every=20",
    "--eval_every=0",
    "--out=out",
  )
  process = start(tmp_path, "--hosts=2", line=("python", str(RUN), *job))
  _, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 0, err
  wire = json.loads((tmp_path / "out" / "summary.json").read_text())["wire"]
  per_step = sum(wire["bytes_per_step_per_worker"].values())
  per_step += sum(wire["metrics_bytes_per_step_per_worker"].values())
  kernel = wire["kernel_bytes_per_step_per_host"]
  assert len(kernel) == 2
  for host in kernel:
    assert host["tx_payload_bytes"] == pytest.approx(per_step, rel=0.05)
    assert 0 < host["tx_payload_bytes"] < host["tx_bytes"]
  rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
  counted = [row["kernel_tx_bytes"] for row in rows if "kernel_tx_bytes" in row]
  # all dispatches but the first, in the row before the evaluation
  assert counted == [[round(40 * host["tx_bytes"]) for host in kernel]]


def test_kills_are_as_many_as_asked_for_and_the_same_for_a_seed(monkeypatch):
  """On a clock of our own, with processes that are only pretended."""

  def killed(seed: int) -> list[str]:
    found, now = [], [0.0]
    monkeypatch.setattr(netlab.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(netlab, "kill", lambda pid, number: found.append(f"{pid} {now[0]:.1f}"))
    one = lambda i: SimpleNamespace(
      popen=SimpleNamespace(pid=i, poll=lambda: None), process=SimpleNamespace(name=str(i))
    )
    running: Any = [one(i) for i in range(4)]
    kills = netlab.Kills(10, 5.0, seed)
    while now[0] < 1000:
      kills(running)
      now[0] += 0.1
    return found

  assert len(killed(1)) == 10
  assert killed(1) == killed(1) != killed(2)
  assert len({line.split()[0] for line in killed(1)}) > 1


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (("--rate=fast",), "--rate='fast': not a rate such as 100mbit"),
    (("--slow=1:10mbit,2:x",), "--slow='1:10mbit,2:x': '2:x' is not HOST:RATE; hosts are 0 to 1"),
    (("--slow=1:10",), "--slow='10': not a rate"),
    (("--hosts=0",), "--hosts=0"),
  ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, says, tmp_path):
  process = start(tmp_path, *flags, line=("true",))
  _, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 2
  (line,) = err.splitlines()
  assert says in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_root_it_says_so(tmp_path):
  tmp_path.chmod(0o777)
  nobody = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, str(NETLAB), "--", "true"]
  ended = subprocess.run(nobody, cwd="/", capture_output=True, text=True, timeout=TIMEOUT)
  if "Permission denied" in ended.stderr:
    pytest.skip("this Python is not for others to run")
  assert ended.returncode == 2
  assert "error: hosts on one machine need Linux and root" in ended.stderr
