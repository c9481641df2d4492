"""Joins the processes of one job, for any launcher."""

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax

from research.comm import gloo
from research.core.text import quoted, whole_number

JOIN_SECONDS = 300  # maximum time for which a process waits for the other processes
LOOPBACK = ("localhost", "127.0.0.1")
NOTICE_SECONDS = 1.2  # until JAX has told all processes of a SIGTERM; it looks once a second


def detect_cluster(environ: Mapping[str, str]) -> str | None:
  """Detects which launcher started this process as one of several processes.

  GKE lists the hosts of a TPU slice in TPU_WORKER_HOSTNAMES. A Cloud TPU VM is recognized by libtpu
  and its TPU devices; there, JAX queries the metadata server for the hosts, unless
  TPU_SKIP_MDS_QUERY is set.

  Args:
    environ: the environment variables.

  Returns:
    The launcher, 'slurm', 'gke' or 'tpu'; None if none is detected.

  Raises:
    ValueError: if SLURM_NTASKS is not an integer.
  """
  if "SLURM_STEP_NODELIST" in environ:
    tasks = whole_number(environ.get("SLURM_NTASKS", "1"))
    if tasks is None:
      raise ValueError(f"SLURM_NTASKS={quoted(environ['SLURM_NTASKS'])} is not a whole number")
    if tasks > 1:
      return "slurm"
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
  if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environ:
    return "gke"
  if "TPU_SKIP_MDS_QUERY" not in environ and on_tpu_vm():
    return "tpu"
  return None


def on_tpu_vm() -> bool:
  """Returns whether libtpu is installed and TPU devices are present."""
  devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
  return bool(devices) and importlib.util.find_spec("libtpu") is not None


def initialize(coordinator: str = "", processes: int = 0, process_id: int = -1) -> int:
  """Joins the processes of one job.

  Call this function before any other use of JAX's devices.

  The arguments take precedence over the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID. These variables take precedence over the launcher's environment (see
  `detect_cluster`). If no argument or variable is set, the job has a single process. CPU processes
  communicate through gloo, GPUs through NCCL, and TPUs over ICI and the data-centre network.

  Args:
    coordinator: the address HOST:PORT of process 0, which all processes must be able to reach.
    processes: the number of processes.
    process_id: the index of this process, in [0, processes).

  Returns:
    The number of processes.

  Raises:
    ValueError: if the arguments or variables are incomplete or inconsistent, process 0 cannot
      listen on the port, or process 0 cannot be reached within JOIN_SECONDS. If another process
      does not join in time, process 0 prints an error and exits with code 2.
  """
  if not (coordinator or processes or process_id >= 0):
    coordinator, processes, process_id = _of_environment(os.environ)
  if coordinator or processes or process_id >= 0:
    _check_explicit(coordinator, processes, process_id)
    host, port = coordinator.rsplit(":", 1)
    loopback = host in LOOPBACK
    if process_id == 0:
      _check_port("127.0.0.1" if loopback else "", int(port))
    else:
      _wait_for(host, int(port))
    with _patience(f"process {process_id} of {processes} waits for others at {coordinator}"):
      jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        initialization_timeout=2 * JOIN_SECONDS,
        coordinator_bind_address=coordinator if loopback else None,
      )
  elif detect_cluster(os.environ):
    jax.distributed.initialize()
  before = gloo.threads()
  count = jax.process_count()
  if count > 1 and jax.default_backend() == "cpu":
    gloo.let_work_go_first(before)
  return count


def end_together() -> None:
  """Waits until all processes of a job are done, and ignores SIGTERM from now on.

  JAX's preemption service answers a SIGTERM with a barrier of all processes. If some processes had
  left, those at the barrier and those that wait for them to leave would block each other for
  minutes. So this function also waits until an earlier SIGTERM has been answered. It does nothing
  if the job has a single process.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multihost_utils.sync_global_devices("end")
    time.sleep(NOTICE_SECONDS)


def _of_environment(environ: Mapping[str, str]) -> tuple[str, int, int]:
  """Reads the settings from the launcher's variables; missing settings become '', 0 and -1.

  An address without other settings is ignored, because JAX itself reads that variable on clusters
  that provide the other settings.
  """
  numbers = {name: environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
  if not any(numbers.values()):
    return "", 0, -1
  for name, number in numbers.items():
    if whole_number(number) is None:
      raise ValueError(f"needs a whole number in {name}={quoted(number)}")
  processes, process_id = map(int, numbers.values())
  return environ.get("JAX_COORDINATOR_ADDRESS", ""), processes, process_id


def _check_explicit(coordinator: str, processes: int, process_id: int) -> None:
  host, _, text = coordinator.rpartition(":")
  port = whole_number(text)
  if not host or port is None or port > 65535:
    raise ValueError("not HOST:PORT of the first process")
  if processes < 1:
    raise ValueError(f"needs the number of processes, but --processes={processes}")
  if not 0 <= process_id < processes:
    raise ValueError(f"needs --process_id in [0, {processes}), not {process_id}")


def _check_port(host: str, port: int) -> None:
  """Rejects a port on which JAX's service cannot listen, since JAX would abort with a core dump."""
  with socket.socket() as tried:
    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      tried.bind((host, port))
    except OSError as error:
      raise ValueError(f"process 0 cannot listen at port {port}: {error.strerror}") from error


def _wait_for(host: str, port: int) -> None:
  """Waits until process 0 listens on its port."""
  until = time.monotonic() + JOIN_SECONDS
  while True:
    try:
      socket.create_connection((host, port), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > until:
        reason = f"process 0 was not reachable within {JOIN_SECONDS} s ({error.strerror or error})"
        raise ValueError(reason) from error
      time.sleep(0.1)


@contextlib.contextmanager
def _patience(waits: str) -> Iterator[None]:
  """Reports a long wait; exits after JOIN_SECONDS, because JAX would abort the process later."""

  def give_up() -> NoReturn:
    print(f"error: {waits}, not all joined within {JOIN_SECONDS} s", file=sys.stderr, flush=True)
    os._exit(2)

  note = lambda: print(waits, file=sys.stderr, flush=True)
  timers = [threading.Timer(10.0, note), threading.Timer(JOIN_SECONDS, give_up)]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()
