"""Robust averages: their papers in numpy, what faulty workers can do to them, and their bytes."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from problems import distance

from research.aggregate.mean import mean
from research.aggregate.momentum import worker_momentum
from research.aggregate.robust import attacks
from research.aggregate.robust import coordinates as robust
from research.aggregate.robust import vectors as robust_vectors
from research.analysis import wire
from research.comm import mesh
from research.core.base import EVERYONE, Aggregate, Aggregator, Tree
from research.parallel import layout

W, FAULTY = 9, 2
# W = 9 divides the first leaf's rows, and neither the second leaf nor the scalar; 8 divides none
SHAPES = {"w": (18, 3), "b": (7,), "s": ()}
SIZE = 62
RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.normal(size=SIZE) * 2
STEPS = (TRUTH + RANDOM.normal(size=(3, W, SIZE))).astype(np.float32)  # by step and worker

RULES: dict[str, Aggregator] = {
  "median": robust.median(),
  "trimmed_mean": robust.trimmed_mean(0.25),
  "krum": robust_vectors.krum(FAULTY),
  "multi_krum": robust_vectors.multi_krum(FAULTY, 3),
  "geometric_median": robust_vectors.geometric_median(iterations=4, smoothing=1e-3),
  "centered_clip": robust_vectors.centered_clip(12.0, iterations=4),
}


def as_tree(flat: np.ndarray) -> Tree:
  """[..., 62] to leaves [..., *shape]."""
  edges = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES.values())])
  return {
    name: flat[..., edges[i] : edges[i + 1]].reshape(*flat.shape[:-1], *shape)
    for i, (name, shape) in enumerate(SHAPES.items())
  }


def as_flat(tree: Tree, lead: int) -> np.ndarray:
  parts = [np.asarray(tree[name]) for name in SHAPES]
  return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in parts], -1)


def values(aggregator: Aggregator, tree: Tree) -> Tree:
  """What one worker receives in each round, from leaves [rounds, ...]."""
  state = aggregator.init(jax.tree.map(lambda x: x[0], tree))

  def one(state, of_round):
    step, x = of_round
    out = aggregator.aggregate(x, state, jax.random.key(step))
    return out.state, out.value

  steps = jnp.arange(jax.tree.leaves(tree)[0].shape[0])
  return jax.lax.scan(one, state, (steps, tree))[1]


@jax.jit
def every_rule(tree: Tree) -> dict[str, Tree]:
  """Of all rules, what each worker receives: leaves [workers, rounds, ...]."""
  worker = lambda tree: {name: values(rule, tree) for name, rule in RULES.items()}
  return jax.vmap(worker, 1, axis_name="data")(tree)


def received(steps: np.ndarray) -> dict[str, np.ndarray]:
  """[rounds, W, 62] to each rule's values [rounds, 62], which all workers have alike."""
  found = {name: as_flat(value, 2) for name, value in every_rule(as_tree(steps)).items()}
  for value in found.values():
    np.testing.assert_array_equal(value, np.broadcast_to(value[:1], value.shape))
  return {name: value[0] for name, value in found.items()}


def krum_by_hand(steps: np.ndarray, selected: int) -> Iterator[np.ndarray]:
  for x in steps:
    scores = []
    for i in range(W):
      others = sorted(((x[i] - x[j]) ** 2).sum() for j in range(W) if j != i)
      scores.append(sum(others[: W - FAULTY - 2]))
    yield x[np.argsort(scores, kind="stable")[:selected]].mean(0)


def geometric_median_by_hand(steps: np.ndarray) -> Iterator[np.ndarray]:
  for x in steps:
    v = np.median(x, 0)
    for _ in range(4):
      beta = 1 / np.maximum(1e-3, np.linalg.norm(x - v, axis=1))
      v = beta @ x / beta.sum()
    yield v


def centered_clip_by_hand(steps: np.ndarray) -> Iterator[np.ndarray]:
  v = np.zeros(SIZE)
  for x in steps:
    for _ in range(4):
      v = v + np.mean([(one - v) * min(1, 12 / np.linalg.norm(one - v)) for one in x], 0)
    yield v


