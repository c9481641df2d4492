"""Imports go one way, from the algorithms up to the experiments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# To the left of each: what it may import.
LAYERS = (
  "core",
  "comm",
  "compress",
  "aggregate",
  "optim",
  "methods",
  "parallel",
  "training",
  "server",
  "command",
)
ALLOWED: dict[str, set[str]] = {layer: set(LAYERS[:place]) for place, layer in enumerate(LAYERS)}
# Beside the line: reading programs, virtual time, models and tasks.
ALLOWED |= {"analysis": {"core", "comm"}, "sim": {"core", "comm"}}
ALLOWED |= {"models": {"core"}, "tasks": {"core"}}
for layer in LAYERS[LAYERS.index("compress") :]:
  ALLOWED[layer] |= {"analysis", "sim"}
ALLOWED["training"] |= {"tasks"}
ALLOWED["server"] |= {"tasks"}
ALLOWED["command"] |= {"tasks"}
# Contracts that anyone may import.
ALLOWED["testing"] = {*LAYERS[: LAYERS.index("training")], "analysis", "sim", "tasks"}
ALLOWED["hooks"] = {"training"}
ALLOWED["__init__"] = set()  # its names are imported when they are used
ALLOWED["experiments"] = {*ALLOWED, "experiments", "launch"}
ALLOWED["launch"] = set(ALLOWED) - {"experiments"}
TOP = ("research", "experiments", "launch")

FILES = sorted(path for top in TOP for path in (ROOT / top).rglob("*.py"))


def imported(path: Path) -> set[str]:
  """The rooms that a file imports, wherever in it the import stands."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      module = node.module or ""
      names = [f"{module}.{alias.name}" for alias in node.names]
      found |= set(names) if module == "research" else {module}
  return {
    part[0] if part[0] != "research" else part[1]
    for part in (n.split(".") for n in found)
    if part[0] in TOP and (part[0] != "research" or len(part) > 1)
  }


def room(path: Path) -> str:
  top, first, *_ = path.relative_to(ROOT).parts
  return first.removesuffix(".py") if top == "research" else top


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
  here = room(path)
  assert imported(path) <= ALLOWED[here] | {here}


def test_every_room_is_known():
  assert {room(path) for path in FILES} <= set(ALLOWED)


def test_an_upward_import_is_seen(tmp_path):
  file = tmp_path / "wrong.py"
  file.write_text("def f():\n  from research.training import loop\n  import experiments.run\n")
  assert imported(file) == {"training", "experiments"}


def test_no_file_is_a_drawer():
  names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
  assert not names & {"utils", "util", "helpers", "common", "misc"}
