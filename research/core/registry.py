"""Spec strings: `diloco(adamw(3e-4), mean(), period=50)` becomes the object that it names.

One grammar for flags, presets and result rows: Python calls of registered names on literals and on
further calls, read with `ast` and never evaluated. TABLE holds this codebase's names; optimizers
and schedules are optax's, by their own names.
"""

import ast
import difflib
import functools
import importlib
import inspect
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from research.core import blame
from research.core.text import QUOTED, listed, one_line, quoted, shortened

# kind -> name -> "module:attribute"; modules are imported when a spec first needs them
TABLE: dict[str, dict[str, str]] = {
  "compressor": {
    "identity": "research.compress.cast:identity",
    "bf16": "research.compress.cast:bf16",
    "fp8": "research.compress.cast:fp8",
    "int8": "research.compress.quantize:int8",
    "int4": "research.compress.quantize:int4",
    "qsgd": "research.compress.quantize:qsgd",
    "terngrad": "research.compress.quantize:terngrad",
    "natural": "research.compress.cast:natural",
    "sign": "research.compress.sign:sign",
    "top_k": "research.compress.sparsify:top_k",
    "random_k": "research.compress.sparsify:random_k",
    "threshold": "research.compress.sparsify:threshold",
    "count_sketch": "research.compress.sketch:count_sketch",
    "hadamard": "research.compress.rotation:hadamard",
    "seeded": "research.compress.seeded:seeded",
    "dct_top_k": "research.compress.dct:dct_top_k",
  },
  "aggregator": {
    "mean": "research.aggregate.mean:mean",
    "hierarchical_mean": "research.aggregate.hierarchical:hierarchical_mean",
    "gather_mean": "research.aggregate.compressed:gather_mean",
    "sum_mean": "research.aggregate.compressed:sum_mean",
    "two_phase": "research.aggregate.compressed:two_phase",
    "majority_vote": "research.aggregate.compressed:majority_vote",
    "power_sgd": "research.aggregate.power_sgd:power_sgd",
    "error_feedback": "research.aggregate.feedback:error_feedback",
    "ef21": "research.aggregate.feedback:ef21",
    "diana": "research.aggregate.feedback:diana",
    "momentum_correction": "research.aggregate.momentum:momentum_correction",
    "worker_momentum": "research.aggregate.momentum:worker_momentum",
    "only_large": "research.aggregate.policy:only_large",
    "bucketed": "research.aggregate.policy:bucketed",
    "warm_up": "research.aggregate.policy:warm_up",
    "hierarchical": "research.aggregate.hierarchical:hierarchical",
    "median": "research.aggregate.robust.coordinates:median",
    "trimmed_mean": "research.aggregate.robust.coordinates:trimmed_mean",
    "krum": "research.aggregate.robust.vectors:krum",
    "multi_krum": "research.aggregate.robust.vectors:multi_krum",
    "geometric_median": "research.aggregate.robust.vectors:geometric_median",
    "centered_clip": "research.aggregate.robust.vectors:centered_clip",
    "sign_flip": "research.aggregate.robust.attacks:sign_flip",
    "gaussian": "research.aggregate.robust.attacks:gaussian",
    "a_little_is_enough": "research.aggregate.robust.attacks:a_little_is_enough",
    "inner_product": "research.aggregate.robust.attacks:inner_product",
    "gossip": "research.aggregate.gossip:gossip",
    "push_sum": "research.aggregate.gossip:push_sum",
    "choco": "research.aggregate.choco:choco",
    "q1_gossip": "research.aggregate.quantized_gossip:q1_gossip",
    "q2_gossip": "research.aggregate.quantized_gossip:q2_gossip",
    "noisy": "research.aggregate.privacy.private:noisy",
    "secure_sum": "research.aggregate.privacy.secure:secure_sum",
  },
  "method": {
    "data_parallel": "research.methods.data_parallel:data_parallel",
    "averaged": "research.methods.averaged:averaged",
    "local_sgd": "research.methods.local:local_sgd",
    "post_local_sgd": "research.methods.post_local:post_local_sgd",
    "hierarchical_local_sgd": "research.methods.hierarchical_local:hierarchical_local_sgd",
    "slow_mo": "research.methods.slow_mo:slow_mo",
    "restarted": "research.methods.restarted:restarted",
    "easgd": "research.methods.easgd:easgd",
    "eamsgd": "research.methods.easgd:eamsgd",
    "diloco": "research.methods.diloco:diloco",
    "streaming_diloco": "research.methods.streaming_diloco:streaming_diloco",
    "fed_avg": "research.methods.federated:fed_avg",
    "fed_prox": "research.methods.federated:fed_prox",
    "fed_opt": "research.methods.federated:fed_opt",
    "fed_adam": "research.methods.federated:fed_adam",
    "fed_yogi": "research.methods.federated:fed_yogi",
    "fed_adagrad": "research.methods.federated:fed_adagrad",
    "scaffold": "research.methods.scaffold:scaffold",
    "sparta": "research.methods.sparta:sparta",
    "d_psgd": "research.methods.decentralized:d_psgd",
    "sgp": "research.methods.decentralized:sgp",
    "dgd": "research.methods.decentralized:dgd",
    "gradient_tracking": "research.methods.consensus:gradient_tracking",
    "extra": "research.methods.consensus:extra",
    "admm": "research.methods.consensus:admm",
    "consensus_admm": "research.methods.consensus_admm:consensus_admm",
    "signum": "research.methods.signum:signum",
    "onebit_adam": "research.methods.onebit_adam:onebit_adam",
    "zero_one_adam": "research.methods.zero_one_adam:zero_one_adam",
    "demo": "research.methods.demo:demo",
    "marina": "research.methods.marina:marina",
    "delayed": "research.methods.asynchronous:delayed",
    "staleness_aware": "research.methods.asynchronous:staleness_aware",
    "dc_asgd": "research.methods.asynchronous:dc_asgd",
    "hogwild": "research.methods.asynchronous:hogwild",
    "dc_asgd_constant": "research.methods.asynchronous:dc_asgd_constant",
    "asgd": "research.methods.asynchronous:asgd",
  },
  "delays": {
    name: f"research.sim.delays:{name}"
    for name in (
      "constant",
      "uniform",
      "geometric",
      "per_worker",
      "by_coordinate",
      "last_pull",
    )
  },
  "speeds": {
    name: f"research.sim.clock:{name}"
    for name in ("steady", "exponential", "lognormal", "measured")
  },
  "topology": {
    name: f"research.comm.topology:{name}"
    for name in (
      "ring",
      "torus",
      "complete",
      "star",
      "exponential",
      "one_peer_exponential",
      "weights",
    )
  },
  "task": {
    "digits": "research.tasks.vision.vision:digits",
    "mnist": "research.tasks.vision.vision:mnist",
    "least_squares": "research.tasks.convex.synthetic:least_squares",
    "libsvm": "research.tasks.convex.libsvm:libsvm",
    "tinyshakespeare": "research.tasks.language.language:tinyshakespeare",
    "text": "research.tasks.language.language:text",
    "mean_estimation": "research.tasks.convex.synthetic:mean_estimation",
    "random_tokens": "research.tasks.convex.synthetic:random_tokens",
    **{
      name: f"research.tasks.convex.counterexamples:{name}"
      for name in ("client_drift", "rare_large_gradient", "narrow_valley")
    },
    "stream": "research.tasks.language.stream:stream",
    "pagerank": "research.tasks.search.pagerank:pagerank",
    "rank": "research.tasks.search.ranking:rank",
    "bm25": "research.tasks.search.cranfield:bm25",
    "frontier": "research.tasks.finance.frontier:frontier",
    "cvar": "research.tasks.finance.cvar:cvar",
    "breast_cancer": "research.tasks.medicine.medicine:breast_cancer",
    "diabetes": "research.tasks.medicine.medicine:diabetes",
    "movielens": "research.tasks.recommend.recommend:movielens",
    "movielens_als": "research.tasks.recommend.als:movielens_als",
    "movielens_federated": "research.tasks.recommend.als:movielens_federated",
    "cranfield": "research.tasks.search.cranfield:cranfield",
  },
  "model": {
    **{
      name: f"research.models.classic:{name}"
      for name in ("linear", "logistic", "mlp", "cnn", "resnet")
    },
    "transformer": "research.models.transformer:transformer",
  },
  "partition": {
    "iid": "research.tasks.partition:iid",
    "in_order": "research.tasks.partition:in_order",
    "sorted": "research.tasks.partition:sorted_",
    "dirichlet": "research.tasks.partition:dirichlet",
    "shards": "research.tasks.partition:shards",
  },
}

