"""Writes docs/api/: the public names of `research`, `research.hooks` and `research.testing`."""

import ast
import dataclasses
import enum
import inspect
import io
import textwrap
import tokenize
from typing import Any

import docstrings
import entries
from pages import HERE, Writer

import research
from research import hooks, testing
from research.core.builtin import TABLE

# Page -> (title, introduction, parts of the library that define the public names).
_PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
  "training": (
    "Training",
    "`research.train` runs a method on a task and returns a `Result`. Every flag of the command "
    "line is an argument with the same name.",
    ("training", "tasks"),
  ),
  "core": (
    "Interfaces and registry",
    "The interfaces of compressors, aggregators, methods and tasks, and the registry that turns "
    "specs into objects.\n\n"
    "Signatures use these names: an `Array` is a JAX array, a `Key` is a typed key of "
    "`jax.random.key`, and a `Tree` is a pytree of arrays; `Params` and `State` are trees. A "
    "`Batch` is a dictionary of arrays `[examples, ...]`. `Axes` stands for a mesh axis or a "
    "sequence of mesh axes. A `Schedule` maps a step to a value.",
    ("core",),
  ),
  "optax": (
    "The optax interface",
    "Aggregators and methods work as optax transformations in a train step of your own inside "
    "`shard_map(..., check_vma=False)`.",
    ("optim", "parallel"),
  ),
  "compress": ("Compressors", "", ("compress",)),
  "aggregate": ("Aggregators", "", ("aggregate",)),
  "methods": ("Methods", "", ("methods",)),
  "topology": ("Topologies", "", ("comm",)),
  "models": ("Models", "", ("models",)),
}
PUBLIC: list[str] = vars(research)["__all__"]  # the stub file has no such list
_FIRST = ("train", "Result", "supervised", "build", "register", "Default", "Compressor")


def generate() -> None:
  """Writes all pages of the reference."""
  write = Writer(HERE / "api")
  for page, (title, intro, rooms) in _PAGES.items():
    write(page, _page(title, intro, names_of(rooms)))
  for page, module in (("testing", testing), ("hooks", hooks)):
    intro = docstrings.markdown(docstrings.parse(module), _code, False)
    parts = [f"# {page.title()}\n\n{intro}"]
    parts += [_entry(module, name, f"research.{page}") for name in sorted(module.__all__)]
    write(page, "\n\n".join(parts) + "\n")


def names_of(rooms: tuple[str, ...]) -> list[str]:
  """Returns the public names that are defined in some parts of the library."""
  modules = vars(research)["_MODULES"]
  found = [name for name, module in modules.items() if module.split(".")[1] in rooms]
  return sorted(found, key=lambda name: (name not in _FIRST, name.islower(), name.lower()))


def _page(title: str, intro: str, names: list[str]) -> str:
  intro = f"# {title}\n\n{intro}".strip()
  return "\n\n".join([intro, *(_entry(research, name, "research") for name in names)]) + "\n"


def link(name: str) -> str:
  """Formats a name in backticks as a reference to its entry on these pages."""
  if name in PUBLIC:
    return f"{{py:obj}}`research.{name}`"
  return f"`{name}`"


def _code(name: str) -> str:
  return f"`{name}`"


def _entry(module: Any, name: str, home: str) -> str:
  """Formats the heading of a name, which the table of contents shows, and its directive."""
  obj = getattr(module, name)
  kind = next((kind for kind in TABLE if name in TABLE[kind]), "")
  is_value = not (inspect.isclass(obj) or inspect.isroutine(obj))
  role = "data" if is_value else "class" if inspect.isclass(obj) and not kind else "function"
  return f"## {name}\n\n" + _directive(role, name, obj, f":module: {home}", kind, depth=0)


def _directive(role: str, name: str, obj: Any, option: str, kind: str, depth: int) -> str:
  fence = "`" * (7 - depth)
  signature = name if role in ("data", "attribute", "property") else _signature(obj, name)
  head = f"{fence}{{py:{role}}} {signature}"
  options = [line for line in (option, ":no-index-entry:" if depth else "") if line]
  body = _body(name, obj, kind, depth)
  return "\n".join([head, *options, "", body, fence])