BY_HAND: dict[str, Callable[[np.ndarray], Iterable[np.ndarray]]] = {
  "median": lambda steps: np.median(steps, 1),
  "trimmed_mean": lambda steps: np.sort(steps, 1)[:, 2:-2].mean(1),
  "krum": lambda steps: krum_by_hand(steps, 1),
  "multi_krum": lambda steps: krum_by_hand(steps, 3),
  "geometric_median": geometric_median_by_hand,
  "centered_clip": centered_clip_by_hand,
}


@pytest.mark.parametrize("offset", [0, 4096])
def test_three_steps_equal_numpy(offset):
  """Also where what workers have in common is large beside their distances."""
  steps = STEPS + np.float32(offset)
  found = received(steps)
  for name in RULES:
    for got, want in zip(found[name], BY_HAND[name](steps.astype(np.float64)), strict=True):
      np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_who_sends_what_does_not_matter():
  want, got = received(STEPS), received(STEPS[:, ::-1])
  for name in RULES:
    np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 8}, {"slice": 2, "data": 4}], ids=str)
def test_on_eight_devices_it_is_the_same(axes):
  """Even W, and no leaf that W divides; with slices the workers stand on two axes."""
  tree = as_tree(np.moveaxis(STEPS[:, :8], 1, 0))

  def worker(rows):
    one = jax.tree.map(lambda x: x[0], rows)
    mine = {name: values(rule, one) for name, rule in RULES.items()}
    return jax.tree.map(lambda x: x[None], mine)

  spread = jax.shard_map(
    worker,
    mesh=mesh.device_mesh(axes),
    in_specs=P(tuple(axes)),
    out_specs=P(tuple(axes)),
    check_vma=False,
  )
  got, want = jax.jit(spread)(tree), every_rule(as_tree(STEPS[:, :8]))
  for name in RULES:
    assert distance(got[name], want[name]) <= 1e-6, name


def test_value_and_state_are_equal_on_all_workers():
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32), as_tree(STEPS[0]))
  spread = jax.tree.map(lambda x: jax.ShapeDtypeStruct((W, *x.shape), x.dtype), like)
  for name, rule in RULES.items():
    attacked = attacks.a_little_is_enough(rule, faulty=FAULTY)
    state = jax.eval_shape(rule.init, like)
    one = lambda tree, state, rule=attacked: rule.aggregate(tree, state, jax.random.key(0))
    private = layout.private_outputs(one, {"data": W}, (0, None), spread, state)
    assert not any(jax.tree.leaves((private.value, private.state))), name
    assert all(jax.tree.leaves(private.sent)), name


def radius_of_honest(x: np.ndarray) -> float:
  """How far from their mean the honest workers' vectors lie at most."""
  honest = x[FAULTY:]
  return float(np.linalg.norm(honest - honest.mean(0), axis=1).max())


def missed(value: np.ndarray, x: np.ndarray) -> float:
  """A value's distance from the honest mean, in such radii."""
  return float(np.linalg.norm(value - x[FAULTY:].mean(0)) / radius_of_honest(x))


