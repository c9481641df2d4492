"""Eight CPU devices for every test, whatever the machine has.

LLVM's expensive passes are left out, since the tests compile far more than they compute, and on
jaxlib before 0.12 the slower of XLA's two code generators; the tests of the command, in processes
of their own, run with all of them.
"""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)

if importlib.metadata.version("jaxlib").startswith("0.10."):
  given = os.environ.get("XLA_FLAGS")
  os.environ["XLA_FLAGS"] = f"{given or ''} --xla_cpu_use_fusion_emitters=false"
  jax.devices()  # reads the flags, which other processes are not to inherit
  if given is None:
    del os.environ["XLA_FLAGS"]
  else:
    os.environ["XLA_FLAGS"] = given


@pytest.fixture
def compilations():
  """The durations of all compilations since the test began."""
  found: list[float] = []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)
