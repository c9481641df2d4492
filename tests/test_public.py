"""The public names: imported when they are used, documented, and those that specs use."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import research
from research.core import registry

ROOT = Path(__file__).parents[1]
KINDS = ("compressor", "aggregator", "method", "topology", "model")
IMPORT = """
import sys, time
start = time.perf_counter()
import research
print(time.perf_counter() - start, *{"jax", "flax", "optax", "numpy"} & set(sys.modules))
"""


def test_the_import_is_quick_and_brings_no_jax():
  found = subprocess.run(
    [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
  )
  seconds, *imported = found.stdout.split()
  assert float(seconds) < 0.3
  assert imported == []


def test_there_are_few_enough_names_and_each_once():
  assert len(research.__all__) == len(set(research.__all__)) <= 120
  assert set(research.__all__) <= set(dir(research))


@pytest.mark.parametrize("name", sorted({*research.__all__} - {"__version__"}))
def test_every_name_has_a_docstring_of_its_own(name):
  found = getattr(research, name)
  assert found.__doc__
  is_plain_tuple = inspect.isclass(found) and found.__doc__.startswith(f"{name}(")
  assert not is_plain_tuple, "that is the docstring which NamedTuple makes"


@pytest.mark.parametrize("kind", KINDS)
def test_specs_and_python_call_the_same_functions(kind):
  assert set(registry.TABLE[kind]) <= set(research.__all__)
  for name in registry.TABLE[kind]:
    assert getattr(research, name) is registry.lookup((kind,), name)


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="module 'research' has no attribute 'top_kk'"):
    research.top_kk  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]
