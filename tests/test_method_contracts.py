"""Contracts of all registered methods at once, side by side in two programs: a row for each."""

import inspect

import jax
import numpy as np
import optax
import pytest
from aggregators import AGGREGATORS
from problems import SIMULATED, Running, distance
from side_by_side import regressions, side_by_side

from research import registry
from research.aggregate import composition
from research.aggregate.mean import mean
from research.comm.topology import ring
from research.methods.data_parallel import data_parallel
from research.methods.delays import constant

# By local steps per round. Switches and schedules come early, so that few rounds show all phases.
SPECS = {
  1: (
    "data_parallel(sgd(0.1, momentum=0.9), error_feedback(gather_mean(top_k(0.3))))",
    "averaged(data_parallel(sgd(0.1), mean()), burn_in=2)",
    "post_local_sgd(sgd(0.1), mean(), period=3, switch=2)",
    "streaming_diloco(adam(0.01), sgd(0.7), mean(), period=2, fragments=2, delay=1, mixing=0.3)",
    "d_psgd(sgd(0.1), choco(int8(), ring(), gamma=0.5))",
    "sgp(sgd(0.1, momentum=0.5), one_peer_exponential())",
    "dgd(0.1, gossip(torus()))",
    "gradient_tracking(0.05, gossip(ring()))",
    "extra(0.05, gossip(ring()))",
    "admm(0.05, gossip(ring()))",
    "signum(0.01, majority_vote())",
    "onebit_adam(0.01, error_feedback(two_phase(sign())), warm_up=3)",
    "zero_one_adam(0.01, error_feedback(two_phase(sign())), warm_up=3, variance_scale=1, "
    "double_every=2, longest=2)",
    "demo(0.01, gather_mean(dct_top_k(4, 3)))",
    "marina(0.1, gather_mean(top_k(0.3)), probability=0.3, seed=3)",
    "delayed(data_parallel(sgd(0.1), mean()), uniform(3))",
    "staleness_aware(data_parallel(sgd(0.1), mean()), per_worker([0, 2]))",
    "dc_asgd(0.1, mean(), constant(2), lam=0.5)",
    "dc_asgd_constant(0.1, mean(), geometric(1.0, bound=3), lam=0.2)",
    "hogwild(0.01, mean(), bound=3)",
    "asgd(sgd(0.1, momentum=0.5), mean())",
    "sparta(sgd(0.1, momentum=0.5), sum_mean(random_k(0.3)))",
  ),
  3: (
    "local_sgd(sgd(0.1, momentum=0.5), mean(), period=3)",
    "consensus_admm(0.1, mean(), penalty=0.5, period=3)",
    "slow_mo(sgd(0.1), mean(), period=3)",
    "restarted(local_sgd(adam(0.01), mean(), period=3))",
    "easgd(sgd(0.1), mean(), period=3, alpha=0.1)",
    "eamsgd(0.05, mean(), period=3, alpha=0.1)",
    "diloco(adam(0.01), sgd(0.7, momentum=0.9), error_feedback(two_phase(int8())), period=3)",
    "fed_avg(sgd(0.1), error_feedback(two_phase(int8())), period=3)",
    "fed_prox(sgd(0.1), mean(), mu=0.1, period=3)",
    "fed_opt(sgd(0.1), sgd(0.7, momentum=0.9), mean(), period=3)",
    "fed_adam(sgd(0.1), mean(), learning_rate=0.05, period=3)",
    "fed_yogi(sgd(0.1), mean(), learning_rate=0.05, period=3)",
    "fed_adagrad(sgd(0.1), mean(), learning_rate=0.05, period=3)",
    "scaffold(0.1, mean(), period=3)",
  ),
}
SLICED = ("hierarchical_local_sgd(sgd(0.1), mean(axis='data'), mean(), inner_period=3)",)
ROUNDS = 4


def name(spec: str) -> str:
  return spec.partition("(")[0]


def test_every_method_is_here():
  rows = [name(spec) for spec in (*SPECS[1], *SPECS[3], *SLICED)]
  assert sorted(rows) == sorted(registry.TABLE["method"])


@pytest.mark.parametrize("period", SPECS)
def test_state_is_stable_and_executions_agree(period, compilations):
  """Types, shardings and programs stay; eight rounds are four and four from a copy of the state.

  On mini-batches, of workers with different numbers of examples, once in slices.
  """
  methods = {name(spec): registry.build("method", spec) for spec in SPECS[period]}
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
  for wrappers, trait, _ in composition.REFUSED:
    for method in set(wrappers) & set(registry.TABLE["method"]):
      pairs = [aggregator for aggregator in around if trait in aggregator.traits]
      assert pairs, (method, trait)
      for aggregator in pairs:
        rows = [row for row in composition.REFUSED if method in row[0]]
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
