"""What the documentation generates from the code: the catalogue, the API reference, formulas."""

import sys
from pathlib import Path

import pytest

import research
from research.core import registry
from research.core.base import Aggregator, Compressor
from research.core.builtin import TABLE

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

import docstrings
import examples
import facts
import mathematics
import reference

sys.path.pop(0)

NAMES = [(kind, name) for kind in TABLE for name in TABLE[kind]]


def test_every_public_name_has_one_entry_in_the_reference():
  found = [name for _, _, rooms in reference._PAGES.values() for name in reference.names_of(rooms)]
  assert sorted(found) == sorted({*reference.PUBLIC} - {"__version__"})


def test_the_pages_of_the_reference_show_every_name_with_types(tmp_path, monkeypatch):
  monkeypatch.setattr(reference, "HERE", tmp_path)
  reference.generate()
  text = "\n".join(path.read_text() for path in (tmp_path / "api").glob("*.md"))
  assert [n for n in reference.PUBLIC[1:] if f"\n## {n}\n" not in text] == []
  assert "train(task: Task | Callable[..., Task] | str, method: Method | str" in text
  assert "check_method(method: Method" in text


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_every_entry_of_the_catalogue_has_an_example_that_builds_and_a_text(kind, name):
  spec = examples.of(kind, name)
  assert spec.startswith(f"{name}(")
  examples.built(kind, spec)
  assert docstrings.parse(registry.lookup((kind,), name)).body


def test_groups_name_what_is_registered():
  for kind, groups in examples.GROUPS.items():
    placed = [name for names in groups.values() for name in names]
    assert sorted(placed) == sorted(TABLE[kind])


def test_bytes_are_those_of_the_library():
  compressor: Compressor = research.int8()
  assert sum(array.bytes for array in facts.payload(compressor)) == 10**6 + 4 * 3907
  exact: Aggregator = research.mean()
  assert facts.exchange(exact).total == 2 * 7 / 8 * 4 * 10**6
  warm = registry.build("method", "onebit_adam(0.01, error_feedback(two_phase(int8())), warm_up=3)")
  stretches, axes = facts.rounds_of(warm)
  assert [count for count, _ in stretches] == [3, facts.SHOWN - 3]
  assert stretches[0][1] > stretches[1][1]
  assert axes == facts.FLAT


def test_a_method_that_needs_slices_is_measured_on_slices():
  spec = examples.of("method", "hierarchical_local_sgd")
  assert facts.rounds_of(registry.build("method", spec))[1] == facts.SLICED


@pytest.mark.parametrize(
  ("plain", "typeset"),
  [
    ("x_{t+1} = x_t - eta g_i^2", r"x_{t+1} = x_{t} - \eta\,g_{i}^{2}"),
    ("value = 1/W sum_i D(C(x_i))", r"\mathrm{value} = \tfrac{1}{W} \sum_{i}\,D(C(x_{i}))"),
    ("||C(x) - x||^2 <= 2^-16", r"\|C(x) - x\|^{2} \le 2^{-16}"),
    ("x_(1)_k <= sqrt(v_t + eps)", r"x_{(1),k} \le \sqrt{v_{t} + \epsilon}"),
    ("c_i <- c_i+", r"c_{i} \leftarrow c_{i}^{+}"),
    ("2^floor(log2 |x|)", r"2^{\lfloor \log_2 |x|\rfloor }"),
    ("x_i if i in U", r"x_{i}\ \mathrm{if}\ i\,\in\,U"),
    ("the support is in the leaf", None),
  ],
)
def test_recursions_are_typeset_as_they_are_written(plain, typeset):
  found = mathematics.inline(plain)
  if typeset is None:
    assert r"\in" not in found
  else:
    assert found == typeset


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_typeset_recursions_balance(kind, name):
  for text in docstrings.parse(registry.lookup((kind,), name)).body:
    if text.startswith("    ") and not docstrings._CODE.match(text):
      found = mathematics.latex(text).replace("\\{", "").replace("\\}", "")
      depths = [found[:end].count("{") - found[:end].count("}") for end in range(len(found) + 1)]
      assert depths[-1] == 0
      assert min(depths) >= 0
