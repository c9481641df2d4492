"""The catalogue has every registered name, and its objects say their specs."""

import pytest
from catalogue import ALL

from research.core import registry
from research.core.builtin import TABLE
from research.core.spec import Call, parse


def called(value) -> set[str]:
  """The names that a parsed spec calls."""
  if isinstance(value, Call):
    return {value.name, *called([*value.args, *value.kwargs.values()])}
  return set().union(*map(called, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("kind", TABLE)
def test_every_registered_name_is_in_the_catalogue(kind):
  found = set().union(*(called(parse(spec)) for spec in ALL[kind]))
  missing = set(TABLE[kind]) - found
  assert not missing, f"tests/catalogue.py has no spec of the {kind} {', '.join(missing)}"


@pytest.mark.parametrize("kind", ["topology", "delays"])
def test_every_object_is_built_again_by_its_repr(kind):
  for spec in ALL[kind]:
    built = registry.build(kind, spec)
    assert registry.build(kind, repr(built)) == built, spec
    assert hash(built) == hash(registry.build(kind, spec)), spec


@pytest.mark.parametrize("kind", ["model", "partition", "speeds"])
def test_every_other_spec_is_built(kind):
  for spec in ALL[kind]:
    assert registry.build(kind, spec), spec


def test_every_task_has_its_model_by_default():
  """Or one of its own; the data of a task is read by its own tests."""
  for spec in ALL["task"]:
    call = parse(spec)
    parameters = registry.signature_of(registry.lookup(("task",), call.name)).parameters
    model = parameters["model"].default if "model" in parameters else ""
    assert not model or registry.build("model", repr(model)), spec
