"""Writes generated pages, whose files change only when their text does, and Markdown tables."""

from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parents[1]
ROOT = HERE.parent


class Writer:
  """Writes the pages of one folder; unchanged pages keep their time stamp and are not rebuilt."""

  def __init__(self, folder: Path):
    self.folder = folder

  def __call__(self, name: str, text: str) -> None:
    """Writes a page.

    Args:
      name: the page's file name, without .md.
      text: Markdown.
    """
    path = self.folder / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
      path.write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Formats a Markdown table; bars within cells must be escaped."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float) -> str:
  """Formats a count with thousands separators, and with one decimal place if it is no integer."""
  return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
