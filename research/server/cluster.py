"""Ray: one that this process starts and takes with it when it ends, or a cluster that is there."""

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
  """The module `ray`, connected.

  A Ray that is started here listens on --node_ip alone, the loopback unless told otherwise. It has
  no dashboard and sends nothing to anybody, and every call carries a token, made up for this run if
  the environment has none.

  Raises:
    UsageError: if there is no Ray at --ray_address, or none can be started.
  """
  os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
  os.environ["RAY_AUTH_MODE"] = "token"
  os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
  # Ray's own agents outlive it by so long, if it was killed: there is no other to connect to
  os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
  if config.node_ip in _LOOPBACK:  # Ray else puts the machine's address in its place, on Linux
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
  with _told(config):
    if not config.ray_address and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
      os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    space = {"namespace": f"run-{uuid.uuid4().hex}", "log_to_driver": False}
    quiet = {"logging_level": "ERROR", "configure_logging": True}
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)  # it execs
    try:
      if config.ray_address:
        ray.init(address=config.ray_address, **space, **quiet)
      else:
        memory = min(max(64 * processes * model_bytes, 128 * _MIB), 2048 * _MIB)
        ray.init(
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
  """Why Ray does not start: a flag's value, or the folder that its sockets and logs are in."""
  text = " ".join(str(error).split())
  if place := getattr(error, "filename", None):
    return UsageError(f"Ray cannot write {place}: {getattr(error, 'strerror', text)}; {_HINT}")
  if "AF_UNIX path length" not in text:
    return ValueError(text[:200])
  name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
  place = os.environ.get(name, "")
  return UsageError(f"{name}='{place[:80]}': too long for Ray's sockets in it; {_HINT}")


def _told(config: Config) -> contextlib.AbstractContextManager[None]:
  """The flag that a failure to start is about."""
  if config.ray_address:
    return flag("ray_address", config.ray_address)
  return flag("node_ip", config.node_ip)


def accelerators(ray: Any, workers: int) -> list[dict[str, Any]]:
  """What each worker is given: an accelerator as long as there are some, else processors alone."""
  here = ray.cluster_resources()
  found: list[dict[str, Any]] = [{"num_gpus": 1} for _ in range(int(here.get("GPU", 0)))]
  found += [{"resources": {"TPU": 1}} for _ in range(int(here.get("TPU", 0)))]
  return (found + [{}] * workers)[:workers]
