"""Imports go one way, from the algorithms up to the experiments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("comm", "compress", "aggregate", "methods", "parallel", "train")
# What all may import: the types, what a user typed, whose mistake an exception is.
EVERYWHERE = {"base", "text", "blame"}
# What each room may import besides itself and these; registry names modules in strings.
ALLOWED: dict[str, set[str]] = {layer: set(LAYERS[:place]) for place, layer in enumerate(LAYERS)}
ALLOWED |= {"models": set(), "tasks": {"paths"}, "paths": set()}
ALLOWED |= {room: {"text"} for room in EVERYWHERE}
ALLOWED["registry"] = {"comm", "compress", "aggregate", "methods", "models", "tasks"}
ALLOWED["train"] |= {"registry", "tasks", "paths"}  # assemble.py: from flags to parts
ALLOWED["server"] = {*LAYERS, "registry", "tasks", "paths"}

FILES = sorted((ROOT / "research").rglob("*.py"))


def imported(path: Path) -> set[str]:
  """The rooms of research that a file imports, wherever in it the import stands."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      module = node.module or ""
      names = [f"{module}.{alias.name}" for alias in node.names]
      found |= set(names) if module == "research" else {module}
  parts = [name.split(".") for name in found]
  return {part[1] for part in parts if part[0] == "research" and len(part) > 1} | {
    "experiments" for part in parts if part[0] == "experiments"
  }


def room(path: Path) -> str:
  return path.relative_to(ROOT / "research").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
  here = room(path)
  also = {here} if here in EVERYWHERE else {here, *EVERYWHERE}
  assert imported(path) <= ALLOWED[here] | also


def test_every_room_is_known():
  assert {room(path) for path in FILES} <= set(ALLOWED)


def test_an_upward_import_is_seen(tmp_path):
  file = tmp_path / "wrong.py"
  file.write_text("def f():\n  from research.train import loop\n  import experiments.run\n")
  assert imported(file) == {"train", "experiments"}


def test_no_file_is_a_drawer():
  names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
  assert not names & {"utils", "util", "helpers", "common", "misc"}
