"""Settings of the whole test run: eight CPU devices, fast compilation, a count of slow tests.

The tests compile far more than they compute. So LLVM's expensive passes are off, each program is
compiled in one piece (cut for 32 threads, it takes 15% more CPU time), and on jaxlib before 0.12
the slower of XLA's two code generators is off. A command that a test starts in a process of its own
inherits none of this; most tests give it JAX_DISABLE_MOST_OPTIMIZATIONS.
"""

import gc
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes many objects. To collect them, and to note for each operation which lines of source
# it comes from, takes a quarter of the time.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 50, 100)

given = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{given or ''} --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
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


# ---- which tests run, and in which order

# These files take longest. They come first, so that the workers of pytest-xdist end together.
LONGEST = (
  "test_run.py",
  "test_composition.py",
  "test_diagnostics.py",
  "test_environment.py",
  "test_processes.py",
  "test_method_contracts.py",
  "test_compress.py",
  "test_executions.py",
  "test_hybrid.py",
  "test_halves.py",
  "test_presence.py",
  "test_federated.py",
  "test_local.py",
  "test_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  place = {name: index for index, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
  """Counts the slow tests that a run leaves out."""
  for item in items:
    if item.get_closest_marker("slow"):
      item.config.stash[LEFT_OUT] = item.config.stash.get(LEFT_OUT, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
  """Each worker of pytest-xdist collects all tests, and tells the main process its count."""
  output = getattr(session.config, "workeroutput", None)
  if output is not None:
    output["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
  count = getattr(node, "workeroutput", {}).get("left_out", 0)
  node.config.stash[LEFT_OUT] = max(count, node.config.stash.get(LEFT_OUT, 0))


def pytest_terminal_summary(
  terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
  count = config.stash.get(LEFT_OUT, 0)
  if count:
    line = f"{count} slow tests were left out; `pytest -m slow` runs them"
    terminalreporter.write_line(line, yellow=True)
