"""Parts: their specs, what replaces them, what is found in them, and what no spec may set."""

import dataclasses
import inspect
from typing import Any, ClassVar

import numpy as np
import optax
import pytest
from aggregators import PLAIN
from aggregators import SPECS as AGGREGATORS
from catalogue import SPECS as METHODS
from promises import COMPRESSORS

from research.aggregate.feedback import ErrorFeedback, error_feedback
from research.aggregate.gather_mean import gather_mean
from research.aggregate.gossip import gossip
from research.aggregate.mean import Mean, mean
from research.aggregate.policy import warm_up
from research.aggregate.privacy.private import Noisy
from research.comm.topology import Ring, Weights
from research.compress.quantize import Int8, int8
from research.core import registry
from research.core.base import EVERYONE, Aggregate, Aggregator, Compressor, Trait
from research.core.part import Part, hidden
from research.core.spec import parse
from research.methods.data_parallel import data_parallel

SPECS = {
  **dict.fromkeys(COMPRESSORS, "compressor"),
  **dict.fromkeys((AGGREGATORS | PLAIN).values(), "aggregator"),
  **dict.fromkeys(METHODS.values(), "method"),
  "weights([[0.5, 0.5], [0.5, 0.5]])": "topology",
  "weights([[0.5, 0.3, 0.0], [0.0, 0.7, 0.2], [0.5, 0.0, 0.8]], directed=True)": "topology",
  "per_worker([0, 2])": "delays",
  "geometric(1.5, bound=4)": "delays",
}


def canonical(value) -> str:
  """A parsed spec with its optional arguments by name, without those left at a default."""
  if isinstance(value, list):
    return f"[{', '.join(map(canonical, value))}]"
  if not hasattr(value, "kwargs"):
    return repr(value)
  kinds = ("compressor", "aggregator", "method", "topology", "delays", "optimizer", "schedule")
  parameters = inspect.signature(registry.lookup(kinds, value.name)).parameters
  variadic = [p for p in parameters.values() if p.kind is p.VAR_POSITIONAL]
  if variadic:
    return f"{value.name}({', '.join(map(canonical, value.args))})"
  given = dict(zip(parameters, value.args, strict=False)) | value.kwargs
  shown = []
  for name, parameter in parameters.items():
    if name in given and given[name] != parameter.default:
      is_plain = parameter.default is parameter.empty and parameter.kind != parameter.KEYWORD_ONLY
      shown.append(canonical(given[name]) if is_plain else f"{name}={canonical(given[name])}")
  return f"{value.name}({', '.join(shown)})"


@pytest.mark.parametrize("spec", SPECS)
def test_what_a_spec_builds_is_shown_as_that_spec(spec):
  built = registry.build(SPECS[spec], spec)
  assert isinstance(built, Part)
  assert repr(built) == canonical(parse(spec))
  again = registry.build(SPECS[spec], repr(built))
  assert again == built
  assert repr(again) == repr(built)


def test_parts_of_equal_fields_are_equal_and_of_others_are_not():
  assert int8() == int8(256, False) != int8(128)
  assert {int8(): 1}[Int8(256)] == 1
  assert Weights([[0.5, 0.5], [0.5, 0.5]]) == Weights(((0.5, 0.5), (0.5, 0.5)))
  assert hash(warm_up(mean(), steps=1, stages=[mean()])) is not None


def test_a_part_does_not_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(int8(), "block", 3)  # noqa: B010 an assignment would be an error of types


class Halved(Compressor, name="halved"):
  factor: float = 0.5
  note: str = hidden("none")

  def check(self):
    if not 0 < self.factor < 1:
      raise ValueError(f"factor={self.factor} is not in (0, 1)")


def test_what_is_replaced_is_checked_anew():
  assert Halved().replace(factor=0.25) == Halved(0.25)
  with pytest.raises(ValueError, match="factor=2 is not in"):
    Halved().replace(factor=2)
  with pytest.raises(ValueError, match="cannot be combined with this aggregator"):
    error_feedback(mean()).replace(inner=error_feedback(mean()))
  with pytest.raises(TypeError, match="Halved has no field fraction"):
    Halved().replace(fraction=0.5)


