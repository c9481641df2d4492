"""Parses spec strings such as `diloco(adamw(3e-4), mean(), period=50)`, and writes them.

Flags, presets and result rows share one grammar: Python calls of names, whose arguments are
literals or nested calls. The text is parsed with `ast` and never evaluated. `registry` looks up the
names.
"""

import ast
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from research.core.text import QUOTED, one_line, quoted, shortened

_DEEPEST = 32  # maximum nesting of calls and lists


class Call(NamedTuple):
  """A parsed spec, with its name, its arguments and its text."""

  name: str
  args: list[Any]
  kwargs: dict[str, Any]
  text: str

  def __str__(self) -> str:
    return self.text

  def wrong(self, reason: object) -> ValueError:
    """Returns a one-line error about this call.

    Args:
      reason: what is wrong.
    """
    return ValueError(one_line(f"{one_line(self.text, QUOTED)}: {reason}"))

  def replace(self, **kwargs: Any) -> "Call":
    """Returns a copy of the call in which some keyword arguments are added or replaced.

    Args:
      **kwargs: the new keyword arguments, literals or calls.
    """
    return _called(self.name, *self.args, **{**self.kwargs, **kwargs})


class _Calls:
  """Creates calls: the text of `calls.sgd(0.1, momentum=0.9)` is `sgd(0.1, momentum=0.9)`.

  A program that sets flags composes a call from values and other calls, and passes the text of the
  call as a flag. Names are looked up only when the call is built.
  """

  def __getattr__(self, name: str) -> Callable[..., Call]:
    if name.startswith("_"):
      raise AttributeError(name)
    return functools.partial(_called, name)


calls = _Calls()


def _called(name: str, /, *args: Any, **kwargs: Any) -> Call:
  return Call(name, list(args), kwargs, written(Call(name, list(args), kwargs, "")))


# ---- from text


def parse(spec: str) -> Call:
  """Parses a spec without looking up its names.

  Args:
    spec: the text, such as "sgd(0.1, momentum=0.9)".

  Raises:
    ValueError: if the text is not a call whose arguments are literals and calls; the message
      contains the position of the error.
  """
  call = _Reader(spec).value()
  if not isinstance(call, Call):
    raise ValueError(f"{quoted(spec)} is not a call such as name(value, key=value)")
  return call


def literal(spec: str) -> Any:
  """Parses a number, string, list or dictionary that is written as in a spec.

  Args:
    spec: the text, such as "[0.1, 0.3]".

  Raises:
    ValueError: if the text is anything else.
  """
  value = _Reader(spec).value()
  if _holds_calls(value):
    raise ValueError(f"{quoted(spec)} is not a number, a text, a list or a dictionary")
  return value


def syntax(spec: str) -> ast.expr:
  """Parses a Python expression into its syntax tree.

  Args:
    spec: the text of the expression.

  Raises:
    ValueError: if the text is malformed or nested too deeply; the message contains the position of
      the error.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # such as "'str' object is not callable"
      return ast.parse(spec.strip(), mode="eval").body
  except SyntaxError as error:
    column = max((error.offset or 1) - 1, 0)
    raise ValueError(f"malformed at character {column + 1}: {one_line(error.msg)}") from error
  except (RecursionError, MemoryError) as error:
    raise ValueError("malformed: nested too deeply") from error
  except UnicodeEncodeError as error:
    raise ValueError(f"malformed at character {error.start + 1}: not a character") from error
  except ValueError as error:
    raise ValueError(f"malformed: {one_line(error)}") from error


class _Reader:
  """Converts a spec to a value."""

  def __init__(self, spec: str):
    self.spec = spec.strip()
    self.lines = [line.encode(errors="replace") for line in re.split("\r\n|\r|\n", self.spec)]

  def value(self) -> Any:
    return self._read(syntax(self.spec), 0)

  def _text(self, node: ast.expr) -> str:
    """Returns the part of the spec from which a node was parsed; Python's offsets count bytes."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    lines = self.lines[first : last + 1]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return b"\n".join(lines).decode()

  def _read(self, node: ast.expr, depth: int) -> Any:
    if depth > _DEEPEST:
      raise ValueError(f"malformed: calls or lists are nested more than {_DEEPEST} levels deep")
    inner = lambda node: self._read(node, depth + 1)
    match node:
      case ast.Constant(value=bool() | int() | float() | str() | None as value):
        return value
      case ast.UnaryOp(
        op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)
      ) if not isinstance(value, bool):
        return -value if isinstance(sign, ast.USub) else value
      case ast.List(elts=items) | ast.Tuple(elts=items):
        return [inner(item) for item in items]
      case ast.Dict(keys=keys, values=values):
        names = [inner(key) if key else None for key in keys]
        if not all(isinstance(name, int | float | str) for name in names):
          raise ValueError(
            f"the keys of {one_line(self._text(node), QUOTED)} are not numbers or texts"
          )
        _refuse_repeated(names, self._text(node))
        return dict(zip(names, map(inner, values), strict=True))
      case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(
        k.arg for k in keywords
      ):
        _refuse_repeated([k.arg for k in keywords], self._text(node))
        named = {str(k.arg): inner(k.value) for k in keywords}
        return Call(name, [inner(arg) for arg in args], named, self._text(node))
      case ast.Name(id=name):
        name = shortened(name)
        raise ValueError(f"'{name}' stands alone; write '{name}()', or quotes around a text")
    shown = one_line(self._text(node), QUOTED)
    raise ValueError(f"'{shown}' is not a number, a text, a list or a call of a name")


def _refuse_repeated(names: Sequence[Any], spec: str) -> None:
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"{one_line(spec, QUOTED)}: {quoted(twice)} is given twice")


def _holds_calls(value: Any) -> bool:
  if isinstance(value, list | dict):
    return any(map(_holds_calls, value.values() if isinstance(value, dict) else value))
  return isinstance(value, Call)


# ---- to text


def written(value: Any) -> str:
  """Returns the canonical text of a value; all spellings of a value have the same canonical text.

  Args:
    value: a parsed `Call`, a literal, a list or dictionary of calls and literals, or an object
      built from a spec, whose repr is its spec.
  """
  if isinstance(value, Call):
    named = [f"{name}={written(one)}" for name, one in value.kwargs.items()]
    return f"{value.name}({', '.join([*map(written, value.args), *named])})"
  if type(value) in (list, tuple):
    return f"[{', '.join(map(written, value))}]"
  if isinstance(value, dict):
    return f"{{{', '.join(f'{key!r}: {written(one)}' for key, one in value.items())}}}"
  return repr(value)


def of_call(name: str, parameters: Iterable[inspect.Parameter], values: Mapping[str, Any]) -> str:
  """Returns the canonical spec of a factory call.

  Arguments that equal their defaults are omitted; other optional arguments are written `key=value`,
  as in the repr of a `Part`.

  Args:
    name: the name of the factory.
    parameters: the factory's parameters, in order.
    values: the arguments by parameter name, with `*args` as a sequence and `**kwargs` as a mapping.
  """
  shown = []
  for parameter in (p for p in parameters if p.name in values):
    value = values[parameter.name]
    if parameter.kind == parameter.VAR_POSITIONAL:
      shown += map(written, value)
    elif parameter.kind == parameter.VAR_KEYWORD:
      shown += [f"{key}={written(one)}" for key, one in value.items()]
    elif parameter.default is parameter.empty and parameter.kind != parameter.KEYWORD_ONLY:
      shown.append(written(value))
    elif parameter.default != value:
      shown.append(f"{parameter.name}={written(value)}")
  return f"{name}({', '.join(shown)})"
