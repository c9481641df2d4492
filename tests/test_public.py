"""The public names: imported when they are used, documented, and those that specs use."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import research
from research import hooks
from research.core import registry

NAMES = vars(research)["__all__"]

ROOT = Path(__file__).parents[1]
KINDS = ("compressor", "aggregator", "method", "topology", "model")
# Registered names that `research` does not export: they are imported from their modules.
FROM_MODULES = {
  "block_top_k",
  "dct_mean",
  "desloc",
  "dion",
  "dion2",
  "edit_penalty",
  "ego_attention",
  "graph_network",
  "loco",
  "noloco",
  "partitioned",
  "random_pairs",
  "shuffled",
  "sparta_diloco",
  "statistical",
}
IMPORT = """
import sys
import research
print(*{"jax", "flax", "optax", "numpy", "absl"} & set(sys.modules))
"""


def test_the_import_brings_nothing_along():
  found = subprocess.run(
    [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert found.stdout.split() == []


def test_there_are_few_enough_names_and_each_once():
  assert len(NAMES) == len(set(NAMES)) <= 120
  assert set(NAMES) <= set(dir(research))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"__version__"}))
def test_every_name_has_a_docstring_of_its_own(name):
  found = getattr(research, name)
  assert found.__doc__
  is_plain_tuple = inspect.isclass(found) and found.__doc__.startswith(f"{name}(")
  assert not is_plain_tuple, "that is the docstring which NamedTuple makes"


@pytest.mark.parametrize("name", hooks.__all__)
def test_every_event_and_the_hook_have_a_docstring(name):
  assert not (getattr(hooks, name).__doc__ or f"{name}(").startswith(f"{name}(")


@pytest.mark.parametrize("kind", KINDS)
def test_specs_and_python_call_the_same_functions(kind):
  names = {*registry.TABLE[kind]} - FROM_MODULES
  assert names <= set(NAMES)
  for name in names:
    assert getattr(research, name) is registry.lookup((kind,), name)


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="module 'research' has no attribute 'top_kk'"):
    research.top_kk  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]
