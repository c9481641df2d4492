"""Builds objects from specs; a spec may use built-in names, optax's names and registered names.

    @register("compressor")
    def halved(factor: float = 0.5) -> Compressor: ...

    build("aggregator", "gather_mean(halved(0.25))")

A name that is not built in may also come from an installed package: each entry point in the group
`research.plugins` names a module that registers its names when it is imported.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from research.core import arguments, blame, checks
from research.core.arguments import UnknownName
from research.core.builtin import TABLE
from research.core.spec import Call, of_call, parse
from research.core.text import listed, one_line, shortened

GROUP = "research.plugins"
OF_OPTAX = ("optimizer", "schedule")
KINDS = (*TABLE, *(kind for kind in OF_OPTAX if kind not in TABLE))

# Parameters that only flags of a command set, never a spec.
_OF_FLAGS = {"task": ("model", "data_dir")}
# The types of the objects that factories of a kind return.
_TYPES = {
  "compressor": "research.core.base:Compressor",
  "aggregator": "research.core.base:Aggregator",
  "method": "research.core.method:Method",
  "topology": "research.comm.topology:Topology",
  "delays": "research.sim.delays:Delays",
  "speeds": "research.sim.clock:Speeds",
  "network": "research.sim.network:Network",
  "churn": "research.sim.churn:Churn",
  "task": "research.core.task:Task",
}

Factory = TypeVar("Factory", bound=Callable[..., Any])

ADDED: dict[str, dict[str, Callable[..., Any]]] = {}  # kind -> name -> factory, by `register`


class NameTaken(ValueError):
  """Raised if a name is already registered."""


def register(kind: str, name: str | None = None) -> Callable[[Factory], Factory]:
  """Returns a decorator that registers a function or dataclass as a factory under a name for specs.

  A spec with a registered name is checked like one with a built-in name: the arguments must match
  the parameters' types, and the factory rejects values by raising ValueError. A task's keyword-only
  parameters `model` and `data_dir` are set by --model and --data_dir. If the same function is
  registered again, as after a reload, it replaces the earlier one.

  Args:
    kind: 'compressor', 'aggregator', 'method', 'task', 'model', 'partition', 'topology', 'delays',
      'speeds', 'network', 'churn', 'optimizer' or 'schedule'.
    name: the name in specs; None means the function's own name, or the `name` of a compressor,
      aggregator or method class.

  Returns:
    The decorator, which returns its argument unchanged.

  Raises:
    ValueError: if the kind is unknown, the name is not an identifier, or it is already taken.
  """
  checks.one_of("kind", kind, KINDS)

  def add(factory: Factory) -> Factory:
    chosen = name or getattr(factory, "spec_name", "") or factory.__name__
    if not chosen.isidentifier():
      raise ValueError(f"register({kind!r}, {chosen!r}): not a valid name in a spec")
    if (owner := _owner(kind, chosen)) and owner != _origin(factory):
      taken = f"the {kind} {chosen!r} is {owner} already; choose another name"
      raise NameTaken(f"register({kind!r}, {chosen!r}): {taken}")
    ADDED.setdefault(kind, {})[chosen] = factory
    return factory

  return add


def _owner(kind: str, name: str) -> str:
  """Returns the qualified name of the factory that has a name; '' if the name is unknown."""
  if name in TABLE.get(kind, ()):
    return TABLE[kind][name].replace(":", ".")
  if name in ADDED.get(kind, ()):
    return _origin(ADDED[kind][name])
  return f"optax.{name}" if kind in OF_OPTAX and name in _optax(kind) else ""


def _origin(factory: Callable[..., Any]) -> str:
  return f"{factory.__module__}.{factory.__qualname__}"


def _optax(kind: str) -> dict[str, Callable[..., Any]]:
  from research.core import optimizers

  return optimizers.factories(kind)


def names(kind: str) -> list[str]:
  """Returns the known names of a kind: built-in names, optax's names, and registered names.

  Args:
    kind: one of KINDS.
  """
  of_optax = _optax(kind) if kind in OF_OPTAX else ()
  return list(dict.fromkeys((*TABLE.get(kind, ()), *of_optax, *ADDED.get(kind, ()))))


@functools.cache
def load_installed() -> None:
  """Imports the modules with which installed packages register names, once per process."""
  for point in importlib.metadata.entry_points(group=GROUP):
    try:
      point.load()
    except Exception as error:  # a plugin may raise anything; the note names the entry point
      error.add_note(f"in the entry point {point.name} = {point.value} of {GROUP}")
      raise


def lookup(kinds: Sequence[str], name: str) -> Callable[..., Any]:
  """Returns the factory that has the given name.

  Args:
    kinds: the kinds to search, in this order.
    name: the name in a spec.

  Raises:
    ValueError: if the name is unknown; the message contains the closest match and the legal names.
  """
  return _find(kinds, name)[1]


def _find(kinds: Sequence[str], name: str) -> tuple[str, Callable[..., Any]]:
  """Returns the first kind that has the name, and its factory."""
  for attempt in (lambda: None, load_installed):
    attempt()
    for kind in kinds:
      if name in TABLE.get(kind, ()):
        module, attribute = TABLE[kind][name].split(":")
        return kind, getattr(importlib.import_module(module), attribute)
      if name in ADDED.get(kind, ()):
        return kind, ADDED[kind][name]
      if kind in OF_OPTAX and name in _optax(kind):
        return kind, _optax(kind)[name]
  legal = [known for kind in kinds for known in names(kind)]
  what = f"unknown {' or '.join(kinds)} '{shortened(name)}'"
  raise UnknownName(f"{what}{checks.hint(name, legal, cutoff=0.5)} legal: {listed(legal)}")


def build(kind: str, spec: str | Call, **bound: Any) -> Any:
  """Builds the object that a spec describes.

  Args:
    kind: one of KINDS.
    spec: the text of the spec, or a parsed call.
    **bound: the values of keyword-only parameters that a spec cannot set (a task's `model` and
      `data_dir`); they are ignored if the factory has no such parameters.

  Returns:
    The object. The repr of an optimizer or schedule is its spec.

  Raises:
    ValueError: if the spec is invalid; the message is one line that contains the value, the legal
      set and the closest match. A registered factory rejects values with a `raise` statement; its
      other errors are raised unchanged.
  """
  return _build((kind,), parse(spec) if isinstance(spec, str) else spec, bound)


def _build(kinds: Sequence[str], call: Call, bound: dict[str, Any]) -> Any:
  kind, factory = _find(kinds, call.name)
  signature = signature_of(factory)
  bound = {name: value for name, value in bound.items() if name in signature.parameters}
  apart = {*bound, *_OF_FLAGS.get(kind, ())}
  settable = {name: p for name, p in signature.parameters.items() if name not in apart}
  args, kwargs = arguments.matched(call, settable, lambda kinds, inner: _build(kinds, inner, {}))
  try:
    built = factory(*args, **kwargs, **bound)
    if kind == "optimizer":
      from research.core import optimizers

      optimizers.check(built)
  except (ValueError, TypeError, AssertionError, OverflowError) as error:
    if blame.fault(error) and not blame.is_choice(error):
      raise
    raise call.wrong(one_line(error, 300)) from error
  if problem := _not_of(kind, built):
    raise call.wrong(f"{call.name} returns {problem}")
  if kind in OF_OPTAX:
    from research.core import optimizers

    values = signature.bind(*args, **kwargs).arguments
    text = of_call(call.name, signature.parameters.values(), values)
    return optimizers.named(kind, built, text, optimizers.Made(factory, tuple(args), kwargs))
  return built


def _not_of(kind: str, built: Any) -> str:
  """Describes an object that is not of the given kind; '' if the object is of this kind."""
  if kind == "model":
    return "" if callable(built) else f"{type(built).__name__}, which is not a model"
  if kind not in _TYPES:
    return ""
  module, name = _TYPES[kind].split(":")
  fits = isinstance(built, getattr(importlib.import_module(module), name))
  return "" if fits else f"{type(built).__name__}, which is not a {name}"


def signature_of(factory: Callable[..., Any]) -> inspect.Signature:
  """Returns a factory's signature, with annotations evaluated if possible.

  Args:
    factory: a function or class.
  """
  try:
    return inspect.signature(factory, eval_str=True)
  except NameError:  # a type that is imported only for type checkers
    return inspect.signature(factory)


@dataclasses.dataclass(frozen=True)
class Default:
  """A default value that is given as a spec; the object is built when the value is called.

      def digits(*, model: Model = Default("model", "mlp(hidden=[128])")) -> Task: ...

  Args:
    kind: the kind of the object.
    spec: the spec of a callable object, such as a model, which is called with the number of
      outputs.
  """

  kind: str
  spec: str

  def __call__(self, *args: Any) -> Any:
    return build(self.kind, self.spec)(*args)

  def __repr__(self) -> str:
    return self.spec
