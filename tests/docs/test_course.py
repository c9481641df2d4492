"""Course pages: a cell, a figure, a solved exercise; a translation has the cells of its page."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
COURSE = DOCS / "course"
PAGES = sorted(page for page in COURSE.glob("*.md") if page.name != "index.md")
TRANSLATED = sorted(page for page in COURSE.glob("zh/*.md") if page.name != "index.md")

_spec = importlib.util.spec_from_file_location("cells", DOCS / "_ext" / "cells.py")
assert _spec
assert _spec.loader
cells = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cells)

name = lambda page: page.stem


def listed(index: Path) -> set[str]:
  """The pages that an index names, one per line."""
  return set(re.findall(r"^([a-z_]+)$", index.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_has_a_cell_a_figure_and_a_solved_exercise(page):
  text = page.read_text()
  code = "".join(cells.cells(text).values())
  assert text.count("```{code-cell}") == len(cells.cells(text))
  assert "import research" in code
  assert "plt." in code
  assert ":::{admonition} Exercise" in text
  assert ":::{dropdown} Solution" in text
  assert "solution" in cells.cells(text)


@pytest.mark.parametrize("page", TRANSLATED, ids=name)
def test_a_translation_has_the_cells_of_its_original_in_order(page):
  original = cells.original(page)
  assert original
  text, known = page.read_text(), cells.cells(original.read_text())
  assert "{code-cell}" not in text
  assert cells.PLACEHOLDER.findall(text) == list(known)
  assert list(cells.cells(cells.filled(text, original.read_text()))) == list(known)
  for heading in (r"^#+ ", r"^:::\{"):
    count = lambda text, heading=heading: len(re.findall(heading, text, re.MULTILINE))
    assert count(text) == count(re.sub(cells.CELL, "", original.read_text()))


@pytest.mark.parametrize("folder", [COURSE, COURSE / "zh"], ids=["english", "chinese"])
def test_the_index_lists_every_page(folder):
  pages = {page.stem for page in folder.glob("*.md")} - {"index"}
  assert listed(folder / "index.md") == pages


def test_placeholders_become_cells_and_chinese_lines_are_joined():
  source = "```{code-cell}\n:name: one\n1\n```\n"
  assert cells.filled("a\n\n{cell} one\n", source) == f"a\n\n{source}"
  assert cells.filled("误差\n反馈\nSGD\n\n记忆\n", "") == "误差反馈\nSGD\n\n记忆\n"
  assert cells.filled("- 误差\n  反馈\n- 记忆\n", "") == "- 误差反馈\n- 记忆\n"
  block = ":::{admonition} 习题\n误差反馈\n:::\n"
  assert cells.filled(block, "") == block


def test_an_unknown_cell_is_an_error():
  source = "```{code-cell}\n:name: one\n1\n```\n"
  with pytest.raises(ValueError, match=r"\{cell\} two: the original has one"):
    cells.filled("{cell} two\n", source)
  with pytest.raises(ValueError, match="no option `:name:`"):
    cells.cells("```{code-cell}\n1\n```\n")
  with pytest.raises(ValueError, match="two code cells have the name one"):
    cells.cells(source + source)
