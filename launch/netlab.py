"""Runs a command on simulated hosts: network namespaces of this machine with rate-limited links.

    sudo python launch/netlab.py --hosts=4 --rate=100mbit -- \\
        python experiments/run.py --executor=spmd --mesh=data:4 --task="mnist()"

Each host has its own network, address (10.77.0.1, ...) and host name. All links connect to one
switch, and the kernel limits the rate into and out of each host with a token bucket. One process of
the job runs on each host. The kernel's byte counts are added to the run's metrics and summary. When
the launcher ends, for any reason, the kernel removes hosts, links and processes. `--kills` kills
hosts' processes at random, to test a job's fault tolerance. The launcher needs Linux, root,
iproute2 and util-linux.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import flags

from launch import command, supervisor
from launch.supervisor import Process, Running, say
from launch.watchman import Watchman, dies_with_parent, kill
from research.comm import counters
from research.command.errors import fail

FLAGS = flags.FLAGS
TOOLS = ("ip", "tc", "unshare", "nsenter", "hostname", "taskset")
LARGEST = 250  # maximum number of hosts, which share a network of 254 addresses
LINK = "eth0"


class LabError(Exception):
  """Reports that the machine refused to create the network."""


class ShapedLink(NamedTuple):
  """The traffic shaping of a host's link, in the units of tc."""

  rate: str  # maximum rate; '' for no limit
  burst: str  # number of bytes that pass without delay after a pause


class Host(NamedTuple):
  """A host, which exists as long as the process that holds the host's namespaces."""

  holder: int
  address: str

  def command(self, line: Sequence[str]) -> list[str]:
    """Returns the command line that runs another command on this host."""
    return ["nsenter", f"--target={self.holder}", "--net", "--uts", "--", *line]


class Lab(NamedTuple):
  """A network of hosts."""

  switch: int  # id of the process that holds the switch's namespace
  hosts: list[Host]


def define_flags() -> None:
  """Defines the flags of this launcher."""
  command.define_flags()
  flags.DEFINE_integer("hosts", 2, "Number of hosts.", 1, LARGEST)
  flags.DEFINE_string("rate", "", "Rate of each host's link, such as 100mbit; empty: unlimited.")
  text = "Hosts whose links have another rate: HOST:RATE,... with the number of the host."
  flags.DEFINE_string("slow", "", text)
  text = "Number of bytes that may pass at once through an idle link."
  flags.DEFINE_string("burst", "256kb", text)
  flags.DEFINE_integer("devices_per_host", 1, "Number of CPU devices of each host.", 1)
  flags.DEFINE_integer("cores_per_host", 0, "Number of cores to which a host is pinned; 0: all.", 0)
  flags.DEFINE_integer("kills", 0, "Number of processes to kill at random.", 0)
  text = "Mean seconds between kills, which are exponentially distributed."
  flags.DEFINE_float("kill_every", 30.0, text, 0.1)
  flags.DEFINE_integer("seed", 0, "Seed of the random kills.")


def links() -> list[ShapedLink]:
  """Returns each host's link from the flags; an invalid flag ends the program."""
  found = [_rate("rate", FLAGS.rate)] * FLAGS.hosts
  for part in filter(None, FLAGS.slow.split(",")):
    host, _, rate = part.partition(":")
    if not (re.fullmatch("[0-9]{1,9}", host) and int(host) < FLAGS.hosts):
      known = f"hosts are 0 to {FLAGS.hosts - 1}"
      fail(2, f"--slow='{FLAGS.slow}': '{part}' is not HOST:RATE; {known}")
    found[int(host)] = _rate("slow", rate)
  return [ShapedLink(rate, FLAGS.burst) for rate in found]


def _rate(name: str, text: str) -> str:
  if text and not re.fullmatch(r"[0-9]{1,20}(\.[0-9]+)?[kmg]?bit", text):
    fail(2, f"--{name}='{text}': not a rate such as 100mbit; units: bit, kbit, mbit, gbit")
  return text


@contextlib.contextmanager
def network(links: Sequence[ShapedLink]) -> Iterator[Lab]:
  """Creates hosts that are connected to one switch by the given links, as a context manager.

  The namespaces are unnamed: each namespace disappears with its last process.

  Raises:
    LabError: if the machine refuses a command; the message shows the command.
  """
  watchman, holders = Watchman(), []
  try:
    hold = lambda *kinds: holders.append(_holder(kinds)) or holders[-1].pid
    switch = hold("--net")
    watchman.watch(switch)
    _ip(switch, "link add switch type bridge", "link set lo up", "link set switch up")
    hosts = []
    for number, link in enumerate(links):
      host = Host(hold("--net", "--uts"), f"10.77.0.{number + 1}")
      watchman.watch(host.holder)
      _join(switch, number, host, link)
      hosts.append(host)
    yield Lab(switch, hosts)
  finally:
    for holder in holders:
      kill(holder.pid)
      holder.wait()
    watchman.close()


