"""Contracts of all registered methods at once, side by side in a program for each period."""

import inspect

import optax
import pytest
from aggregators import AGGREGATORS
from catalogue import BASIC, METHODS, NAMES, by_period

from research.aggregate import composition
from research.aggregate.mean import mean
from research.comm.topology import ring
from research.core import registry
from research.methods.data_parallel import data_parallel
from research.sim.delays import constant
from research.testing import methods

BY_PERIOD = by_period([name for name in NAMES if name not in BASIC])


@pytest.mark.parametrize("period", BY_PERIOD)
def test_state_is_stable_and_executions_agree(period):
  methods.agree({name: METHODS[name] for name in BY_PERIOD[period]})


def test_what_makes_no_sense_is_refused():
  """Every row of the table that names a method, with every aggregator that has the trait."""
  graphs = ("gossip(exponential())", "gossip(one_peer_exponential())")
  around = [*AGGREGATORS.values(), *(registry.build("aggregator", graph) for graph in graphs)]
  for wrappers, trait, _ in composition.refused():
    for method in set(wrappers) & set(registry.names("method")):
      pairs = [aggregator for aggregator in around if trait in aggregator.traits]
      assert pairs, (method, trait)
      for aggregator in pairs:
        rows = [row for row in composition.refused() if method in row[0]]
        reasons = tuple(why for _, trait, why in rows if trait in aggregator.traits)
        with pytest.raises(ValueError, match="cannot be combined with") as refused:
          build(method, aggregator)
        assert str(refused.value).endswith(reasons)


def build(method: str, aggregator):
  """A method around an aggregator, everything else as it comes."""
  factory = registry.lookup(("method",), method)
  values = {
    "Aggregator": aggregator,
    "GradientTransformation": optax.sgd(0.1),
    "Topology": ring(),
    "Method": data_parallel(optax.sgd(0.1), mean()),
    "Delays": constant(1),
  }
  given = [p for p in inspect.signature(factory).parameters.values() if p.default is p.empty]
  kind = lambda parameter: getattr(parameter.annotation, "__name__", "")
  plain = {"float": 0.1, "int": 2, "Union": 0.1}
  return factory(**{p.name: values.get(kind(p), plain.get(kind(p), 0.1)) for p in given})
