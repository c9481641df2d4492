"""Specs as text: every spelling of a call has one canonical text, which parses to the same call."""

import inspect

import pytest

from research.core import spec

CANONICAL = {
  "sgd( 1e-1 )": "sgd(0.1)",
  "sgd(.1,momentum = 9e-1)": "sgd(0.1, momentum=0.9)",
  "per_worker((1, 2))": "per_worker([1, 2])",
  "steady(1.0, slowdown={0:4, '1': [2.]})": "steady(1.0, slowdown={0: 4, '1': [2.0]})",
  'chain(text("a"), f(None, True, -3))': "chain(text('a'), f(None, True, -3))",
  "f()": "f()",
}


@pytest.mark.parametrize("given", CANONICAL)
def test_a_call_has_one_canonical_text(given):
  text = spec.written(spec.parse(given))
  assert text == CANONICAL[given]
  assert spec.written(spec.parse(text)) == text


def factory(first, second=2, *, third=3.0, **more):
  """Any factory."""


def variadic(*parts, last=0):
  """One that takes several."""


WRITTEN = [
  (factory, {"first": 1}, "f(1)"),
  (factory, {"first": 1, "second": 2, "third": 3.0}, "f(1)"),
  (factory, {"first": 1, "second": 5}, "f(1, second=5)"),
  (factory, {"first": [1e-3], "third": 0.5}, "f([0.001], third=0.5)"),
  (factory, {"first": 1, "more": {"x": "y"}}, "f(1, x='y')"),
  (factory, {"second": 5}, "f(second=5)"),
  (variadic, {"parts": (1, 2), "last": 3}, "f(1, 2, last=3)"),
]


@pytest.mark.parametrize(("called", "values", "text"), WRITTEN)
def test_defaults_are_left_out_and_other_optional_arguments_are_named(called, values, text):
  assert spec.of_call("f", inspect.signature(called).parameters.values(), values) == text


def test_what_follows_a_default_that_is_left_out_is_named():
  parameters = inspect.signature(lambda a=1, b=2: None).parameters.values()
  assert spec.of_call("f", parameters, {"a": 1, "b": 3}) == "f(b=3)"


def test_calls_are_composed_by_attribute():
  sgd = spec.calls.sgd(spec.calls.piecewise_constant_schedule(1.0, {1: 0.0}), momentum=0.9)
  method = spec.calls.local_sgd(sgd, spec.calls.mean(), period=[[0, 1], [5, 4]])
  text = (
    "local_sgd(sgd(piecewise_constant_schedule(1.0, {1: 0.0}), momentum=0.9), mean(), "
    "period=[[0, 1], [5, 4]])"
  )
  assert str(method) == text == spec.written(spec.parse(text))
  assert str(spec.parse("libsvm('a9a', l2=1.0)").replace(l2=2.0, sparse=True)) == (
    "libsvm('a9a', l2=2.0, sparse=True)"
  )
