"""Converts docstrings of this codebase to MyST Markdown: prose, recursions, and sections.

A docstring is a summary line, paragraphs, blocks indented by four spaces, and the sections Args,
Returns, Raises, Attributes and Reference. Blocks are recursions or code.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import mathematics

from research.core.base import EVERYONE

Link = Callable[[str], str]  # a name in backticks -> its Markdown
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Example", "Reference", "References")
_HEAD = re.compile(rf"^({'|'.join(SECTIONS)}):\s*(.*)$")
_CODE = re.compile(r"^\s*(--|@|def |class |import |from |method = |task = |optimizer = |build\()")
# From a norm to the last norm of a sentence: E ||C(x) - x||^2 <= (1 - k / n) ||x||^2; or a
# letter with an index: c_i, v_{t+1}.
_FORMULAS = re.compile(
  r"((?:\bE )?\|\|[^.;]*\|\|(?:\^2|_1)?"
  r"|(?<![\w^{.])[A-Za-z]_(?:\{[^{}]+\}|[A-Za-z]{1,2}(?!\w)|\d(?!\w)))"
)


class Docstring(NamedTuple):
  """A parsed docstring; all texts are plain, not yet Markdown."""

  body: list[str]  # paragraphs and blocks; blocks keep their indentation
  args: list[tuple[str, str]]  # (name, text)
  returns: str
  raises: list[tuple[str, str]]
  reference: str
  example: str = ""  # code


def parse(obj: Any) -> Docstring:
  """Parses the docstring of an object that has its own docstring."""
  text = own(obj)
  sections: dict[str, list[str]] = {"": []}
  current = sections[""]
  for line in text.splitlines():
    if found := _HEAD.match(line):
      current = sections.setdefault(found[1], [])
      current += [found[2]] if found[2] else []
    else:
      current.append(line)
  attributes = _items(sections.get("Attributes", []))
  return Docstring(
    _paragraphs(sections[""]),
    _items(sections.get("Args", [])) or attributes,
    _joined(sections.get("Returns", [])),
    _items(sections.get("Raises", [])),
    _joined(sections.get("Reference", []) + sections.get("References", [])),
    inspect.cleandoc("\n".join(sections.get("Example", []))).replace(">>> ", ""),
  )


def own(obj: Any) -> str:
  """Returns the text of an object's own docstring; '' if there is none."""
  return inspect.cleandoc(obj.__doc__ or "") if getattr(obj, "__doc__", None) else ""


def _paragraphs(lines: list[str]) -> list[str]:
  found: list[list[str]] = [[]]
  for line in lines:
    if not line.strip():
      found.append([])
    else:
      found[-1].append(line)
  return ["\n".join(part) for part in found if part]


def _items(lines: list[str]) -> list[tuple[str, str]]:
  """Returns the entries `name: text` of a section, each with its continuation lines."""
  found: list[tuple[str, list[str]]] = []
  for line in filter(str.strip, lines):
    entry = re.match(r"^ {0,2}(\*{0,2}[\w.]+): (.*)$", line)
    if entry:
      found.append((entry[1], [entry[2]]))
    elif found:
      found[-1][1].append(line.strip())
    else:
      found.append(("", [line.strip()]))
  return [(name, " ".join(text)) for name, text in found]


def _joined(lines: list[str]) -> str:
  return " ".join(line.strip() for line in lines if line.strip())


def markdown(doc: Docstring, link: Link, is_mathematics: bool) -> str:
  """Formats the summary, paragraphs and blocks of a docstring as Markdown.

  Args:
    doc: the docstring.
    link: maps a name in backticks to Markdown, with a link if there is a target.
    is_mathematics: whether indented blocks are recursions, not code.
  """
  parts = []
  for text in doc.body:
    if text.startswith("    ") and (not is_mathematics or _CODE.match(text)):
      parts.append(f"```python\n{inspect.cleandoc(text)}\n```")
    elif text.startswith("    "):
      parts.append(f"```{{math}}\n{mathematics.latex(text)}\n```")
    elif "\n    " in text and _is_mixed(text):
      parts += _split(text, link, is_mathematics)
    else:
      parts.append(prose(text, link))
  return "\n\n".join(parts)


def _is_mixed(text: str) -> bool:
  return any(line.startswith("    ") for line in text.splitlines()[1:])


