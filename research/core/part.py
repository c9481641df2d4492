"""Defines the base class of objects built from specs: frozen dataclasses whose repr is a spec."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, dataclass_transform

Kind = TypeVar("Kind")
Function = TypeVar("Function", bound=Callable[..., Any])
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_RESERVED = ("title", "spec_name", "refuses", "adds")


def hidden(default: Any, *, init: Literal[False] = False) -> Any:
  """Declares a field that only executors and wrappers set: specs cannot set it, and repr omits it.

  Args:
    default: the value of the field in a new object.
    init: False, which tells type checkers that the constructor does not take the field.
  """
  return dataclasses.field(default=default, init=init, repr=False)


def required(method: Function) -> Function:
  """Marks a method that subclasses must define; calling it raises an error that names the subclass.

  The method is not abstract, because a Part that defines certain other methods does not need it.

  Args:
    method: the method.
  """

  @functools.wraps(method)
  def missing(self: Any, *args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    raise NotImplementedError(f"{type(self).__name__} has no {method.__name__}")

  return cast(Function, missing)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, hidden))
class Part:
  """A frozen dataclass whose repr is its spec.

  Subclasses become dataclasses automatically. `name` is the name of the constructor in specs:

      class Halved(Compressor, name="halved"):
        factor: float = 0.5

      halved = Halved

  `check` rejects arguments that are out of range; it runs whenever an object is built or replaced.
  """

  spec_name: ClassVar[str] = ""
  title: ClassVar[str] = "Part"  # name in error messages: the name in specs or the class name

  def __init_subclass__(cls, name: str = "", **kwargs: Any):
    super().__init_subclass__(**kwargs)
    cls.spec_name = name
    if "title" not in vars(cls):
      cls.title = name or cls.__name__
    dataclasses.dataclass(frozen=True, repr=False)(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
      if field.name in inspect.get_annotations(cls):
        _check_name(cls, field.name)
    known = vars(cls)["__dataclass_fields__"]
    for declared in set(known) - {field.name for field in dataclasses.fields(cls)}:  # pyright: ignore[reportArgumentType]
      del known[declared]  # ClassVars must not determine the order of a subclass's fields

  def __post_init__(self):
    for name, value in self.fields().items():
      object.__setattr__(self, name, _frozen(value))
    self.check()

  def check(self) -> None:
    """Rejects arguments that are out of range.

    Raises:
      ValueError: if an argument is out of range; the message is one line that contains the name,
        the value and the legal range.
    """

  def replace(self, **changes: Any) -> Self:
    """Returns a checked copy in which some fields, possibly hidden ones, have other values.

    Raises:
      TypeError: if there is no such field.
      ValueError: if `check` rejects the copy.
    """
    fresh = object.__new__(type(self))
    for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
      value = changes.pop(field.name) if field.name in changes else getattr(self, field.name)
      object.__setattr__(fresh, field.name, value)
    if changes:
      raise TypeError(f"{type(self).__name__} has no field {', '.join(changes)}")
    fresh.__post_init__()
    return fresh

  def fields(self) -> dict[str, Any]:
    """Returns all fields by name, including hidden ones."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]

  def values(self) -> Iterator[Any]:
    """Yields the values of all fields, and the elements of tuples and dictionaries."""
    return _flat(tuple(self.fields().values()))

  def parts(self, kind: type[Kind]) -> Iterator[Kind]:
    """Yields all objects of a type within this object, at any depth, including itself."""
    if isinstance(self, kind):
      yield self
    for value in self.values():
      if isinstance(value, Part):
        yield from value.parts(kind)

  def __repr__(self) -> str:
    shown = []
    for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
      value, default = getattr(self, field.name), field.default
      if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
      if field.init and not _equal(_frozen(default), value):
        optional = field.kw_only or default is not dataclasses.MISSING
        shown.append(f"{field.name}={_shown(value)}" if optional else _shown(value))
    return f"{self.title}({', '.join(shown)})"


def _check_name(cls: type, name: str) -> None:
  """Rejects a field that would hide a method of its base classes.

  Raises:
    TypeError: if the field would hide a method; the message names the class and the field.
  """
  kinds = types.FunctionType | property
  hides = any(isinstance(inspect.getattr_static(b, name, None), kinds) for b in cls.__mro__[1:])
  if hides or name in _RESERVED:
    raise TypeError(
      f"{cls.__name__}: '{name}' is a method of its base class, not a name for a field"
    )


def defined_at(cls: type, name: str) -> int:
  """Returns the position, in a class's method resolution order, of the class that defines a name.

  Args:
    cls: the class.
    name: the name of an attribute.

  Returns:
    The position; 0 means the class itself.
  """
  return next(place for place, base in enumerate(cls.__mro__) if name in vars(base))


def _flat(value: Any) -> Iterator[Any]:
  if type(value) is tuple or isinstance(value, dict):
    for one in value.values() if isinstance(value, dict) else value:
      yield from _flat(one)
  else:
    yield value


def _equal(a: Any, b: Any) -> bool:
  """Returns whether two values are known to be equal; False if their comparison yields an array."""
  try:
    return bool(a == b)
  except (TypeError, ValueError):
    return False


def _frozen(value: Any) -> Any:
  """Converts lists to tuples, so that the object is hashable."""
  if type(value) is dict:
    return {name: _frozen(one) for name, one in value.items()}
  return tuple(map(_frozen, value)) if type(value) in (list, tuple) else value


def _shown(value: Any) -> str:
  """Writes a value as in a spec, with <> around arrays and objects that have no spec."""
  if type(value) is tuple:
    return f"[{', '.join(map(_shown, value))}]"
  if isinstance(value, _FUNCTIONS) or type(value).__repr__ is object.__repr__:
    name = str(getattr(value, "__name__", type(value).__name__))
    return f"<{name.strip('<>')}>"
  if hasattr(value, "_fields") and hasattr(value, "update") and "function" in repr(value):
    return "<optimizer>"  # from optax: nameless functions that capture their arguments
  if getattr(value, "shape", ()):
    return f"<array of shape {list(value.shape)}>"
  return repr(value)