# Where optax takes any number but only some make sense.
_POSITIVE = ("learning_rate", "peak_value", "max_norm", "max_delta", "clipping")
_NOT_NEGATIVE = ("init_value", "end_value", "weight_decay", "eps", "eps_root")
_FRACTIONS = ("momentum", "b1", "b2", "b3", "decay", "decay_rate")
_DEEPEST = 32  # calls and lists within one another


class Call(NamedTuple):
  """A parsed spec: a name, its arguments, and the text that it came from."""

  name: str
  args: list[Any]
  kwargs: dict[str, Any]
  text: str

  def wrong(self, reason: object) -> ValueError:
    """The error of a call that cannot be, in one line."""
    return ValueError(one_line(f"{one_line(self.text, QUOTED)}: {reason}"))


def parse(spec: str) -> Call:
  """Reads a spec's syntax; names are looked up by `build`.

  Raises:
    ValueError: if it is not a call of names on literals and calls, saying where it breaks off.
  """
  call = _Reader(spec).value()
  if not isinstance(call, Call):
    raise ValueError(f"{quoted(spec)} is not a call such as name(value, key=value)")
  return call


def literal(spec: str) -> Any:
  """Reads a number, a text, a list or a dictionary, written as in a spec.

  Raises:
    ValueError: if it is none.
  """
  value = _Reader(spec).value()
  if _holds_calls(value):
    raise ValueError(f"{quoted(spec)} is not a number, a text, a list or a dictionary")
  return value


