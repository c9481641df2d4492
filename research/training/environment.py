"""Starts JAX, and reports invalid environment variables of JAX in one line."""

import contextlib
import os
from collections.abc import Iterator

from research.core.text import listed, quoted
from research.training.config import UsageError

_MOST = 4096  # maximum number of CPU devices; JAX creates 4096 in 10 s, but needs 40 s for 8192


def import_jax() -> None:
  """Imports JAX, which reads its environment variables during the import.

  Raises:
    UsageError: if an environment variable has an invalid value, or requests too many devices.
  """
  with _said(ValueError):
    import jax
  count = jax.config.values["jax_num_cpu_devices"]
  if count > _MOST:
    raise UsageError(f"JAX_NUM_CPU_DEVICES={count}: more than {_MOST} CPU devices take minutes")


def start_jax() -> None:
  """Initializes JAX's devices.

  Raises:
    UsageError: if the environment variables request devices that do not exist.
  """
  import jax

  with starting():
    jax.devices()


def starting() -> contextlib.AbstractContextManager[None]:
  """Context manager for code that initializes JAX's devices.

  Raises:
    UsageError: if the environment variables request devices that do not exist.
  """
  return _said(RuntimeError, AssertionError)


@contextlib.contextmanager
def _said(*errors: type[Exception]) -> Iterator[None]:
  """Context manager that converts JAX's errors to one line, which lists the JAX_* variables."""
  try:
    yield
  except errors as error:
    names = sorted(name for name in os.environ if name.startswith("JAX_"))
    found = listed(f"{name}={quoted(os.environ[name])}" for name in names)
    reason = str(error) or "a platform that is not there"
    raise UsageError(f"JAX does not start with {found or 'its defaults'}: {reason}") from error
