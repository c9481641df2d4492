"""Which pairs of a wrapper and an aggregator are refused, what the others send, and plain cases."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from aggregators import AGGREGATORS, PLAIN, REFUSED, SLICED, SPECS, between_slices, refusal
from problems import Running, distance, regression
from promises import COMPRESSORS, QUICK
from side_by_side import regressions, trained
from subset import slow_except

from research.aggregate import composition
from research.aggregate.blockwise import blockwise
from research.analysis import wire
from research.core import registry
from research.core.base import Aggregator, Trait
from research.core.builtin import TABLE
from research.parallel import layout, sharded

MESH = "fsdp"  # a mesh that cuts what a worker has
WRAPPERS = {
  "error_feedback": "error_feedback({})",
  "loco": "loco({}, reset=3)",
  "ef21": "ef21({})",
  "diana": "diana({}, alpha=0.5)",
  "momentum_correction": "momentum_correction({})",
  "worker_momentum": "worker_momentum({})",
  "only_large": "only_large({}, min_size=4)",
  "bucketed": "bucketed({})",
  "warm_up": "warm_up({}, steps=1)",
  "hierarchical": "hierarchical({})",
  "sign_flip": "sign_flip({}, faulty=1)",
  "gaussian": "gaussian({}, faulty=1, deviation=0.5)",
  "a_little_is_enough": "a_little_is_enough({}, faulty=1)",
  "inner_product": "inner_product({}, faulty=1, scale=0.5)",
  "edit_penalty": "edit_penalty({}, warm_up=1)",
  "noisy": "noisy({}, clip=1.0, noise=0.1)",
  MESH: "",
}
ENTRIES = SPECS | PLAIN
KEPT_TWICE = composition.MEMORY[Trait.MEMORY]
LEAVES = {
  "w": jax.ShapeDtypeStruct((6, 4), jnp.float32),
  "b": jax.ShapeDtypeStruct((3,), jnp.float32),
}
POLICIES = ("only_large", "bucketed", MESH)  # to which there is a point in a second leaf
# All pairs are traced. Those whose wrapper keeps a memory also run, and of the others those with
# SHORT; what a mesh cuts runs in test_composition.py, and so do the pairs of error_feedback.
SHORT = ("gather", "two_phase", "median")


def test_the_wrappers_are_all_that_take_an_aggregator():
  def takes_one(name):
    parameters = inspect.signature(registry.lookup(("aggregator",), name)).parameters
    return Aggregator in [parameter.annotation for parameter in parameters.values()]

  assert {*filter(takes_one, TABLE["aggregator"]), MESH} == set(WRAPPERS)


def wrapped(wrapper: str, name: str) -> Aggregator:
  if wrapper == MESH:
    cut = sharded.cut_of({"fsdp": 2}, regression())
    assert cut
    return blockwise(AGGREGATORS[name], cut)
  inner = between_slices(ENTRIES[name]) if wrapper == "hierarchical" else ENTRIES[name]
  return registry.build("aggregator", WRAPPERS[wrapper].format(inner))


def axes_of(wrapper: str, name: str) -> dict[str, int]:
  if wrapper == "hierarchical":
    return {"slice": 4, "data": 2}
  return {"slice": 2, "data": 4} if name in SLICED else {"data": 4}


def two_rounds(aggregator: Aggregator):
  """Values of two rounds; a state whose types changed would not go through the scan."""

  def worker(tree):
    def one(state, number):
      out = aggregator.aggregate(tree, state, jax.random.key(number))
      return out.state, (out.value, out.sent)

    return jax.lax.scan(one, aggregator.init(tree), jnp.arange(2))[1]

  return worker


@pytest.mark.parametrize("wrapper", slow_except(("error_feedback",), WRAPPERS))
def test_every_pair_is_refused_for_a_reason_or_runs(wrapper):
  pairs = {}
  for name in ENTRIES:
    why = refusal(wrapper, name)
    if why:
      with pytest.raises(ValueError, match=f"{wrapper} cannot be combined with .*: {why}"):
        wrapped(wrapper, name)
    elif wrapper == "hierarchical" and name in SLICED and "hierarchical" in SLICED[name]:
      with pytest.raises(ValueError, match=r"mesh axis|also uses 'data'"):
        traced(wrapped(wrapper, name), wrapper, axes_of(wrapper, name))
    else:
      pairs[name] = wrapped(wrapper, name)
      axes = axes_of(wrapper, name)
      rounds = lambda x, axes=axes: jax.ShapeDtypeStruct((*axes.values(), 2, *x.shape), x.dtype)
      assert traced(pairs[name], wrapper, axes) == (jax.tree.map(rounds, like(wrapper)),) * 2
  keeping = set().union(*(wrappers for wrappers, _, why in REFUSED if why == KEPT_TWICE))
  memory = wrapper in keeping - {"error_feedback"}
  keeps = [n for n in (pairs if memory else SHORT) if n in pairs and n not in SLICED]
  chosen = {} if wrapper == MESH else {n: pairs[n] for n in keeps}
  finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), run(chosen, wrapper))
  assert all(jax.tree.leaves(finite))


def like(wrapper: str) -> dict[str, jax.ShapeDtypeStruct]:
  return LEAVES if wrapper in POLICIES else {"w": LEAVES["w"]}


def spread(wrapper: str, axes: dict[str, int]):
  rows = lambda x: jax.ShapeDtypeStruct((*axes.values(), *x.shape), x.dtype)
  return jax.tree.map(rows, like(wrapper))


def traced(aggregator: Aggregator, wrapper: str, axes: dict[str, int]):
  program = layout.over_workers(two_rounds(aggregator), axes, 0, 0)
  return jax.eval_shape(program, spread(wrapper, axes))


def run(aggregators: dict[str, Aggregator], wrapper: str):
  axes, random = axes_of(wrapper, "mean"), np.random.default_rng(0)
  values = lambda x: random.normal(size=x.shape).astype(np.float32)
  worker = lambda tree: {n: two_rounds(a)(tree) for n, a in aggregators.items()}
  tree = jax.tree.map(values, spread(wrapper, axes))
  return jax.jit(layout.over_workers(worker, axes, 0, 0))(tree)


def test_every_refusal_has_a_pair():
  """In the table of wrappers and aggregators; methods have tests of their own."""
  for wrappers, _, why in REFUSED:
    for wrapper in set(wrappers) - set(TABLE["method"]):
      assert wrapper in WRAPPERS
      assert any(refusal(wrapper, name) == why for name in ENTRIES), (wrapper, why)


def sent_bytes(aggregator: Aggregator, tree, workers: int) -> float:
  one = lambda x: aggregator.aggregate(x, aggregator.init(x), jax.random.key(0)).value
  return sum(wire.by_axis(wire.traffic(one, tree, axes={"data": workers})).values())


@pytest.mark.parametrize("spec", slow_except(QUICK, COMPRESSORS))
def test_what_is_sent_is_the_payload(spec):
  """W-1 times in one gather; two_phase sends and answers W-1 chunks of ceil(n / W) elements."""
  compressor = registry.build("compressor", spec)
  workers, key = 8, jax.random.key(0)
  tree = [jax.ShapeDtypeStruct((40, 9), jnp.float32), jax.ShapeDtypeStruct((13,), jnp.float32)]

  def payload(*shape):
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jax.tree.leaves(jax.eval_shape(compressor.encode, like, key, key))
    return sum(x.size * x.dtype.itemsize for x in found)

  gathered = registry.build("aggregator", f"gather_mean({spec})")
  whole = payload(40, 9) + payload(13)
  assert sent_bytes(gathered, tree, workers) == (workers - 1) * whole
  if not compressor.contractive:
    with pytest.raises(ValueError, match="grow without bound"):
      registry.build("aggregator", f"two_phase({spec})")
    return
  both = registry.build("aggregator", f"two_phase({spec})")
  chunks = payload(5, 9) + payload(2)
  assert sent_bytes(both, tree, workers) == 2 * (workers - 1) * chunks


# With nothing lost or one worker these are the plain optimizer.
LOSSLESS = (
  "mean()", "gather_mean(identity())", "sum_mean(identity())", "two_phase(identity())",
  "error_feedback(two_phase(identity()))", "ef21(gather_mean(identity()))",
  "diana(gather_mean(identity()), alpha=0.5)", "error_feedback(power_sgd(3))",
  "warm_up(gather_mean(identity()), steps=2)", "bucketed(two_phase(identity()))",
  "median()", "geometric_median()", "centered_clip(1e3)",
)  # fmt: skip
MANY = ("mean()", *LOSSLESS[1:10])  # with many workers too, where the rule is no mean


@pytest.mark.parametrize("axes", slow_except([{"data": 8}], [{"data": 1}, {"data": 8}]), ids=str)
def test_without_loss_it_is_the_optimizer(axes):
  specs = dict(enumerate(LOSSLESS if axes["data"] == 1 else MANY))
  named = {str(i): registry.build("aggregator", spec) for i, spec in specs.items()}
  task, count = regression(), axes["data"]
  arguments = ("simulate", axes, (240 // count,) * count, None)
  run = Running(trained(named), *arguments, task=regressions(tuple(named)))
  params, optimizer = run.params()["0"], optax.sgd(0.1)

  @jax.jit
  def step(params):
    grads = jax.grad(task.loss)(params, task.train, None)
    return optax.apply_updates(params, optimizer.update(grads, optimizer.init(params))[0])

  for _ in range(4):
    params = step(params)
  found = run.rounds(4).params()
  for name, spec in specs.items():
    assert distance(found[str(name)], params) <= 1e-6, spec
