"""Sphinx extension: writes the generated pages before a build reads its sources."""

from typing import Any

import advice
import claims
import entries
import reference


def generate(app: Any) -> None:
  """Writes the catalogue, the API reference, the results and the numbers of the advisor."""
  if not app.config.generate_pages:
    return
  advice.generate()
  entries.generate()
  claims.generate()
  reference.generate()


def setup(app: Any) -> dict[str, Any]:
  """Called by Sphinx."""
  # `-D generate_pages=0` keeps the pages of an earlier build, and the doctrees that it has read.
  app.add_config_value("generate_pages", True, "", types=[bool])
  app.connect("builder-inited", generate)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