def _holder(kinds: Sequence[str]) -> subprocess.Popen:
  """Starts an idle process that holds new namespaces."""
  line = ["unshare", *kinds, "--", "sh", "-c", "echo; exec sleep infinity"]
  found = subprocess.Popen(
    line,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
    preexec_fn=dies_with_parent(),
  )
  out, err = found.stdout, found.stderr
  assert out
  assert err
  with out, err:
    if not out.readline():
      raise LabError(f"unshare: {err.read().decode().strip()}")
  return found


def _join(switch: int, number: int, host: Host, link: ShapedLink) -> None:
  """Connects a host to the switch, and limits the rates of both directions of the link."""
  port = f"port{number}"
  _ip(host.holder, f"link add {LINK} type veth peer name {port} netns {switch}", "link set lo up")
  _ip(host.holder, f"addr add {host.address}/24 dev {LINK}", f"link set {LINK} up")
  _ip(switch, f"link set {port} master switch", f"link set {port} up")
  for holder, device in ((host.holder, LINK), (switch, port)) if link.rate else ():
    shape = f"rate {link.rate} burst {link.burst} latency 100ms"
    _do(holder, "tc", *f"qdisc add dev {device} root tbf {shape}".split())
  _do(host.holder, "hostname", host.address)  # gloo binds to the address of the host's name


def _ip(holder: int, *lines: str) -> None:
  for line in lines:
    _do(holder, "ip", *line.split())


def _do(holder: int, *line: str) -> None:
  there = ["nsenter", f"--target={holder}", "--net", "--uts", "--"]
  ended = subprocess.run([*there, *line], capture_output=True, text=True)
  if ended.returncode:
    raise LabError(f"{' '.join(line)}: {' '.join(ended.stderr.split())}")


def processes(hosts: Sequence[Host], line: Sequence[str]) -> list[Process]:
  """Returns one process per host; process 0 listens on the first host's address."""
  port = FLAGS.port or random.SystemRandom().randrange(20_000, 30_000)
  files = ",".join(f"/proc/{host.holder}/net/dev" for host in hosts)
  variables = {
    "JAX_NUM_CPU_DEVICES": str(FLAGS.devices_per_host),
    counters.PLACES: f"{LINK}:{files}",
  }

  def one(number: int, host: Host) -> Process:
    environ = command.environment(f"{hosts[0].address}:{port}", number, len(hosts))
    return Process(str(number), host.command([*_pinned(number), *line]), environ | variables)

  return [one(number, host) for number, host in enumerate(hosts)]


def _pinned(number: int) -> list[str]:
  if not FLAGS.cores_per_host:
    return []
  cores, each = sorted(os.sched_getaffinity(0)), FLAGS.cores_per_host
  mine = [cores[i % len(cores)] for i in range(each * number, each * (number + 1))]
  return ["taskset", "--cpu-list", ",".join(map(str, mine))]


class Kills:
  """Kills random processes of a job at random times, which depend only on a seed."""

  def __init__(self, count: int, every: float, seed: int):
    self.left, self._every, self._random = count, every, random.Random(seed)
    self._next = self._draw()

  def _draw(self) -> float:
    return time.monotonic() + self._random.expovariate(1 / self._every)

  def __call__(self, running: Sequence[Running]) -> None:
    if not self.left or time.monotonic() < self._next:
      return
    victim = self._random.choice(running)
    if victim.popen.poll() is None:
      self.left -= 1
      say(f"killing process {victim.process.name}; {self.left} more kills to come")
      kill(victim.popen.pid, signal.SIGKILL)
    self._next = self._draw()


def refuse() -> None:
  """Ends the program if the machine cannot create networks."""
  if not sys.platform.startswith("linux") or os.geteuid():
    fail(2, "hosts on one machine need Linux and root: use sudo, or launch/local.py")
  if lacking := [tool for tool in TOOLS if not shutil.which(tool)]:
    fail(2, f"not found: {', '.join(lacking)}; install iproute2 and util-linux")


def main(line: list[str]) -> int:
  """Runs the launcher; returns the exit code of the job."""
  shapes = links()
  refuse()
  kills = Kills(FLAGS.kills, FLAGS.kill_every, FLAGS.seed)
  try:
    with network(shapes) as (_, hosts):
      inside = f"nsenter --target {hosts[0].holder} --net --uts bash"
      say(f"{len(hosts)} hosts; to look at the first: {inside}")
      make = lambda: processes(hosts, line)
      return supervisor.supervise(make, command.log_folder(), command.rules(), kills)
  except LabError as error:
    fail(2, str(error))


if __name__ == "__main__":
  define_flags()
  command.start(main, __doc__)