def syntax(spec: str) -> ast.expr:
  """The syntax tree of a Python expression.

  Raises:
    ValueError: for a text that is none, saying where it breaks off, or one too deep to read.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # such as "'str' object is not callable"
      return ast.parse(spec.strip(), mode="eval").body
  except SyntaxError as error:
    column = max((error.offset or 1) - 1, 0)
    raise ValueError(f"malformed at character {column + 1}: {one_line(error.msg)}") from error
  except (RecursionError, MemoryError) as error:
    raise ValueError("malformed: too many operators or brackets within one another") from error
  except UnicodeEncodeError as error:
    raise ValueError(f"malformed at character {error.start + 1}: not a character") from error
  except ValueError as error:
    raise ValueError(f"malformed: {one_line(error)}") from error


class _Reader:
  """The value that a spec writes down."""

  def __init__(self, spec: str):
    self.spec = spec.strip()
    self.lines = [line.encode(errors="replace") for line in re.split("\r\n|\r|\n", self.spec)]

  def value(self) -> Any:
    return self._read(syntax(self.spec), 0)

  def _text(self, node: ast.expr) -> str:
    """What a node was read from; Python counts a line's bytes."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    lines = self.lines[first : last + 1]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return b"\n".join(lines).decode()

  def _read(self, node: ast.expr, depth: int) -> Any:
    if depth > _DEEPEST:
      raise ValueError(f"malformed: more than {_DEEPEST} calls or lists within one another")
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


def build(kind: str, spec: str | Call, **bound: Any) -> Any:
  """Builds the object of a kind (a key of TABLE, 'optimizer' or 'schedule') that a spec names.

  Args:
    kind: what the spec must be.
    spec: its text, or a parsed call.
    **bound: values for keyword-only parameters that a spec must not set itself (a task's `model`
      and `data_dir`); passed on where the factory has them.

  Raises:
    ValueError: one line with the value, the legal set and the nearest name. A factory of a user's
      own says so by a `raise` statement; any other error of it passes as it is.
  """
  call = parse(spec) if isinstance(spec, str) else spec
  factory = lookup((kind,), call.name)
  parameters = inspect.signature(factory).parameters
  bound = {name: value for name, value in bound.items() if name in parameters}
  args, kwargs = _arguments(call, parameters, bound)
  try:
    built = factory(*args, **kwargs, **bound)
    if kind == "optimizer":
      _check_optimizer(built)
  except (ValueError, TypeError, AssertionError, OverflowError) as error:
    says_why = isinstance(error, ValueError) and blame.is_raised(error)
    if blame.fault(error) and not says_why:
      raise
    raise call.wrong(one_line(error, 300)) from error
  return built


