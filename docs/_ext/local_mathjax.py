"""Sphinx extension: copies MathJax from the package sphinx-mathjax-offline into the site.

Only the part that typesets TeX and its fonts are copied, so that pages need no network.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

_PACKAGE = "sphinx-mathjax-offline"  # also the name on disk, so no statement can import it


def _copy(app: Any, error: BaseException | None) -> None:
  if error is not None or app.builder.format != "html":
    return
  spec = importlib.util.find_spec(_PACKAGE)
  if spec is None or spec.origin is None:
    raise ModuleNotFoundError(f'{_PACKAGE}: pip install -e ".[docs]"')
  source = Path(spec.origin).parent / "static" / "mathjax"
  target = Path(app.outdir) / "_static" / "mathjax"
  fonts = Path("output", "chtml", "fonts")
  target.mkdir(parents=True, exist_ok=True)
  shutil.copy(source / "tex-chtml.js", target)
  shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)


def setup(app: Any) -> dict[str, Any]:
  """Called by Sphinx."""
  app.connect("build-finished", _copy)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
