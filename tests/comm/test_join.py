"""Processes find each other: by flags, by what launchers set, early, late, or not at all."""

import os
import platform
import select
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from research.comm import gloo, join

# What the launchers set, and the near misses that are single processes.
CLUSTERS = [
  ({}, None),
  ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, "slurm"),
  ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
  ({"SLURM_STEP_NODELIST": "n1"}, None),
  ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # in a batch script, outside of srun
  ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "gke"),
  ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}, "gke"),
  ({"TPU_WORKER_HOSTNAMES": "a"}, None),
  ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_COORDINATOR_ADDRESS": "a"}, "gke"),
  ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, "gke"),
]


@pytest.mark.parametrize(("environ", "cluster"), CLUSTERS)
def test_the_launcher_is_known_by_its_environment(environ, cluster):
  assert join.detect_cluster(environ) == cluster


@pytest.mark.parametrize(("environ", "cluster"), [({}, "tpu"), ({"TPU_SKIP_MDS_QUERY": "1"}, None)])
def test_a_tpu_vm_is_known_by_its_devices(environ, cluster, monkeypatch):
  monkeypatch.setattr(join, "on_tpu_vm", lambda: True)
  assert join.detect_cluster(environ) == cluster


@pytest.fixture
def joined(monkeypatch):
  """The calls of `jax.distributed.initialize`, which does nothing here, in an empty environment."""
  calls = []
  record = lambda *args, **kwargs: calls.append((args, kwargs))
  monkeypatch.setattr(jax.distributed, "initialize", record)
  monkeypatch.setattr(join.os, "environ", {})
  return calls


@pytest.fixture
def port() -> int:
  """One at which nobody listens."""
  with socket.socket() as tried:
    tried.bind(("127.0.0.1", 0))
    return tried.getsockname()[1]


def test_a_single_process_stays_alone(joined):
  assert join.initialize() == 1
  assert joined == []


@pytest.mark.parametrize(("host", "alone"), [("127.0.0.1", True), ("localhost", True), ("", False)])
def test_explicit_arguments_are_passed_on(joined, port, host, alone):
  """A coordinator on the loopback listens there alone; elsewhere on all interfaces."""
  address = f"{host or socket.gethostname()}:{port}"
  join.initialize(address, 2, 0)
  ((arguments, more),) = joined
  assert arguments == (address, 2, 0)
  assert more["coordinator_bind_address"] == (address if alone else None)


def test_the_environment_of_a_launcher_is_taken(joined, port):
  join.os.environ.update(CLUSTERS[1][0])
  join.os.environ.update(JAX_COORDINATOR_ADDRESS=f"node7:{port}")
  join.os.environ.update(JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="0")
  join.initialize()
  assert [args for args, _ in joined] == [(f"node7:{port}", 3, 0)]


@pytest.mark.parametrize(
  ("told", "message"),
  [
    ({"JAX_NUM_PROCESSES": "2"}, "needs a whole number in JAX_PROCESS_ID=''"),
    ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES='two'"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "not HOST:PORT"),
  ],
)
def test_half_of_an_environment_is_refused(joined, told, message):
  join.os.environ.update(told)
  with pytest.raises(ValueError, match=message):
    join.initialize()
  assert joined == []


def test_an_address_alone_is_left_to_the_cluster(joined):
  join.os.environ.update(CLUSTERS[1][0], JAX_COORDINATOR_ADDRESS="node7:99")
  join.initialize()
  assert joined == [((), {})]


def test_a_cluster_decides_where_nothing_is_given(joined):
  join.os.environ.update(CLUSTERS[1][0])
  join.initialize()
  assert joined == [((), {})]


def test_explicit_arguments_come_first(joined, port):
  join.os.environ.update(CLUSTERS[1][0])
  join.os.environ.update(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
  join.initialize(f"node7:{port}", 4, 0)
  assert [args for args, _ in joined] == [(f"node7:{port}", 4, 0)]


@pytest.mark.parametrize("host", ["127.0.0.1", "node7"])
def test_a_port_that_is_taken_is_refused(joined, host):
  with socket.create_server(("127.0.0.1" if host == "127.0.0.1" else "", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen at port {port}: Address already in use"):
      join.initialize(f"{host}:{port}", 2, 0)
  assert joined == []


def test_a_process_waits_for_the_first_one(joined, port):
  began, late = time.monotonic(), []

  def come():
    late.append(socket.create_server(("127.0.0.1", port)))

  timer = threading.Timer(0.5, come)
  timer.start()
  join.initialize(f"127.0.0.1:{port}", 2, 1)
  late[0].close()
  timer.join()
  assert len(joined) == 1
  assert time.monotonic() - began >= 0.5


def test_a_process_gives_up_where_there_is_no_first_one(joined, port, monkeypatch):
  monkeypatch.setattr(join, "JOIN_SECONDS", 0.2)
  with pytest.raises(ValueError, match=r"not reachable within 0.2 s \(Connection refused\)"):
    join.initialize(f"127.0.0.1:{port}", 2, 1)
  assert joined == []


def test_the_first_process_gives_up_in_one_line_where_nobody_comes(port):
  program = f"""
from research.comm import gloo, join
join.JOIN_SECONDS = 1
join.initialize("127.0.0.1:{port}", 2, 0)
"""
  ended = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
  )
  assert ended.returncode == 2
  waits = f"process 0 of 2 waits for others at 127.0.0.1:{port}"
  assert ended.stderr.splitlines()[-1] == f"error: {waits}, not all joined within 1 s"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("node7", 2, 0), "not HOST:PORT"),
    ((":99", 2, 0), "not HOST:PORT"),
    (("node7:http", 2, 0), "not HOST:PORT"),
    (("", 2, 0), "not HOST:PORT"),
    (("", 0, 1), "not HOST:PORT"),
    (("node7:99", 0, 0), "--processes=0"),
    (("node7:99", 2, -1), r"--process_id in \[0, 2\), not -1"),
    (("node7:99", 2, 2), r"--process_id in \[0, 2\), not 2"),
  ],
)
def test_arguments_that_do_not_fit_together_are_refused(joined, arguments, message):
  with pytest.raises(ValueError, match=message):
    join.initialize(*arguments)
  assert joined == []


@pytest.mark.skipif(
  sys.platform != "linux" or platform.machine() not in gloo.WAITS, reason="Linux tells of threads"
)
def test_threads_that_wait_for_messages_do_not_interrupt():
  """Those begun since, also where another, older one only begins to wait meanwhile."""
  poll, end, told = select.epoll(), *os.pipe()
  poll.register(end, select.EPOLLIN)
  asked, begun = threading.Event(), threading.Barrier(3)

  def wait_when_asked():
    asked.wait()
    wait()

  def wait():
    begun.wait()
    poll.poll()

  older, newer = threading.Thread(target=wait_when_asked), threading.Thread(target=wait)
  older.start()
  before = gloo.threads()
  newer.start()
  asked.set()
  begun.wait()
  try:
    assert gloo.let_work_go_first(before) == {newer.native_id}
    scheduled = [os.sched_getscheduler(thread.native_id or 0) for thread in (newer, older)]
    assert scheduled == [os.SCHED_BATCH, os.SCHED_OTHER]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
  finally:
    os.write(told, b"x")
    for thread in (older, newer):
      thread.join()
    for descriptor in (end, told):
      os.close(descriptor)
    poll.close()
