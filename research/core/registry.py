"""Names to objects: the built-in ones, optax's, and those that other packages register.

    @register("compressor")
    def halved(factor: float = 0.5) -> Compressor: ...

    build("aggregator", "gather_mean(halved(0.25))")

A name that is not built in is looked for in installed packages too: their entry points of the group
`research.plugins` each name a module, which registers its names when it is imported.
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
KINDS = (*TABLE, *OF_OPTAX)

# Parameters that the command's flags set, and no spec.
_OF_FLAGS = {"task": ("model", "data_dir")}
# What a factory of a kind returns.
_TYPES = {
  "compressor": "research.core.base:Compressor",
  "aggregator": "research.core.base:Aggregator",
  "method": "research.core.method:Method",
  "topology": "research.comm.topology:Topology",
  "delays": "research.sim.delays:Delays",
  "speeds": "research.sim.clock:Speeds",
  "task": "research.core.task:Task",
}

Factory = TypeVar("Factory", bound=Callable[..., Any])

ADDED: dict[str, dict[str, Callable[..., Any]]] = {}  # kind -> name -> factory, by `register`


class NameTaken(ValueError):
  """A registered name that something else has."""


def register(kind: str, name: str | None = None) -> Callable[[Factory], Factory]:
  """Adds a factory under a name that specs may use: a decorator for functions and dataclasses.

  Specs of it are checked like those of built-in names: by the types of its parameters, and by the
  ValueErrors that it raises. A task's keyword-only parameters `model` and `data_dir` are set by
  --model and --data_dir. Registering the same function again, as a reload does, replaces it.

  Args:
    kind: 'compressor', 'aggregator', 'method', 'task', 'model', 'partition', 'topology', 'delays',
      'speeds', 'optimizer' or 'schedule'.
    name: in specs; None for the function's own, or the `name` of a compressor, aggregator or method
      class.

  Returns:
    The decorator, which returns what it is given.

  Raises:
    ValueError: if there is no such kind, the name is no identifier, or something else has it.
  """
  checks.one_of("kind", kind, KINDS)

  def add(factory: Factory) -> Factory:
    chosen = name or getattr(factory, "spec_name", "") or factory.__name__
    if not chosen.isidentifier():
      raise ValueError(f"register({kind!r}, {chosen!r}): not a name that a spec can call")
    if (owner := _owner(kind, chosen)) and owner != _origin(factory):
      taken = f"the {kind} {chosen!r} is {owner} already; choose another name"
      raise NameTaken(f"register({kind!r}, {chosen!r}): {taken}")
    ADDED.setdefault(kind, {})[chosen] = factory
    return factory

  return add


def _owner(kind: str, name: str) -> str:
  """Module and name of what a spec of this name calls; '' for an unknown name."""
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
  """The names of a kind that are known now: built-in ones, optax's, registered ones.

  Args:
    kind: one of KINDS.
  """
  own = TABLE[kind] if kind in TABLE else _optax(kind)
  return [*own, *ADDED.get(kind, ())]


@functools.cache
def load_installed() -> None:
  """Imports the modules by which installed packages register names, once."""
  for point in importlib.metadata.entry_points(group=GROUP):
    try:
      point.load()
    except Exception as error:  # whatever a plugin's module raises goes on, with its entry point
      error.add_note(f"in the entry point {point.name} = {point.value} of {GROUP}")
      raise


def lookup(kinds: Sequence[str], name: str) -> Callable[..., Any]:
  """The factory of a name.

  Args:
    kinds: where to look, in this order.
    name: as in a spec.

  Raises:
    ValueError: if there is none, with the nearest name and the legal set.
  """
  return _find(kinds, name)[1]


def _find(kinds: Sequence[str], name: str) -> tuple[str, Callable[..., Any]]:
  """The first kind that has the name, and the factory."""
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
  """Builds the object that a spec names.

  Args:
    kind: one of KINDS.
    spec: its text, or a parsed call.
    **bound: values of keyword-only parameters that a spec must not set itself (a task's `model` and
      `data_dir`); passed on if the factory has them.

  Returns:
    The object. That of an optimizer or schedule has its spec as repr.

  Raises:
    ValueError: one line with the value, the legal set and the nearest name. A registered factory
      rejects a value by a `raise` statement; its other errors are raised unchanged.
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
    says_why = isinstance(error, ValueError) and blame.is_raised(error)
    if blame.fault(error) and not says_why:
      raise
    raise call.wrong(one_line(error, 300)) from error
  if problem := _not_of(kind, built):
    raise call.wrong(f"{call.name} returns {problem}")
  if kind in OF_OPTAX:
    from research.core import optimizers

    values = signature.bind(*args, **kwargs).arguments
    text = of_call(call.name, signature.parameters.values(), values)
    return optimizers.named(kind, built, text)
  return built


def _not_of(kind: str, built: Any) -> str:
  """What an object is if it is not of its kind; '' if it is."""
  if kind == "model":
    return "" if callable(built) else f"{type(built).__name__}, which is not a model"
  if kind not in _TYPES:
    return ""
  module, name = _TYPES[kind].split(":")
  fits = isinstance(built, getattr(importlib.import_module(module), name))
  return "" if fits else f"{type(built).__name__}, which is not a {name}"


def signature_of(factory: Callable[..., Any]) -> inspect.Signature:
  """A factory's signature, with types in place of their names as texts."""
  try:
    return inspect.signature(factory, eval_str=True)
  except NameError:  # a type that is imported for type checkers alone
    return inspect.signature(factory)


@dataclasses.dataclass(frozen=True)
class Default:
  """A parameter's default that is built from its spec when it is called.

      def digits(*, model: Model = Default("model", "mlp(hidden=[128])")) -> Task: ...

  Args:
    kind: of the spec.
    spec: of a factory whose object is called, such as a model, which is called with the outputs.
  """

  kind: str
  spec: str

  def __call__(self, *args: Any) -> Any:
    return build(self.kind, self.spec)(*args)

  def __repr__(self) -> str:
    return self.spec
