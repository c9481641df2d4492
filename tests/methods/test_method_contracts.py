"""Contracts of all registered methods at once, side by side in a program for each period."""

import inspect
import re

import jax
import numpy as np
import optax
import pytest
from aggregators import AGGREGATORS
from catalogue import BASIC, METHODS, NAMES, SPECS, by_period
from problems import SIMULATED, Running, distance
from side_by_side import regressions, side_by_side

from research.aggregate import composition
from research.aggregate.mean import mean
from research.comm.topology import ring
from research.core import registry
from research.methods.data_parallel import data_parallel
from research.sim.delays import constant

ROUNDS = 4
BY_PERIOD = by_period([name for name in NAMES if name not in BASIC])


def test_every_method_is_in_the_table():
  called = {name for spec in SPECS.values() for name in re.findall(r"(\w+)\(", spec)}
  assert called >= set(registry.names("method"))


@pytest.mark.parametrize("period", BY_PERIOD)
def test_state_is_stable_and_executions_agree(period, compilations):
  """Types, shardings and programs stay; eight rounds are four and four from a copy of the state.

  On mini-batches, of workers with different numbers of examples, once in slices.
  """
  methods = {name: METHODS[name] for name in BY_PERIOD[period]}
  task, sizes = regressions(tuple(methods)), (30, 20, 40, 30, 10, 50, 30, 30)
  one, other = (
    Running(side_by_side(methods), executor, axes, sizes, 8, task=task)
    for executor, axes in (("simulate", SIMULATED), ("spmd", {"slice": 2, "data": 4}))
  )
  for run in (one, other):
    resumed(run, compilations)
  np.testing.assert_allclose(other.metrics["loss"], one.metrics["loss"], rtol=1e-4)
  assert bool(one.metrics["finite"])
  assert bool(other.metrics["finite"])
  for method, params in one.params().items():
    assert distance(other.params()[method], params) <= 1e-5, method


def resumed(run: Running, compilations: list[float]) -> None:
  kinds = lambda: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), run.state)
  before = kinds()
  run.rounds(ROUNDS)
  saved = jax.device_get(run.state._replace(key=jax.random.key_data(run.state.key)))
  places = jax.tree.map(lambda x: x.sharding, run.state)
  assert before == kinds()
  assert compilations
  compilations.clear()
  whole = run.rounds(ROUNDS).state
  assert not compilations
  state = saved._replace(key=jax.random.wrap_key_data(saved.key))
  run.state = jax.tree.map(jax.device_put, state, places)
  again = run.rounds(ROUNDS).state
  same = jax.tree.map(lambda a, b: bool((a == b).all()), whole, again)
  assert all(jax.tree.leaves(same))


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
        with pytest.raises(ValueError, match="does not go with") as refused:
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
  return factory(**{p.name: values.get(kind(p), 0.1) for p in given})
