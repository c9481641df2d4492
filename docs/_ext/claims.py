"""Writes docs/results/claims/: a page per claim, from results/ and experiments/claims/."""

import ast
import functools
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import docstrings
from pages import HERE, ROOT, Writer, table

_PARAGRAPHS = re.compile(r"\n\s*\n")
_VERDICTS = {"holds": "holds", "fails": "**fails**"}


@functools.cache
def records() -> dict[str, dict[str, Any]]:
  """Reads the result of each claim, by name."""
  found = {}
  for path in sorted((ROOT / "results").glob("*/result.json")):
    record = json.loads(path.read_text(encoding="utf-8"))
    if "claim" in record:
      found[record["claim"]] = record
  return found


def generate() -> None:
  """Writes the overview and the pages."""
  write = Writer(HERE / "results" / "claims")
  for name, record in records().items():
    write(name, _page(name, record))
  write("index", _overview())


def names_in(record: dict[str, Any]) -> str:
  """Returns the spec strings of a claim's runs and the string literals of its module."""
  fields = ("method", "task", "model", "partition")
  specs = [str(run.get(field, "")) for run in record["runs"] for field in fields]
  literals = [
    node.value
    for node in ast.walk(ast.parse(_module(record["claim"]).read_text(encoding="utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  ]
  return " ".join([*specs, record["dataset"], *literals[1:]])


def _module(name: str) -> Path:
  return ROOT / "experiments" / "claims" / f"{name}.py"


def _overview() -> str:
  intro = (HERE / "_ext" / "intros" / "claims.md").read_text(encoding="utf-8").strip()
  rows = []
  for name, record in records().items():
    gates = [gate for gate in record["gates"] if gate["applies"]]
    held = sum(gate["holds"] for gate in gates)
    rows.append(
      [
        f"[{name}]({name}.md)",
        docstrings.escaped(record["title"]),
        f"{_VERDICTS[record['verdict']]}, {held} of {len(gates)} gates",
        f"{record['seconds']:.0f} s",
      ]
    )
  shown = table(["claim", "what it says", "verdict here", "duration"], rows)
  entries = "\n".join(f"{name} <{name}>" for name in records())
  toctree = f"```{{toctree}}\n:hidden:\n\n{entries}\n```"
  return f"{intro}\n\n{shown}\n\n{toctree}\n"


def _page(name: str, record: dict[str, Any]) -> str:
  doc = inspect.cleandoc(ast.get_docstring(ast.parse(_module(name).read_text())) or "")
  shown = (ROOT / "results" / name / "table.md").read_text(encoding="utf-8")
  shown = shown.split("\n", 1)[1].rsplit("\n\n", 2)[0]  # without the title and the command
  parts = [
    f"# {docstrings.escaped(record['title'])}",
    *map(_paragraph, _PARAGRAPHS.split(doc)[1:]),
    f"**Verdict: {record['verdict']}** ({record['seeds']} seed{'s' * (record['seeds'] > 1)}, "
    f"{record['seconds']:.0f} s).",
    f"```bash\n{record['command']}\n```",
    f"```{{figure}} ../../../results/{name}/figure.png\n:alt: {record['title']}\n```",
    shown.strip(),
    "## Specs",
    _specs(record),
    "## Provenance",
    provenance(record["environment"]),
  ]
  return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
  head, colon, rest = text.partition(":")
  plain = lambda name: f"`{name}`"
  if colon and head in ("Paper", "Papers", "Same", "Scaled"):
    title = {"Same": "As in the paper", "Scaled": "Scaled down"}.get(head, head)
    return f"**{title}:** {docstrings.prose(rest.strip(), plain)}"
  return docstrings.prose(text, plain)


def _specs(record: dict[str, Any]) -> str:
  methods = list(dict.fromkeys(str(run.get("method", "")) for run in record["runs"]))
  methods = [method for method in methods if method]
  if not methods:
    return "The claim computes its numbers directly; it runs no spec."
  shown = methods[:12]
  more = f"\n# and {len(methods) - 12} more" if len(methods) > 12 else ""
  task = f"Data: `{record['dataset']}`. Methods:\n\n" if record["dataset"] else ""
  return f"{task}```python\n" + "\n".join(shown) + more + "\n```"


def provenance(environment: dict[str, Any]) -> str:
  """Formats the commit, hardware and versions of a measurement as a list."""
  versions = environment.get("versions") or {
    name: environment[name]
    for name in ("jax", "flax", "optax", "orbax-checkpoint")
    if name in environment
  }
  hardware = environment.get("hardware") or (
    f"{environment.get('device', environment.get('backend', 'cpu'))}, "
    f"{environment.get('cores')} cores, {environment.get('processor', '')}".rstrip(", ")
  )
  lines = [
    f"- commit `{environment['commit']}`",
    f"- hardware: {hardware}",
    f"- Python {environment.get('python')}, "
    + ", ".join(f"{name} {version}" for name, version in versions.items()),
  ]
  if command := environment.get("command"):
    words = command.split() if isinstance(command, str) else command
    text = shlex.join(["python", *(word for word in words if not word.startswith("--out="))])
    lines.append(f"- command: `{text}`")
  return "\n".join(lines)