def lookup(kinds: Sequence[str], name: str) -> Callable[..., Any]:
  """The factory of that name among some kinds.

  Raises:
    ValueError: if there is none, with the nearest name and the legal set.
  """
  legal: list[str] = []
  for kind in kinds:
    if kind in TABLE:
      if name in TABLE[kind]:
        module, attribute = TABLE[kind][name].split(":")
        return getattr(importlib.import_module(module), attribute)
      legal += TABLE[kind]
    else:
      found = _optax(kind)
      if name in found:
        return found[name]
      legal += found
  near = difflib.get_close_matches(name, legal, 1, 0.5)
  hint = f"; did you mean '{near[0]}'?" if near else ";"
  unknown = f"unknown {' or '.join(kinds)} '{shortened(name)}'"
  raise ValueError(f"{unknown}{hint} legal: {listed(legal)}")


def _optax(kind: str) -> dict[str, Callable[..., Any]]:
  """optax's own factories of a kind, those that begin with a learning rate first."""
  import optax
  import optax.contrib

  transformations = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)
  first: dict[str, Callable[..., Any]] = {}
  others: dict[str, Callable[..., Any]] = {}
  for module in (optax, optax.contrib):
    for name, function in sorted(vars(module).items()):
      is_function = inspect.isfunction(function) or isinstance(function, functools.partial)
      if name.startswith("_") or not is_function:
        continue
      signature = inspect.signature(function)
      is_schedule = name.endswith("_schedule") or name in ("exponential_decay", "join_schedules")
      if is_schedule if kind == "schedule" else signature.return_annotation in transformations:
        takes_rate = next(iter(signature.parameters), "") == "learning_rate"
        (first if takes_rate else others).setdefault(name, function)
  return first | others


def _arguments(call: Call, parameters: Mapping[str, inspect.Parameter], bound: Mapping[str, Any]):
  """Matches a call's arguments to a factory's parameters, building nested calls by their kind."""
  open_ = {n: p for n, p in parameters.items() if n not in bound}
  positional = [p for p in open_.values() if p.kind != p.KEYWORD_ONLY]
  if positional and positional[-1].kind == inspect.Parameter.VAR_POSITIONAL:
    positional += [positional[-1]] * len(call.args)
  if len(call.args) > len(positional):
    raise call.wrong(
      f"{call.name} takes {len(positional)} positional arguments "
      f"({', '.join(p.name for p in positional)}) and got {len(call.args)}"
    )
  args = [_argument(call, p, value) for p, value in zip(positional, call.args, strict=False)]
  given = {p.name for p in positional[: len(args)]}
  kwargs = {}
  for name, value in call.kwargs.items():
    if name not in open_ or name in given:
      twice = f"{call.name} got '{name}' twice"
      problem = twice if name in given else f"no parameter '{shortened(name)}'"
      near = difflib.get_close_matches(name, list(open_), 1, 0.5)
      hint = f"; did you mean '{near[0]}'?" if near and name not in given else ";"
      raise call.wrong(f"{problem}{hint} {call.name} takes {', '.join(open_)}")
    kwargs[name] = _argument(call, open_[name], value)
  missing = [
    n
    for n, p in open_.items()
    if p.default is p.empty
    and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    and n not in {*given, *kwargs}
  ]
  if missing:
    raise call.wrong(f"{call.name} needs {', '.join(missing)}")
  return args, kwargs


def _argument(call: Call, parameter: inspect.Parameter, value: Any) -> Any:
  kinds = _kinds(parameter.annotation)
  build_nested = lambda v: build(_kind_of(v, kinds, call, parameter), v)
  if isinstance(value, Call):
    value = build_nested(value)
  elif isinstance(value, list):
    value = [build_nested(v) if isinstance(v, Call) else v for v in value]
  _check_value(call, parameter, value)
  return value


def _kind_of(nested: Call, kinds: Sequence[str], call: Call, parameter: inspect.Parameter) -> str:
  if not kinds:
    raise call.wrong(f"{parameter.name} is a plain value, not {one_line(nested.text, QUOTED)}")
  for kind in kinds:
    if nested.name in (TABLE[kind] if kind in TABLE else _optax(kind)):
      return kind
  try:
    lookup(kinds, nested.name)
  except ValueError as error:
    raise call.wrong(f"{parameter.name}: {error}") from error
  raise AssertionError("a name that no kind holds was found")


