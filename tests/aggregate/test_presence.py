"""Absent is not zero: what lost, idle and unsampled workers have reaches nobody, and stays theirs.

And zero is a value like any other: a round of zero gradients, or with a rate of zero, ends nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aggregators import AGGREGATORS, FLAT
from aggregators import SLICED as SLICES
from catalogue import GRAPHS, METHODS, NAMES, SLICED
from problems import SIMULATED, Running, distance, regression
from side_by_side import regressions, side_by_side
from subset import slow_except

from research.aggregate.privacy.clipping import clipped
from research.core import registry
from research.core.base import EVERYONE, Presence, Trait
from research.core.method import Method
from research.parallel.job import traits
from research.testing import aggregators, methods
from research.testing.absence import ABSENT, LEAVES, WEIGHTS, W, drawn, folded

SLICED_AXES = {"slice": 2, "data": 4}
KEY = jax.random.key(0)
GROUPS = slow_except(["sliced"], ("flat", "sliced"))
NEIGHBOURS = ("gossip", "push_sum", "choco", "q1_gossip", "q2_gossip")
# Aggregators that nobody may be absent from, by a refusal that `test_what_has_no_meaning` shows.
EVERYBODY = {n for n, a in AGGREGATORS.items() if Trait.EVERYONE in a.traits} | {*NEIGHBOURS}
MEET = {n: a for n, a in AGGREGATORS.items() if n not in EVERYBODY and n not in SLICES}
BETWEEN_SLICES = {n: AGGREGATORS[n] for n in SLICES if n not in EVERYBODY} | {
  "hierarchical_median": registry.build("aggregator", "hierarchical(median(axis='slice'))"),
  "hierarchical_vote": registry.build("aggregator", "hierarchical(majority_vote(axis='slice'))"),
}
# Those of which equal contributions give that contribution, whoever sends it: all but attacked
# ones, those with noise, and those that draw a rounding of their own.
EQUAL = [
  n
  for n, a in MEET.items()
  if not a.traits & (Trait.FORGED | Trait.NOISE | Trait.EXPANSIVE) and n != "secure_sum"
]


@functools.cache
def spread(one: Callable[..., Any]) -> Callable[..., Any]:
  return jax.jit(jax.vmap(one, axis_name="data"))


def over_workers(one: Callable[..., Any], *rows: Any) -> Any:
  return jax.device_get(spread(one)(*rows))


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_of_who_is_absent_arrives_and_its_memory_stays(group):
  """Of every aggregator but those that need everyone."""
  if group == "flat":
    aggregators.absent(MEET, SIMULATED)
  else:
    aggregators.absent(BETWEEN_SLICES, SLICED_AXES)


@pytest.mark.slow
def test_equal_contributions_of_those_present_give_that_contribution():
  """As when everyone sends it, however many they are and however much each of them weighs."""
  aggregators.equal({n: MEET[n] for n in EQUAL})


def test_rules_that_compress_nothing_give_the_very_contribution():
  one = drawn(2)
  rows = jax.tree.map(lambda x: np.broadcast_to(x, (W, *x.shape)), one)
  chosen = {"mean", "median", "trimmed_mean", "multi_krum", "geometric_median"} & {*MEET}

  def worker(tree, weight, active):
    run = lambda a: a.aggregate(tree, a.init(tree), KEY, Presence(weight, active)).value
    return {n: run(MEET[n]) for n in chosen}

  for present in (8, 5, 3, 1):
    active = np.arange(W) < present
    uneven = np.where(active, np.linspace(1, 3, W), 0)
    found = over_workers(worker, rows, (W * uneven / uneven.sum()).astype(np.float32), active)
    for name, got in found.items():
      assert distance(jax.tree.map(lambda x: x[0], got), one) <= 1e-6, (name, present)


def robust_in_numpy(x: np.ndarray) -> dict[str, np.ndarray]:
  """Median, trimmed mean, Krum, multi-Krum and one step of centered clipping of rows [n, d]."""
  n, ordered = len(x), np.sort(x, 0)
  trim = int(0.2 * n + 1e-9)
  distances = ((x[:, None] - x[None]) ** 2).sum(-1)
  near = min(max(n - 1 - 2, 1), n - 1)
  best = np.argsort(np.sort(distances, 1)[:, 1 : 1 + near].sum(1), kind="stable")
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  return {
    "median()": np.median(x, 0),
    "trimmed_mean(0.2)": ordered[trim : n - trim].mean(0),
    "krum(1)": x[best[0]],
    "multi_krum(1, 3)": x[best[: min(3, n)]].mean(0),
    "centered_clip(2.0)": (x * np.minimum(1, 2.0 / norms)).mean(0),
  }


def test_robust_rules_are_those_of_the_values_present():
  """Against numpy on the rows of those present, and nothing at all where nobody is."""
  rows = drawn(3, W)
  flat = lambda tree: np.concatenate([np.asarray(tree[k]).reshape(W, -1) for k in "bw"], -1)
  x = flat(rows).astype(np.float64)
  built = {spec: registry.build("aggregator", spec) for spec in robust_in_numpy(x)}

  def worker(tree, weight, active):
    told = Presence(weight, active)
    return {s: a.aggregate(tree, a.init(tree), KEY, told).value for s, a in built.items()}

  program = jax.jit(jax.vmap(worker, axis_name="data"))
  for present in (8, 6, 5, 2, 0):
    there = np.random.default_rng(present).permutation(W) < present
    weight = np.where(there, W / max(present, 1), 0).astype(np.float32)
    want = robust_in_numpy(x[there]) if present else dict.fromkeys(built, np.zeros(x.shape[1]))
    for spec, got in program(rows, weight, there).items():
      tiled = np.tile(want[spec], (W, 1))
      np.testing.assert_allclose(flat(got), tiled, atol=2e-5, err_msg=f"{spec}, {present}")


def test_a_vote_is_among_those_present():
  """Three of eight vote no; absent workers have no vote, nor is a tie decided by them."""
  vote = registry.build("aggregator", "majority_vote()")
  votes = np.asarray([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0], np.float32)
  ask = lambda x, active: vote.aggregate({"w": x}, (), KEY, Presence(1.0, active)).value["w"]
  count = lambda there: over_workers(ask, votes, np.asarray(there)).tolist()
  assert count([True] * 3 + [False] * 5) == [-1.0] * W
  assert count([True] * 4 + [False] * 4) == [-1.0] * W
  assert count([True] * 6 + [False] * 2) == [1.0] * W  # a tie
  assert count([True] * 8) == [1.0] * W


@pytest.mark.slow
def test_nothing_is_lost_to_a_memory_while_some_are_absent():
  """value + mean of memories = mean of what those present have, and memories of before: always."""
  specs = {
    "flat": "error_feedback(gather_mean(top_k(0.25)))",
    "sliced": "error_feedback(hierarchical(gather_mean(top_k(0.25), axis='slice')))",
    "coarse": "error_feedback(hierarchical(gather_mean(int4(), axis='slice')))",
  }
  built = {name: registry.build("aggregator", spec) for name, spec in specs.items()}

  def worker(tree, weight, active):
    found = {}
    for name, aggregator in built.items():
      state, sums = aggregator.init(tree), jax.tree.map(jnp.zeros_like, tree)
      for number, told in enumerate((EVERYONE, Presence(weight, active))):
        out = aggregator.aggregate(tree, state, jax.random.fold_in(KEY, number), told)
        state, sums = out.state, jax.tree.map(jnp.add, sums, out.value)
      found[name] = sums, state.memory
    return found

  rows = drawn(8, W)
  found = folded(worker, SLICED_AXES)(rows, WEIGHTS, ~ABSENT)
  for name, (sums, memory) in found.items():
    for leaf in LEAVES:
      x = np.asarray(rows[leaf], np.float64)
      shares = 1 + WEIGHTS.reshape(-1, *[1] * (x.ndim - 1))
      got = np.asarray(sums[leaf][0]) + np.asarray(memory[leaf]).mean(0)
      np.testing.assert_allclose(got, (shares * x).mean(0), atol=1e-5, err_msg=name)


# ---- methods


@pytest.mark.parametrize("group", GROUPS)
def test_a_lost_round_of_a_worker_reaches_nobody(group):
  """Of every method, but those on graphs, whose neighbours must all be there."""
  if group == "flat":
    methods.lost({n: METHODS[n] for n in NAMES if n not in GRAPHS}, SIMULATED)
  else:
    methods.lost({n: METHODS[n] for n in SLICED}, SLICED_AXES)


@pytest.mark.slow
def test_a_round_that_nobody_takes_part_in_changes_nothing():
  """Wherever it comes: the state is what the other rounds alone leave, counts and all."""
  more = {
    "uniform": "delayed(data_parallel(sgd(0.1), mean()), uniform(3))",
    "apply_every": "data_parallel(chain(apply_every(4), sgd(0.1)), mean())",
  }
  built = {n: METHODS[n] for n in NAMES if n not in GRAPHS}
  methods.empty(built | {n: registry.build("method", s) for n, s in more.items()})


RULES = (
  *("mean()", "median()", "krum(1)", "geometric_median()", "trimmed_mean(0.2)"),
  "error_feedback(gather_mean(top_k(0.3)))",
  "worker_momentum(median(), momentum=0.5)",
)


@functools.cache
def descended(executor: str, dropout: float) -> Any:
  """The parameters of each rule, of workers that have the same examples."""
  names = tuple(map(str, range(len(RULES))))
  same = regression(30)
  task = same._replace(train={k: np.concatenate([v] * W) for k, v in same.train.items()})
  build = lambda spec: registry.build("method", f"data_parallel(sgd(0.2), {spec})")
  methods = side_by_side(dict(zip(names, map(build, RULES), strict=True)))
  arguments = (methods, executor, SIMULATED, (30,) * W, None, 0.0, regressions(names, task))
  return Running(*arguments, dropout=dropout).rounds(40).params()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["simulate", "spmd"])
def test_dropout_finds_the_optimum_with_any_rule(executor):
  """Three in ten lost per round: a rule over those present is near what it is over all."""
  lost, whole = descended(executor, 0.3), descended("simulate", 0.0)
  for name, spec in enumerate(RULES):
    assert distance(lost[str(name)], whole[str(name)]) <= 2e-2, spec


@pytest.mark.parametrize(
  ("spec", "more", "words"),
  [
    ("data_parallel(sgd(0.1), ef21(gather_mean(sign())))", {"dropout": 0.1}, "ef21 and diana"),
    (
      "data_parallel(sgd(0.1), diana(gather_mean(qsgd()), alpha=0.1))",
      {"sizes": (15,) * 16},
      "pop",
    ),
    ("d_psgd(sgd(0.1), gossip(ring()))", {"dropout": 0.1}, "leave its links empty"),
    ("sgp(sgd(0.1), exponential())", {"dropout": 0.1}, "leave its links empty"),
    ("extra(0.1, choco(int8(), ring(), gamma=0.5))", {"dropout": 0.1}, "choco|memory"),
  ],
)
def test_what_has_no_meaning_is_refused(spec, more, words):
  with pytest.raises(ValueError, match=words):
    Running(registry.build("method", spec), "simulate", SIMULATED, **{"sizes": (30,) * W, **more})


def test_traits_are_those_of_every_aggregator_inside():
  for spec in FLAT.values():
    inner = registry.build("aggregator", spec)
    for outer in ("data_parallel(sgd(0.1), {})", "averaged(diloco(sgd(0.1), sgd(1.0), {}))"):
      try:
        method = registry.build("method", outer.format(spec))
      except ValueError:
        continue
      assert inner.traits in traits(method)
  assert Trait.LOCAL in traits(registry.build("method", "sgp(sgd(0.1), ring())"))


# ---- zero is a value


def rounds_of(method: Method, grads: Any) -> tuple[Any, Any]:
  """A worker's models after rounds of its gradients, some of them times zero; and its state."""

  def one(state, of_round):
    number, scale = of_round
    local, key = method.begin(state), jax.random.fold_in(KEY, number)
    gradient = lambda params: jax.tree.map(lambda g: scale * g, grads)
    step = lambda local, _: (
      method.step(gradient(local.params), local, state, key=key, grad_fn=gradient),
      None,
    )
    local, _ = jax.lax.scan(step, local, length=method.local_steps)
    state = method.sync(local, state, key=key)
    return state, method.params(state)

  scales = jnp.asarray([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
  start = method.init(jax.tree.map(jnp.zeros_like, grads))
  state, models = jax.lax.scan(one, start, (jnp.arange(len(scales)), scales))
  return models, state


@pytest.mark.parametrize("group", GROUPS)
def test_a_round_of_zero_gradients_ends_nothing(group):
  """First, in between, or at the end: all stays finite, and the next gradient moves the model."""
  names = NAMES if group == "flat" else list(SLICED)
  axes = SIMULATED if group == "flat" else SLICED_AXES
  grads = drawn(6, W)

  def worker(grads):
    return {name: rounds_of(METHODS[name], grads) for name in names}

  for name, (models, state) in folded(worker, axes)(grads).items():
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(bool(jnp.isfinite(x).all()) for x in floats), name
    moved = np.abs(np.diff(np.asarray(models["w"]), axis=1)).max((0, 2, 3))
    assert moved[3:].max() > 0, name  # after rounds of zeros


RATE = "linear_schedule(0.0, 0.1, 4)"


@pytest.mark.slow
@pytest.mark.parametrize(
  "spec",
  [
    f"data_parallel(sgd({RATE}), error_feedback(power_sgd(1)))",
    f"local_sgd(adam({RATE}), mean(), period=2)",
    f"slow_mo(sgd({RATE}), mean(), period=2, learning_rate={RATE})",
    f"diloco(sgd({RATE}), sgd(0.7, momentum=0.9), error_feedback(two_phase(sign())), period=2)",
    f"fed_adam(sgd({RATE}), mean(), period=6)",
    f"signum({RATE}, majority_vote())",
    f"onebit_adam({RATE}, error_feedback(two_phase(sign())), warm_up=2)",
    f"zero_one_adam({RATE}, error_feedback(two_phase(sign())), warm_up=2, double_every=2)",
    f"demo({RATE}, gather_mean(dct_top_k(2, 2)))",
    f"marina({RATE}, gather_mean(qsgd()))",
    f"dc_asgd({RATE}, mean(), constant(1))",
    f"hogwild({RATE}, mean(), bound=2)",
    "slow_mo(sgd(linear_schedule(0.000001, 0.1, 8)), mean(), period=4, "
    "learning_rate=linear_schedule(0.000001, 0.1, 8))",
  ],
)
def test_a_rate_that_starts_at_zero_is_a_rate(spec):
  """A warm-up from exactly 0 goes on as one from nearly 0 does: finite, and downhill at last."""
  task = regression()
  run = Running(registry.build("method", spec), "simulate", SIMULATED, batch_size=None)
  start = task.loss(run.params(), task.train, KEY)
  end = task.loss(run.rounds(12).params(), task.train, KEY)
  assert bool(run.metrics["finite"])
  assert float(end) < float(start)


@pytest.mark.parametrize(
  "spec",
  [
    "onebit_adam(0.1, error_feedback(two_phase(sign())), warm_up=2)",
    "zero_one_adam(0.1, error_feedback(two_phase(sign())), warm_up=2, double_every=8)",
    "marina(0.1, gather_mean(int8()), probability=0.01)",
  ],
)
def test_what_learns_from_first_rounds_learns_from_later_ones(spec):
  """If those had zero gradients alone, the next ones stand in for them: x^2 / 2 falls from 1."""
  method = registry.build("method", spec)

  def worker(start):
    def one(state, number):
      gradient = lambda params: jax.tree.map(lambda x: jnp.where(number < 3, 0.0, x), params)
      local = method.begin(state)
      local = method.step(gradient(local.params), local, state, key=KEY, grad_fn=gradient)
      return method.sync(local, state, key=jax.random.fold_in(KEY, number)), None

    return method.params(jax.lax.scan(one, method.init({"w": start}), jnp.arange(20))[0])

  found = np.asarray(over_workers(worker, jnp.ones((2, 8)))["w"])
  assert (np.abs(found) < 0.7).all()


@spread
def power_sgd_rounds(rounds):
  aggregator = registry.build("aggregator", "error_feedback(power_sgd(2))")

  def one(state, tree):
    out = aggregator.aggregate({"w": tree}, state, jax.random.key(0))
    return out.state, out.value["w"]

  return jax.lax.scan(one, aggregator.init({"w": rounds[0]}), rounds)[1]


@pytest.mark.parametrize("when", [0, 2, None])
def test_power_sgd_finds_a_matrix_of_its_rank_after_any_round(when):
  """A rank-one mean whose first rows are zero: no error from the next round on."""
  random = np.random.default_rng(0)
  matrix = (random.normal(size=(32, 1)) @ random.normal(size=(1, 16))).astype(np.float32)
  matrix[:4] = 0
  rounds = np.stack([matrix * (i != when) for i in range(5)])
  found = np.asarray(power_sgd_rounds(np.broadcast_to(rounds, (4, *rounds.shape))))[0]
  for value in found[(0 if when is None else when + 1) :][1:]:
    assert distance(value, matrix) <= 1e-4


# ---- sums over workers in 16 bits

NARROW = {
  "mean()", "gather_mean(int8())", "gather_mean(identity())", "sum_mean(identity())",
  "sum_mean(bf16())", "two_phase(int8())", "two_phase(bf16())", "ef21(gather_mean(int8()))",
  "diana(gather_mean(int8()), alpha=1.0)", "error_feedback(gather_mean(int8()))",
  "error_feedback(mean())", "worker_momentum(mean(), momentum=0.0)", "power_sgd(1)",
  "momentum_correction(gather_mean(top_k(1.0)), momentum=0.0)", "bucketed(mean())",
  "only_large(gather_mean(int8()), min_size=4)", "warm_up(gather_mean(int8()), steps=1)",
  "noisy(mean(), clip=1e6, noise=0.0)", "median()", "trimmed_mean(0.25)", "geometric_median()",
  "centered_clip(1e6)", "gossip(complete())", "push_sum(complete())",
  "choco(int8(), complete(), gamma=1.0)", "q1_gossip(identity(), complete())",
  "q2_gossip(identity(), complete())", "gather_mean(hadamard(int8()))", "gather_mean(fp8())",
  "gather_mean(natural())", "sum_mean(count_sketch(1, 64))", "gather_mean(sign())",
  "secure_sum(clip=20000.0, bits=24)",
}  # fmt: skip


def test_a_narrow_mean_of_those_present_is_in_range():
  """Weights are no part of the dtype: five of eight times 50,000 is 50,000, in float16."""
  mean = registry.build("aggregator", "mean()")
  rows, there = jnp.full((W, 4), 50000.0, jnp.float16), np.arange(W) < 5
  ask = lambda x, w, a: mean.aggregate(x, (), KEY, Presence(w, a)).value
  got = over_workers(ask, rows, np.where(there, 1.6, 0).astype(np.float32), there)
  np.testing.assert_allclose(np.asarray(got, float), 50000, rtol=1e-3)


def test_a_norm_is_wide():
  """300 four times has the norm 600, whose square float16 does not have: clipped to 1 it is .5."""
  got = jax.jit(clipped)({"w": np.full(4, 300.0, np.float16)}, 1.0)["w"]
  assert got.dtype == jnp.float16
  np.testing.assert_allclose(np.asarray(got, float), 0.5, rtol=1e-3)


def test_sums_of_a_worker_s_own_are_wide():
  """1,024 mini-batches of a gradient of one, in bfloat16, are one; and so is a mean of iterates."""
  x, ones = {"w": jnp.zeros(3, jnp.bfloat16)}, {"w": jnp.ones(3, jnp.bfloat16)}
  method = registry.build("method", "data_parallel(sgd(1.0), mean(), period=1024)")
  control = registry.build("method", "scaffold(0.001, mean(), period=1024)")
  still = registry.build("method", "averaged(data_parallel(sgd(1.0), mean()))")

  def rounds(_):
    found = {}
    for name, each in {"mean": method, "control": control}.items():
      state = each.init(x)
      step = lambda local, _, m=each, s=state: (m.step(ones, local, s, key=KEY), None)
      local = jax.lax.scan(step, each.begin(state), length=1024)[0]
      found[name] = each.sync(local, state, key=KEY)
    state = still.init(x)

    def one(state, number):
      grads = jax.tree.map(lambda g: -g * (number == 100), ones)
      local = still.step(grads, still.begin(state), state, key=KEY)
      return still.sync(local, state, key=KEY), None

    found["averaged"] = still.params(jax.lax.scan(one, state, jnp.arange(2000))[0])
    return found

  found = over_workers(rounds, jnp.zeros(2))
  np.testing.assert_allclose(np.asarray(found["mean"].params["w"], float), -1)
  np.testing.assert_allclose(np.asarray(found["control"].control["w"], float), 1)
  np.testing.assert_allclose(np.asarray(found["averaged"]["w"], float), 0.95, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 1024])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_means_of_narrow_floats_are_those_of_float64(dtype, count):
  """1,024 ones are one, eight ten-thousands ten thousand, and what differs is off by a rounding."""
  many = ("gossip", "push_sum", "choco", "q1", "q2", "secure", "geometric", "centered")
  chosen = [s for s in sorted(NARROW) if count == 8 or not s.startswith(many)]
  built = {spec: registry.build("aggregator", spec) for spec in chosen}
  top = 10000.0
  random = np.random.default_rng(0)
  near = 1 + 0.1 * random.normal(size=(count, 8))
  rows = {
    "ones": jnp.ones((count, 8), dtype),
    "large": jnp.full((count, 8), top, dtype),
    "near": jnp.asarray(near, dtype),
  }

  def worker(rows):
    one = lambda a, x: a.aggregate({"w": x}, a.init({"w": x}), jax.random.key(0)).value["w"]
    together = jnp.stack([*rows.values()])
    found = {s: jax.lax.map(functools.partial(one, a), together) for s, a in built.items()}
    return {s: dict(zip(rows, values, strict=True)) for s, values in found.items()}

  step = float(jnp.finfo(dtype).eps)
  loose = {"gather_mean(natural())": 0.5, "gather_mean(sign())": 0.2, "gather_mean(fp8())": 0.07}
  for spec, values in over_workers(worker, rows).items():
    allowed = loose.get(spec, 0.02)
    for name, value in values.items():
      assert value.dtype == dtype
      if spec in ("median()", "trimmed_mean(0.25)", "power_sgd(1)") and name == "near":
        continue  # no mean
      want = np.asarray(rows[name], np.float64).mean(0)
      off = np.abs(np.asarray(value, np.float64) / want - 1).max()
      assert off <= max(allowed, 4 * step), (spec, name, off)


def test_a_narrow_mean_is_exact_where_it_is_simulated():
  """The nearest number to the float64 mean, in both dtypes; small float16 numbers do not vanish."""
  mean = registry.build("aggregator", "mean()")
  for dtype, scale in ((jnp.bfloat16, 1.0), (jnp.float16, 1.0), (jnp.float16, 1e-5)):
    rows = jnp.asarray(scale * np.random.default_rng(1).normal(size=(1000, 16)), dtype)
    got = over_workers(lambda x: mean.aggregate(x, (), KEY).value, rows)
    want = np.asarray(rows, np.float64).mean(0).astype(dtype)
    np.testing.assert_allclose(np.asarray(got[0], float), want.astype(float), rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("spec", ["qsgd()", "qsgd(1)", "terngrad()", "int8()", "int4()", "fp8()"])
def test_huge_values_are_themselves_or_no_numbers(spec):
  """Four times 2^127: half an octave off at most, never small."""
  aggregator = registry.build("aggregator", f"gather_mean({spec})")
  rows = jnp.full((4, 8), 2.0**127, jnp.float32)
  value = over_workers(lambda x: aggregator.aggregate(x, (), jax.random.key(0)).value, rows)[0]
  value = np.asarray(value, np.float64)
  assert (~np.isfinite(value) | (np.abs(value / 2.0**127 - 1) < 0.6)).all()


def test_empty_leaves_take_no_part_in_a_bucket():
  bucketed = registry.build("aggregator", "bucketed(mean())")
  tree = {"big": jnp.ones((W, 5, 300)), "empty": jnp.ones((W, 5, 0)), "small": jnp.ones((W, 2))}
  got = over_workers(lambda t: bucketed.aggregate(t, bucketed.init(t), KEY).value, tree)
  assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, tree)
  assert float(got["big"].sum()) == W * 1500
