"""The aggregators of the catalogue, built, and which wrappers refuse which of them."""

import ast
import inspect
from typing import Any

import catalogue

from research.aggregate import composition
from research.core import registry
from research.core.builtin import TABLE

FLAT, SLICED, PLAIN = catalogue.EXCHANGES, catalogue.SLICED_EXCHANGES, catalogue.PIECES
SPECS = FLAT | SLICED
# Those in which a worker's number matters: it lies, or draws with a key of its own.
NUMBERED = (
  "diana", "sign_flip", "gaussian", "a_little_is_enough", "inner_product", "noisy",
  "secure_sum",
)  # fmt: skip


REFUSED = composition.refused()
AGGREGATORS = {name: registry.build("aggregator", spec) for name, spec in (SPECS | PLAIN).items()}


def refusal(wrapper: str, name: str) -> str | None:
  """Why the wrapper does not go with an entry, if it does not."""
  traits = AGGREGATORS[name].traits
  rows = (row for row in REFUSED if wrapper in row[0] and row[1] in traits)
  return next((why for _, _, why in rows), None)


def names_in(spec: str) -> set[str]:
  """The aggregators that a spec calls."""
  return {call.func.id for call in _calls(ast.parse(spec, mode="eval"))}


def between_slices(spec: str) -> str:
  """The spec with each aggregator over the slow axis alone, as `hierarchical` wants it."""
  tree = ast.parse(spec, mode="eval")
  for call in _calls(tree):
    takes = inspect.signature(registry.lookup(("aggregator",), call.func.id)).parameters
    if "axis" in takes and "axis" not in [keyword.arg for keyword in call.keywords]:
      call.keywords.append(ast.keyword("axis", ast.Constant("slice")))
  return ast.unparse(tree)


def _calls(tree: ast.AST) -> list[Any]:
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
  return [c for c in calls if getattr(c.func, "id", None) in TABLE["aggregator"]]