def test_no_spec_sets_or_shows_a_hidden_field():
  assert list(inspect.signature(Halved).parameters) == ["factor"]
  with pytest.raises(TypeError, match="note"):
    Halved(0.25, note="some")  # pyright: ignore[reportCallIssue]
  changed = Halved(0.25).replace(note="some")
  assert (changed.note, repr(changed)) == ("some", "halved(factor=0.25)")
  assert changed.replace(factor=0.75).note == "some"
  assert changed != Halved(0.25)


NESTED = (
  "averaged(diloco(sgd(0.1), sgd(1.0), "
  "warm_up(bucketed(noisy(sum_mean(bf16()), clip=1.0, noise=0.5)), steps=2, "
  "stages=[noisy(mean(), clip=2.0, noise=0.5)])))"
)


def test_parts_are_found_at_any_depth():
  method = registry.build("method", NESTED)
  assert [noisy.clip for noisy in method.parts(Noisy)] == [1.0, 2.0]
  assert [type(c).__name__ for c in method.parts(Compressor)] == ["BF16"]
  assert len(list(method.parts(Aggregator))) == 6
  assert next(method.parts(type(method))) is method
  gossiping = registry.build("method", "delayed(d_psgd(sgd(0.1), gossip(ring())), constant(2))")
  assert list(gossiping.parts(Ring)) == [Ring()]


class Leveled(Compressor):
  block: ClassVar[Any]  # constant, field or property of a subclass
  levels: ClassVar[Any]


class Ours(Leveled, name="ours"):
  rows: int
  block: int = 3
  levels = 7


def test_a_class_variable_of_a_base_keeps_no_place_among_the_fields():
  assert list(inspect.signature(Ours).parameters) == ["rows", "block"]
  assert repr(Ours(2, block=4)) == "ours(2, block=4)"


def test_what_errors_call_a_part():
  assert (Ours.title, Leveled.title, Mean.title, ErrorFeedback.title) == (
    "ours", "Leveled", "mean", "error_feedback",
  )  # fmt: skip


class Scaled(Compressor):
  """A compressor with fields of kinds that no spec has."""

  factors: Any = None
  of: Any = None

  def encode(self, x, shared, own):
    return x

  def decode(self, payload, like, shared):
    return payload


def test_fields_of_any_kind():
  """Dictionaries, arrays, functions: shown, searched, and aggregated with."""
  for value in ({"a": 1.0}, np.ones(3), [[1, 2], [3]]):
    aggregator = gather_mean(Scaled(value))
    assert repr(aggregator).startswith("gather_mean(Scaled(factors=")
    assert aggregator.replace().compressor == aggregator.compressor
  assert repr(Scaled(of=lambda x: x)) == "Scaled(of=<lambda>)"
  assert repr(Scaled(of=optax.cosine_decay_schedule(0.1, 3))) == "Scaled(of=<schedule>)"


class Choosing(Aggregator):
  """Aggregators in a dictionary and in lists of lists."""

  others: Any

  def aggregate(self, tree, state, key, presence=EVERYONE):
    return Aggregate(tree, tree, state)


@pytest.mark.parametrize("wrap", [lambda a: {"x": a}, lambda a: [[a]], lambda a: [{"x": [a]}]])
def test_parts_are_found_in_any_nesting(wrap):
  inner = gossip(Ring())
  found = Choosing(wrap(inner))
  assert list(found.parts(type(inner))) == [inner]
  assert Trait.LOCAL in found.traits
  with pytest.raises(
    ValueError, match=r"data_parallel cannot be combined with this aggregator \(local\)"
  ):
    data_parallel(optax.sgd(0.1), found)


@pytest.mark.parametrize("name", ["values", "check", "replace", "title", "spec_name", "traits"])
def test_a_field_cannot_hide_what_every_part_has(name):
  with pytest.raises(TypeError, match=f"'{name}' is a method of its base class"):
    type("Hiding", (Aggregator,), {"__annotations__": {name: float}, name: 1.0})
