"""The catalogue and the quick set have every registered name; objects are built by their reprs."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import test_aggregate_contracts
import test_composition
import test_compress
import test_executions
import test_local
import test_method_contracts
from catalogue import ALL, SLICED, SPECS

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


@pytest.mark.parametrize("kind", ["topology", "delays", "network", "churn"])
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


# ---- the quick set


def quick_rows(test: Callable[..., Any]) -> list[Any]:
  """The rows of a test's table that the quick set runs."""
  marks = getattr(test, "pytestmark", [])
  if any(mark.name == "slow" for mark in marks):
    return []
  (table,) = [mark.args[1] for mark in marks if mark.name == "parametrize"]
  is_slow = lambda row: any(mark.name == "slow" for mark in getattr(row, "marks", ()))
  return [row for row in table if not is_slow(row)]


def executed() -> dict[str, list[str]]:
  """By kind, the specs for which the quick set compares two executions."""
  groups = (
    (test_executions.test_executions_agree, test_executions.BY_PERIOD),
    (
      test_method_contracts.test_state_is_stable_and_executions_agree,
      test_method_contracts.BY_PERIOD,
    ),
  )
  names = [name for test, group in groups for period in quick_rows(test) for name in group[period]]
  sliced = "hierarchical" in quick_rows(test_local.test_executions_agree)
  exchanges = quick_rows(test_composition.test_executions_agree)
  return {
    "compressor": quick_rows(test_compress.test_every_contract_is_kept),
    "aggregator": [test_composition.SPECS[name] for name in exchanges],
    "method": [SPECS[n] for n in names if n in SPECS] + [*SLICED.values()] * sliced,
  }


def names_of(specs: Iterable[str]) -> set[str]:
  return set().union(*(called(parse(spec)) for spec in specs))


# Exchanges between neighbours of which the quick set runs only one execution. Their collectives are
# those of `gossip`, `choco` and `sgp`.
ONE_EXECUTION = {"push_sum", "q1_gossip", "q2_gossip"}


@pytest.mark.parametrize("kind", ["compressor", "aggregator", "method"])
def test_the_quick_set_compares_two_executions_of_every_name(kind):
  specs = executed()
  found = names_of([*specs[kind], *specs["method"]])
  assert set(TABLE[kind]) - found == (ONE_EXECUTION if kind == "aggregator" else set())


def test_the_quick_set_traces_every_aggregator():
  wrappers = quick_rows(test_aggregate_contracts.test_every_pair_is_refused_for_a_reason_or_runs)
  assert "error_feedback" in wrappers
  assert set(TABLE["aggregator"]) <= names_of(test_aggregate_contracts.ENTRIES.values())