def _split(text: str, link: Link, is_mathematics: bool) -> list[str]:
  """Splits a paragraph from a block that follows without a blank line."""
  lines = text.splitlines()
  first = next(i for i, line in enumerate(lines) if line.startswith("    "))
  parts = ["\n".join(lines[:first]), "\n".join(lines[first:])]
  return [markdown(Docstring([part], [], "", [], ""), link, is_mathematics) for part in parts]


def prose(text: str, link: Link) -> str:
  """Formats a paragraph or list as Markdown; names in backticks are code, all else is text."""
  lines = [line.strip() for line in text.splitlines()]
  is_list = any(line.startswith("- ") for line in lines)
  flowing = ("\n" if is_list else " ").join(lines)
  return "".join(_piece(part, link) for part in re.split(r"(`[^`]+`)", flowing))


def _piece(text: str, link: Link) -> str:
  """Formats a name in backticks as code, or typesets the formulas of a text."""
  if text.startswith("`"):
    return link(text[1:-1])
  parts = _FORMULAS.split(text)
  shown = [f"${mathematics.inline(p)}$" if i % 2 else escaped(p) for i, p in enumerate(parts)]
  return "".join(shown)


def escaped(text: str) -> str:
  """Escapes the special characters of Markdown in a text, and links arXiv numbers."""
  text = re.sub(r"([\\*_\[\]<>$#~{}|])", r"\\\1", text)
  linked = r"[arXiv:\1](https://arxiv.org/abs/\1)"
  return re.sub(r"arXiv[: ](\d{4}\.\d{4,5})", linked, text)


# ---- signatures


@functools.cache
def signature(factory: Callable[..., Any], name: str) -> str:
  """Formats the call of a factory with types and defaults, on one line or one line per parameter.

  Types are copied from the source, so an alias such as `Params` keeps its name.
  """
  written, kinds = annotations(factory), []
  parameters = []
  for parameter in inspect.signature(factory).parameters.values():
    parameters.append(_parameter(parameter, written.get(parameter.name, "")))
    kinds.append(parameter.kind)
  if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
    parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
  line = f"{name}({', '.join(parameters)})"
  if len(line) <= 78:
    return line
  return f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + ")"


def annotations(factory: Callable[..., Any]) -> dict[str, str]:
  """Returns the types of a function's parameters or a class's fields, copied from the source."""
  if inspect.isclass(factory):
    found: dict[str, str] = {}
    for cls in reversed(factory.__mro__):
      if cls is not object and cls.__module__.startswith("research."):
        found |= _of_class(cls)
    return found
  node = _definition(factory)
  arguments = node.args
  every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
  every += [one for one in (arguments.vararg, arguments.kwarg) if one]
  named = {one.arg: _plain(one.annotation) for one in every if one.annotation}
  return named | ({"return": _plain(node.returns)} if node.returns else {})


def _of_class(cls: type) -> dict[str, str]:
  body = _definition(cls).body
  fields = [node for node in body if isinstance(node, ast.AnnAssign)]
  found = {n.target.id: _plain(n.annotation) for n in fields if isinstance(n.target, ast.Name)}
  own_init = vars(cls).get("__init__")
  if own_init and not dataclasses.is_dataclass(cls):
    found |= annotations(own_init)
  return found


def _definition(obj: Any) -> Any:
  return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]


def _plain(annotation: ast.expr | None) -> str:
  """Formats a type without the modules of its names and without quotes."""
  text = ast.unparse(annotation) if annotation else ""
  text = re.sub(r"'([\w.\[\], |]+)'", r"\1", text)
  return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)


def _parameter(parameter: inspect.Parameter, annotation: str) -> str:
  star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
  text = star + parameter.name + (f": {annotation}" if annotation else "")
  if parameter.default is parameter.empty:
    return text
  default = "EVERYONE" if parameter.default is EVERYONE else repr(parameter.default)
  return f"{text} = {default}" if annotation else f"{text}={default}"


def linking(link: Link, doc: Docstring, obj: Any) -> Link:
  """Wraps `link` so that an object's own parameters, fields and methods are not linked."""
  own_names = {name for name, _ in doc.args} | {*getattr(obj, "_fields", ())}
  own_names |= {*vars(obj)} if inspect.isclass(obj) else set()
  return lambda name: f"`{name}`" if name in own_names else link(name)
