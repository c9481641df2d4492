"""JAX as the environment's variables set it up: one that it cannot use is said in one line."""

import contextlib
import os
from collections.abc import Iterator

from research.core.text import listed, quoted
from research.training.config import UsageError

_MOST = 4096  # CPU devices: JAX takes 10 s to make as many, and 40 s for twice as many


def import_jax() -> None:
  """Imports JAX, which reads its variables then.

  Raises:
    UsageError: if one of them is of another type, or asks for more devices than can be made.
  """
  with _said(ValueError):
    import jax
  count = jax.config.values["jax_num_cpu_devices"]
  if count > _MOST:
    raise UsageError(f"JAX_NUM_CPU_DEVICES={count}: more than {_MOST} CPU devices take minutes")


def start_jax() -> None:
  """Has JAX look for its devices.

  Raises:
    UsageError: if there are none such as the variables ask for.
  """
  import jax

  with starting():
    jax.devices()


def starting() -> contextlib.AbstractContextManager[None]:
  """Around what makes JAX look for its devices for the first time.

  Raises:
    UsageError: if there are none such as the variables ask for.
  """
  return _said(RuntimeError, AssertionError)


@contextlib.contextmanager
def _said(*errors: type[Exception]) -> Iterator[None]:
  """Turns what JAX raises into one line with those of its variables that are set."""
  try:
    yield
  except errors as error:
    names = sorted(name for name in os.environ if name.startswith("JAX_"))
    found = listed(f"{name}={quoted(os.environ[name])}" for name in names)
    reason = str(error) or "a platform that is not there"
    raise UsageError(f"JAX does not start with {found or 'its defaults'}: {reason}") from error