def _kinds(annotation: Any) -> list[str]:
  """The kinds of object that a parameter takes, by its type."""
  if typing.get_args(annotation) and typing.get_origin(annotation) is not Callable:
    return [kind for part in typing.get_args(annotation) for kind in _kinds(part)]
  name = getattr(annotation, "__name__", "")
  if name.startswith("GradientTransformation"):
    return ["optimizer"]
  if name.lower() in TABLE:
    return [name.lower()]
  origin = typing.get_origin(annotation) or annotation
  return ["schedule"] if getattr(origin, "__name__", "") == "Callable" else []


def _check_value(call: Call, parameter: inspect.Parameter, value: Any) -> None:
  name, shown = parameter.name, quoted(getattr(value, "text", value))
  shown = shown[1:-1] if hasattr(value, "text") else shown
  if not _matches(value, parameter.annotation):
    raise call.wrong(f"{name}={shown} is not {_describe(parameter.annotation)}")
  for number in _numbers(value):
    if not abs(number) <= sys.float_info.max:
      raise call.wrong(f"{name}={shown} is not finite")
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
      raise call.wrong(f"{name}={shown} does not fit 64 bits")
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    if name in _POSITIVE and value <= 0:
      raise call.wrong(f"{name}={shown} is not in (0, inf)")
    if name in _NOT_NEGATIVE and value < 0:
      raise call.wrong(f"{name}={shown} is not in [0, inf)")
    if name in _FRACTIONS and not 0 <= value <= 1:
      raise call.wrong(f"{name}={shown} is not in [0, 1]")


def _numbers(value: Any) -> Iterator[int | float]:
  """The numbers that a plain value holds."""
  if isinstance(value, (list, dict)):
    for part in [*value, *value.values()] if isinstance(value, dict) else value:
      yield from _numbers(part)
  elif isinstance(value, (int, float)):
    yield value


def _matches(value: Any, annotation: Any) -> bool:
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation in (inspect.Parameter.empty, Any):
    return True
  if origin in (typing.Union, types.UnionType):
    return any(_matches(value, part) for part in parts)
  if annotation is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if annotation is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if annotation is None or annotation is types.NoneType:
    return value is None
  if origin is Callable or getattr(annotation, "__name__", "") == "Callable":
    return callable(value)
  if origin in (Sequence, list, tuple):
    items = isinstance(value, list)
    return items and all(_matches(item, parts[0]) for item in value if parts)
  if origin in (Mapping, dict):
    is_pair = lambda pair: all(map(_matches, pair, parts))
    return isinstance(value, dict) and all(map(is_pair, value.items()))
  if isinstance(annotation, type):
    return isinstance(value, annotation)
  return True


def _describe(annotation: Any) -> str:
  names = {float: "a number", int: "a whole number", bool: "True or False", str: "a text in quotes"}
  kinds = [f"a{'n' * (kind[0] in 'aeo')} {kind}" for kind in dict.fromkeys(_kinds(annotation))]
  parts = typing.get_args(annotation)
  if typing.get_origin(annotation) in (Sequence, list, tuple):
    return f"a list, each {_describe(parts[0])}"
  if typing.get_origin(annotation) in (Mapping, dict):
    return f"a dictionary {{{', '.join(map(_describe, parts))}}}".replace(", ", ": ", 1)
  of_union = parts or (annotation,)
  plain = [names[part] for part in of_union if isinstance(part, type) and part in names]
  held = [_describe(p) for p in of_union if typing.get_origin(p) in (Mapping, dict, Sequence, list)]
  return " or ".join([*plain, *held, *kinds]) or str(annotation)


def _check_optimizer(optimizer: Any) -> None:
  """Traces one update, so that an optimizer that needs more than gradients is refused here."""
  import jax
  import jax.numpy as jnp

  params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
  try:
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
  except Exception as error:  # whatever an optimizer of another library raises
    if blame.fault(error):
      raise
    raise ValueError(f"needs more than averaged gradients: {one_line(error, 300)}") from error
  if updates["w"].shape != params["w"].shape:
    raise ValueError("needs more than averaged gradients: a gradient per example")
