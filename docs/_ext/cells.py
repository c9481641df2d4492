"""Translated pages use the executed cells of the original page.

A page in a folder `zh` is the translation of the page of the same name in the parent folder. In it,
a line `{cell} NAME` stands for the original's code cell with the option `:name: NAME`. The line is
replaced when Sphinx reads the page, so that the code is written once, and the cache of executed
notebooks finds both pages by the same cells. A line break between two Chinese characters is
removed, since HTML would show it as a space. The line that opens a `:::` block stays as it is.
"""

import re
from pathlib import Path
from typing import Any

LANGUAGES = ("zh",)
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(?:(?!```$).*\n)*?```$", re.MULTILINE)
NAME = re.compile(r"^:name: *(\S+) *$", re.MULTILINE)
PLACEHOLDER = re.compile(r"^\{cell\} *(\S+) *$", re.MULTILINE)
_CHINESE = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
BREAK = re.compile(rf"(^:::.*\n)|(?<={_CHINESE})\n *(?={_CHINESE})", re.MULTILINE)


def cells(text: str) -> dict[str, str]:
  """Returns the code cells of a page by name, in order.

  Args:
    text: the source of the page.

  Raises:
    ValueError: if a cell has no name, or two cells have the same name.
  """
  found: dict[str, str] = {}
  for cell in CELL.findall(text):
    name = NAME.search(cell)
    if name is None:
      raise ValueError(f"a code cell has no option `:name:`:\n{cell}")
    if name[1] in found:
      raise ValueError(f"two code cells have the name {name[1]}")
    found[name[1]] = cell
  return found


def original(path: Path) -> Path | None:
  """Returns the page of which a page is the translation; None if the page is an original."""
  if path.parent.name not in LANGUAGES:
    return None
  found = path.parent.parent / path.name
  return found if found.exists() else None


def filled(text: str, source: str) -> str:
  """Returns a translated page with the cells of its original.

  Args:
    text: the source of the translated page.
    source: the source of the original page.

  Raises:
    ValueError: if the original has no cell with a name.
  """
  known = cells(source)

  def cell(match: re.Match[str]) -> str:
    if match[1] not in known:
      raise ValueError(f"{{cell}} {match[1]}: the original has {', '.join(known) or 'no cells'}")
    return known[match[1]]

  return PLACEHOLDER.sub(cell, BREAK.sub(r"\1", text))


def _read(app: Any, name: str, content: list[str]) -> None:
  """Fills a page when Sphinx reads it; the page is rebuilt when its original changes."""
  path = original(Path(app.env.doc2path(name)))
  if path is not None:
    app.env.note_dependency(str(path))
    content[0] = filled(content[0], path.read_text(encoding="utf-8"))


def setup(app: Any) -> dict[str, Any]:
  """Registers the extension with Sphinx."""
  app.connect("source-read", _read)
  return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