def _signature(obj: Any, name: str) -> str:
  if inspect.isclass(obj) and not dataclasses.is_dataclass(obj):  # its fields are listed below
    return name
  try:
    shown = " ".join(docstrings.signature(obj, name).split())
  except ValueError:
    return name
  for before, after in (("( ", "("), (", )", ")"), ("(self, ", "("), ("(self)", "()")):
    shown = shown.replace(before, after)
  returns = "" if inspect.isclass(obj) else docstrings.annotations(obj).get("return", "")
  return f"{shown} -> {returns}" if returns else shown


def _body(name: str, obj: Any, kind: str, depth: int) -> str:
  if not (inspect.isclass(obj) or inspect.isroutine(obj) or isinstance(obj, property)):
    return f"`{obj!r}`"
  doc = docstrings.parse(obj)
  linked = docstrings.linking(link, doc, obj)
  if kind:  # the catalogue contains the full docstring
    summary = docstrings.markdown(doc._replace(body=doc.body[:1]), linked, True)
    parts = [summary, f"In the catalogue: {entries.link(name, '../catalogue/')}."]
  else:
    parts = [docstrings.markdown(doc, linked, False)]
  parts += _fields(doc, linked)
  if inspect.isclass(obj) and not kind and depth == 0:
    parts += _members(obj)
  return "\n\n".join(part for part in parts if part)


def _fields(doc: docstrings.Docstring, link: docstrings.Link) -> list[str]:
  items = [f"`{name}`\n: {docstrings.prose(text, link)}" for name, text in doc.args if name]
  parts = ["**Parameters**", "\n\n".join(items)] if items else []
  if doc.returns:
    parts.append(f"**Returns** {docstrings.prose(doc.returns, link)}")
  if doc.raises:
    named = [f"`{n}`: {docstrings.prose(text, link)}" if n else text for n, text in doc.raises]
    parts.append("**Raises**\n\n" + "\n".join(f"- {line}" for line in named))
  if doc.example:
    parts += ["**Example**", f"```python\n{doc.example}\n```"]
  if doc.reference:
    parts.append(f"**Reference** {docstrings.prose(doc.reference, link)}")
  return parts


def _members(cls: type) -> list[str]:
  """Lists fields with their comments, members of an enumeration, methods and properties."""
  fields = getattr(cls, "_fields", ())
  names = list(cls.__members__) if issubclass(cls, enum.Enum) else fields
  if names:
    types, comments = docstrings.annotations(cls), _comments(cls)
    items = [f"`{name}`\n: {_field(types.get(name), comments.get(name))}" for name in names]
    return ["**Fields**" if fields else "**Members**", "\n\n".join(items)]
  parts = []
  for name, value in vars(cls).items():
    target = getattr(value, "func", value)  # of a cached property
    is_property = isinstance(value, property) or target is not value
    if name.startswith("_") or not (inspect.isfunction(value) or is_property):
      continue
    if not inspect.getdoc(value):
      continue
    role = "property" if is_property else "method"
    parts.append(_directive(role, name, target, "", "", depth=1))
  return parts


def _field(annotation: str | None, comment: str | None) -> str:
  """Formats the type of a field and the comment next to it in the source."""
  parts = [f"`{annotation}`"] if annotation else []
  return "; ".join([*parts, *([docstrings.escaped(comment)] if comment else [])])


def _comments(cls: type) -> dict[str, str]:
  """Returns the comment on each field of a class: on the same line, or else above it."""
  source = textwrap.dedent(inspect.getsource(cls))
  notes = {
    token.start[0]: token.string.lstrip("# ")
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  found = {}
  for node in ast.parse(source).body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
    target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
    if not isinstance(target, ast.Name):
      continue
    text, line = notes.get(node.lineno, ""), node.lineno - 1
    while line in notes and _alone(source, line):
      text, line = f"{notes[line]} {text}".strip(), line - 1
    found[target.id] = text
  return found


def _alone(source: str, line: int) -> bool:
  return source.splitlines()[line - 1].lstrip().startswith("#")