ATTACKS: dict[str, Callable[[Aggregator], Aggregator]] = {
  "sign_flip": lambda rule: attacks.sign_flip(rule, faulty=FAULTY, scale=10.0),
  "gaussian": lambda rule: attacks.gaussian(rule, faulty=FAULTY, deviation=100.0),
  "a_little_is_enough": lambda rule: attacks.a_little_is_enough(rule, faulty=FAULTY, z=20.0),
  "inner_product": lambda rule: attacks.inner_product(rule, faulty=FAULTY, scale=10.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_minority_that_lies_does_not_move_them_out_of_the_honest_ones(attack):
  """Each rule ends within the honest workers' radius of their mean; the plain mean does not."""

  def worker(tree):
    rules = {**RULES, "mean": mean()}
    return {name: values(ATTACKS[attack](rule), tree) for name, rule in rules.items()}

  found = jax.jit(jax.vmap(worker, 1, axis_name="data"))(as_tree(STEPS))
  for name, tree in found.items():
    got = missed(as_flat(tree, 2)[0, -1], STEPS[-1])
    assert got > 1 if name == "mean" else got < 1, (name, got)


@pytest.mark.parametrize("sent", [np.nan, -np.nan, np.inf, -np.inf, 1e30])
def test_a_minority_that_sends_what_is_no_number_does_not_poison(sent):
  steps = STEPS.copy()
  steps[:, 0, :] = sent
  steps[:, 1, 3] = sent  # a single coordinate of the second faulty worker
  for name, value in received(steps).items():
    assert np.isfinite(value).all(), name
    assert missed(value[-1], STEPS[-1]) < 1, name


class Echo(Aggregator):
  """Every worker receives what it sends."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    return Aggregate(tree, tree, state)


def test_what_the_attackers_send():
  echo = Echo()

  @jax.jit
  @partial(jax.vmap, axis_name="data")
  def shown(x):
    return {
      name: attack(echo).aggregate(x, (), jax.random.key(0)).value
      for name, attack in ATTACKS.items()
    }

  found = {name: as_flat(tree, 1) for name, tree in shown(as_tree(STEPS[0])).items()}
  for value in found.values():
    np.testing.assert_array_equal(value[FAULTY:], STEPS[0, FAULTY:])
  mu, sigma = STEPS[0, FAULTY:].mean(0), STEPS[0, FAULTY:].std(0)
  for i in range(FAULTY):
    np.testing.assert_allclose(found["sign_flip"][i], -10 * STEPS[0, i], rtol=1e-5)
    np.testing.assert_allclose(found["a_little_is_enough"][i], mu - 20 * sigma, atol=1e-4)
    np.testing.assert_allclose(found["inner_product"][i], -10 * mu, atol=1e-4)
  noise = found["gaussian"][:FAULTY] / 100
  assert abs(np.mean(noise[0] * noise[1])) < 0.5
  assert 0.8 < noise.std() < 1.2


@pytest.mark.slow
def test_a_little_is_enough_goes_unnoticed_and_moves_the_median():
  """Four of nine: nearer to the mean than the honest ones, yet with them they are the majority."""
  z = attacks.largest_unnoticed(W, 4)  # s = 1: Phi(z) = 4/5
  assert z == pytest.approx(0.8416, abs=1e-4)
  x, honest = STEPS[0].astype(np.float64), STEPS[0, 4:].astype(np.float64)
  sent = honest.mean(0) - z * honest.std(0)
  far = np.linalg.norm(honest - honest.mean(0), axis=1)
  assert np.linalg.norm(sent - honest.mean(0)) < far.max()
  rule = attacks.a_little_is_enough(robust.median(), faulty=4)
  one = lambda tree: rule.aggregate(tree, (), jax.random.key(0)).value
  moved = as_flat(jax.vmap(one, axis_name="data")(as_tree(STEPS[0])), 1)[0]
  x[:4] = sent
  np.testing.assert_allclose(moved, np.median(x, 0), atol=1e-5)
  assert np.mean(moved < np.median(honest, 0)) > 0.9
  with pytest.raises(
    ValueError, match=r"a_little_is_enough\(faulty=5\) has no z of its own among 9"
  ):
    attacks.largest_unnoticed(W, 5)


def test_under_sign_flips_krum_converges_and_the_mean_diverges():
  """Gradient descent on the workers' quadratics 1/2 ||x - c_i||^2, two of nine workers lying."""
  centres = jnp.asarray(STEPS[0])

  def descent(rule):
    rule = attacks.sign_flip(rule, faulty=FAULTY, scale=10.0)

    def worker(centre):
      def step(x, number):
        return x - 0.2 * rule.aggregate(x - centre, (), jax.random.key(number)).value, None

      return jax.lax.scan(step, jnp.zeros(SIZE), jnp.arange(60))[0]

    return np.asarray(jax.jit(jax.vmap(worker, axis_name="data"))(centres)[0])

  assert missed(descent(RULES["krum"]), STEPS[0]) <= 1
  assert missed(descent(mean()), STEPS[0]) > 100


def test_momentum_brings_honest_workers_together():
  """(1 - m)/(1 + m) = 1/19 of the variance is left in a momentum, and Krum takes one of them."""
  steps = (TRUTH + RANDOM.normal(size=(120, W, SIZE))).astype(np.float32)
  rules = (RULES["krum"], worker_momentum(RULES["krum"]))
  run = jax.jit(jax.vmap(lambda x: [values(rule, x) for rule in rules], 1, axis_name="data"))
  errors = [np.mean((np.asarray(x)[0, 60:] - TRUTH) ** 2) for x in run(steps)]
  assert 1 / 25 < errors[1] / errors[0] < 1 / 15


@pytest.mark.parametrize("workers", [8, 64])
@pytest.mark.parametrize("name", RULES)
def test_it_costs_an_all_reduce_and_a_little_that_does_not_grow(name, workers):
  """2 (W-1)/W of the tree, in its own dtype, and at most W^2 numbers besides."""

  def sent(rows: int, dtype=jnp.float32) -> float:
    tree = {"w": jnp.zeros((rows, 64), dtype), "b": jnp.zeros(64, dtype)}
    one = lambda x: RULES[name].aggregate(x, RULES[name].init(x), jax.random.key(0)).value
    found = wire.traffic(one, tree, axes={"data": workers})
    return sum(wire.by_axis(found).values())

  share = 2 * (workers - 1) / workers
  besides = sent(63) - share * 4 * 4096
  assert -1 <= besides <= 4 * (workers**2 + workers)
  assert sent(64) - share * 4 * (4096 + 64) <= besides + 1
  assert sent(64, jnp.bfloat16) <= share * 2 * (4096 + 64) + besides + 1


def test_half_precision_stays_and_a_tree_may_have_no_leaves():
  x = jnp.asarray(STEPS[0])
  tree = {"half": x.astype(jnp.bfloat16), "wide": x}
  for name, rule in RULES.items():

    def one(tree, rule=rule):
      of = lambda tree: rule.aggregate(tree, rule.init(tree), jax.random.key(0)).value
      return of(tree), of({})

    value, nothing = jax.eval_shape(jax.vmap(one, axis_name="data"), tree)
    assert nothing == {}
    for leaf, wanted in tree.items():
      assert (value[leaf].shape, value[leaf].dtype) == (wanted.shape, wanted.dtype), name


WRONG_WHEN_BUILT: dict[str, Callable[[], Aggregator]] = {
  r"fraction=0.5 is not in \[0, 0.5\)": lambda: robust.trimmed_mean(0.5),
  r"fraction=-0.1 is not in": lambda: robust.trimmed_mean(-0.1),
  "faulty=-1 is not at least 0": lambda: robust_vectors.krum(-1),
  "selected=0 is not at least 1": lambda: robust_vectors.multi_krum(1, 0),
  "iterations=0 is not at least 1": lambda: robust_vectors.geometric_median(iterations=0),
  "smoothing=0.0 is not in": lambda: robust_vectors.geometric_median(smoothing=0.0),
  "radius=0.0 is not in": lambda: robust_vectors.centered_clip(0.0),
  "faulty=-1 is not in": lambda: attacks.sign_flip(mean(), faulty=-1),
  "scale=-1.0 is not in": lambda: attacks.inner_product(mean(), faulty=1, scale=-1.0),
  "deviation=-1.0 is not in": lambda: attacks.gaussian(mean(), faulty=1, deviation=-1.0),
}
WRONG_FOR_EIGHT: dict[str, Aggregator] = {
  r"krum\(faulty=6\) needs more than 14 workers and there are 8": robust_vectors.krum(6),
  r"multi_krum\(faulty=3\) needs more than 8 workers": robust_vectors.multi_krum(3, 2),
  r"multi_krum\(selected=9\) selects among 8 workers": robust_vectors.multi_krum(2, 9),
  "faulty=8 leaves no honest worker among 8": attacks.sign_flip(mean(), faulty=8),
  "has no z of its own among 8 workers": attacks.a_little_is_enough(mean(), faulty=5),
}


@pytest.mark.parametrize("words", WRONG_WHEN_BUILT)
def test_what_has_no_sense_is_refused_when_built(words):
  with pytest.raises(ValueError, match=words):
    WRONG_WHEN_BUILT[words]()


@pytest.mark.parametrize("words", WRONG_FOR_EIGHT)
def test_what_has_no_sense_for_so_many_workers_is_refused_when_traced(words):
  rule = WRONG_FOR_EIGHT[words]
  one = lambda x: rule.aggregate(x, (), jax.random.key(0)).value
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(jax.vmap(one, axis_name="data"), jnp.zeros((8, 3)))


def test_the_share_to_trim_is_the_decimal_that_is_written():
  """0.29 of 100 are 29, though 0.29 * 100 < 29 in floating point."""
  x = np.zeros((100, 1), np.float32)
  x[-29:] = np.inf
  one = lambda x: robust.trimmed_mean(0.29).aggregate(x, (), jax.random.key(0)).value
  assert np.all(np.asarray(jax.vmap(one, axis_name="data")(x)) == 0)
