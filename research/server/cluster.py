"""Connects to an existing Ray cluster, or to a new cluster that ends with this process."""

import contextlib
import os
import secrets
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

from research.training.config import Config, UsageError, flag

_MIB = 2**20
_HINT = "set RAY_TMPDIR to a short path that can be written, such as /tmp"
_LOOPBACK = ("127.0.0.1", "localhost")


@contextlib.contextmanager
def running(config: Config, processes: int, model_bytes: int) -> Iterator[Any]:
  """Starts or joins Ray and yields the connected module `ray`.

  A Ray cluster started here listens only on --node_ip, by default the loopback address, has no
  dashboard and reports no usage. Every call includes a token, which is generated for this run
  unless the environment provides a token.

  Args:
    config: the configuration of the run.
    processes: the number of processes that the run will start.
    model_bytes: size of the model, which determines the size of the object store.

  Raises:
    UsageError: if there is no Ray at --ray_address, or Ray cannot start.
  """
  os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
  os.environ["RAY_AUTH_MODE"] = "token"
  os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
  # How long Ray's agents outlive a killed Ray; there is no other Ray for them to reconnect to.
  os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
  if config.node_ip in _LOOPBACK:  # on Linux, Ray otherwise uses the machine's address
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
  with _told(config):
    if not config.ray_address and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
      os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    space = {"namespace": f"run-{uuid.uuid4().hex}", "log_to_driver": False}
    quiet = {"logging_level": "ERROR", "configure_logging": True}
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)  # Ray execs
    try:
      if config.ray_address:
        ray.init(address=config.ray_address, **space, **quiet)
      else:
        memory = min(max(64 * processes * model_bytes, 128 * _MIB), 2048 * _MIB)
        ray.init(
          address="local",  # else Ray joins the cluster that was last started on this machine
          num_cpus=processes,
          include_dashboard=False,
          object_store_memory=memory,
          _node_ip_address=config.node_ip,
          **space,
          **quiet,
        )
    except (OSError, RuntimeError, ValueError) as error:
      raise _reason(error) from error
  try:
    yield ray
  finally:
    ray.shutdown()


def _reason(error: Exception) -> ValueError:
  """Explains why Ray does not start: a flag, or the folder of Ray's sockets and logs."""
  text = " ".join(str(error).split())
  if place := getattr(error, "filename", None):
    return UsageError(f"Ray cannot write {place}: {getattr(error, 'strerror', text)}; {_HINT}")
  if "AF_UNIX path length" not in text:
    return ValueError(text[:200])
  name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
  place = os.environ.get(name, "")
  return UsageError(f"{name}='{place[:80]}': too long for Ray's sockets in it; {_HINT}")


def _told(config: Config) -> contextlib.AbstractContextManager[None]:
  """Context manager that names the responsible flag if Ray does not start."""
  if config.ray_address:
    return flag("ray_address", config.ray_address)
  return flag("node_ip", config.node_ip)


def accelerators(ray: Any, workers: int) -> list[dict[str, Any]]:
  """Returns the Ray resources of each worker: an accelerator while any is left, else CPUs only."""
  here = ray.cluster_resources()
  found: list[dict[str, Any]] = [{"num_gpus": 1} for _ in range(int(here.get("GPU", 0)))]
  found += [{"resources": {"TPU": 1}} for _ in range(int(here.get("TPU", 0)))]
  return (found + [{}] * workers)[:workers]
