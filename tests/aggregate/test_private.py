"""Private aggregation: secret shares, masks that cancel bit for bit, noise and its accountant."""

import functools
import itertools
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research.aggregate.mean import mean
from research.aggregate.privacy import masks, secure, shamir
from research.aggregate.privacy.accounting import epsilon, spending
from research.aggregate.privacy.private import noisy
from research.aggregate.privacy.secure import secure_sum
from research.comm import mesh
from research.core.base import Aggregate, Aggregator, Trait

W, CLIP, BITS, QUORUM = 8, 1.5, 16, 6
UNIT = CLIP / (2 ** (BITS - 1) - 1)
SHAPES = {"a": (5, 7), "b": (), "c": (3,)}
RANDOM = np.random.default_rng(0)
SUM, CLIPPED = secure_sum(clip=CLIP, bits=BITS), noisy(mean(), clip=2.0, noise=0.0)
DROPPING = secure_sum(clip=CLIP, bits=BITS, dropout=0.3, threshold=QUORUM / W)
TREES = {k: RANDOM.normal(size=(W, *s)).astype(np.float32) for k, s in SHAPES.items()}


@functools.cache
def compiled(aggregator: Aggregator, execution: str):
  """(trees [W, ...], key) -> value [W, ...] or, where the trace knows it equal on all, []; sent."""

  def worker(tree, key):
    out = aggregator.aggregate(tree, aggregator.init(tree), key)
    return out.value, out.sent

  spread = lambda fn, axis: jax.vmap(fn, (0, None), (None, 0), axis_name=axis)
  over_data = spread(worker, "data")
  if execution == "vmap":
    return jax.jit(over_data)
  if execution == "pmap":
    return jax.pmap(worker, axis_name="data", in_axes=(0, None))
  if execution == "slices":
    both = spread(over_data, "slice")
    fold = lambda x: x.reshape(2, W // 2, *x.shape[1:])
    return jax.jit(lambda trees, key: both(jax.tree.map(fold, trees), key))
  one = lambda tree, key: worker(jax.tree.map(lambda x: x[0], tree), key)
  lead = lambda tree, key: jax.tree.map(lambda x: x[None], one(tree, key))
  devices = mesh.device_mesh({"data": W})
  by_row = P("data")
  return jax.jit(
    jax.shard_map(lead, mesh=devices, in_specs=(by_row, P()), out_specs=by_row, check_vma=False)
  )


def run(aggregator: Aggregator, trees, seed: int = 0, execution: str = "vmap") -> Aggregate:
  """One exchange of all workers' trees [W, ...], as numpy; `value` comes out equal on all."""
  result = compiled(aggregator, execution)(trees, jax.random.key(seed))
  value, sent = jax.tree.map(np.asarray, result)
  if execution in ("shard_map", "pmap"):
    assert all((x == x[0]).all() for x in jax.tree.leaves(value))
    value = jax.tree.map(lambda x: x[0], value)
  return Aggregate(value, jax.tree.map(lambda s, x: s.reshape(x.shape), sent, trees), ())


def fixed_point(x: np.ndarray) -> np.ndarray:
  """By hand, as signed whole numbers."""
  return np.rint(np.clip(x, -CLIP, CLIP) * np.float32(1 / UNIT)).astype(int)


class Round(NamedTuple):
  """A round by hand, from the pure pieces."""

  seeds: jax.Array  # [W, W, LIMBS]
  ring: Any  # what each worker has, [W, ...]
  messages: Any  # what each sends
  held: jax.Array  # [W holders, W owners, W peers, LIMBS]

  def plain(self, alive):
    return jax.tree.map(lambda x: np.asarray(x)[alive].sum(0, dtype=np.uint32), self.ring)


@jax.jit
def by_hand(key, trees) -> Round:
  draw, *keys = jax.random.split(key, W + 1)
  drawn = jax.random.randint(draw, (W, W, masks.LIMBS), 0, shamir.PRIME, jnp.uint32)
  pair = np.indices((W, W))
  seeds = drawn[pair.min(0), pair.max(0)]
  ring = jax.tree.map(lambda x: secure.quantize(x, CLIP, BITS), trees)
  hidden_by = jax.vmap(masks.mask)(seeds, jnp.arange(W), ring)
  shares = jax.vmap(lambda s, k: shamir.share(s, QUORUM, W, k), out_axes=1)(seeds, jnp.stack(keys))
  return Round(seeds, ring, jax.tree.map(jnp.add, ring, hidden_by), shares)


share = jax.jit(shamir.share, static_argnums=(1, 2))
reveal = jax.jit(secure.reveal, static_argnums=2)


def workers(*gone: int) -> jax.Array:
  """All but those."""
  return jnp.asarray(~np.isin(np.arange(W), gone))


def same(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def looks_uniform(words: np.ndarray) -> bool:
  """Chi-square of the bytes, 255 degrees of freedom: within 5 deviations."""
  seen = np.bincount(np.ascontiguousarray(words).view(np.uint8).ravel(), minlength=256)
  expected = seen.sum() / 256
  return abs(((seen - expected) ** 2).sum() / expected - 255) < 5 * np.sqrt(510)


@pytest.mark.parametrize("quorum", [1, 3, 5])
def test_shares_of_a_quorum_give_the_secret_and_fewer_do_not(quorum):
  random = np.random.default_rng(quorum)
  secret = random.integers(0, shamir.PRIME, (4, 3)).astype(np.uint32)
  secret[0] = [0, 1, shamir.PRIME - 1]
  shares = share(secret, quorum, 5, jax.random.key(quorum))
  assert shares.dtype == jnp.uint32
  assert int(shares.max()) < shamir.PRIME
  reconstruct = jax.jit(shamir.reconstruct)
  for present in itertools.product([False, True], repeat=5):
    found = reconstruct(shares, np.array(present))
    assert np.array_equal(found, secret) == (sum(present) >= quorum)
  # the weights, with Python's whole numbers
  found = jax.jit(shamir.weights)(np.array([True, False, True, True, False]))
  for j in (1, 3, 4):
    factors = [m * pow(m - j, -1, shamir.PRIME) for m in (1, 3, 4) if m != j]
    assert found[j - 1] == math.prod(factors) % shamir.PRIME


@pytest.mark.parametrize("aggregator", [SUM, DROPPING])
def test_the_sum_is_the_plain_sum_bit_for_bit(aggregator):
  """Over those who sent; below the threshold nobody receives anything."""
  sent_by = set()
  for seed in range(8):
    value, sent, _ = run(aggregator, TREES, seed)
    alive = np.any(sent["a"], (1, 2))  # no worker's leaf is zero on the grid
    sent_by.add(int(alive.sum()))
    for name, x in TREES.items():
      codes = fixed_point(x) * alive.reshape(-1, *[1] * (x.ndim - 1))
      total = np.float64(value[name]) * max(alive.sum(), 1) / UNIT
      assert np.abs(total - np.rint(total)).max() < 0.05
      np.testing.assert_array_equal(np.rint(total), codes.sum(0))
      np.testing.assert_array_equal(np.rint(np.float64(sent[name]) / UNIT), codes)
  assert sent_by == ({0, QUORUM, 7, W} if aggregator is DROPPING else {W})


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["shard_map", "pmap", "slices"])
def test_every_execution_gives_the_same_bits(execution):
  found = run(DROPPING, TREES, 1)
  assert 0 < np.any(found.sent["a"], (1, 2)).sum() < W
  assert same(found, run(DROPPING, TREES, 1, execution))


def test_a_host_refuses_a_round_below_the_threshold():
  of_round, alive = by_hand(jax.random.key(0), TREES), jnp.asarray(np.arange(W) < QUORUM - 1)
  assert not np.any(reveal(of_round.held, alive, QUORUM))
  with pytest.raises(ValueError, match="5 of 8 workers sent; the sum needs 6"):
    secure.recover(of_round.messages, of_round.held, alive, QUORUM)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [(), (0,), (7, 3)])
def test_a_host_recovers_the_sum_from_messages_and_shares(gone):
  of_round, alive = by_hand(jax.random.key(1), TREES), workers(*gone)
  # what the absent would have sent is not looked at
  without = lambda x: x * alive.astype(jnp.uint32).reshape(-1, *[1] * (x.ndim - 1))
  messages, held = jax.tree.map(without, (of_round.messages, of_round.held))
  assert same(secure.recover(messages, held, alive, QUORUM), of_round.plain(alive))


def test_the_masks_come_from_the_shares():
  """With one share too few, or one wrong, what is reconstructed does not unmask the sum."""
  of_round, alive = by_hand(jax.random.key(2), TREES), workers(4)
  total = jax.tree.map(
    lambda y: np.asarray(y)[np.asarray(alive)].sum(0, dtype=np.uint32), of_round.messages
  )
  shown = np.asarray(reveal(of_round.held, alive, QUORUM))
  wrong = shown.copy()
  wrong[0] += 1

  @jax.jit
  def unmasked(shown, present):
    return masks.unmask(total, shamir.reconstruct(shown, present), alive)

  plain = of_round.plain(alive)
  assert same(unmasked(shown, workers(2, 4)), plain)
  assert not same(unmasked(shown, workers(2, 4, 7)), plain)
  assert not same(unmasked(wrong, alive), plain)
  # never both kinds of seed of one owner
  kinds = np.any(shown != 0, (0, 3))
  self_mask = np.eye(W, dtype=bool)
  assert (kinds[self_mask] == alive).all()
  assert (kinds[~self_mask].reshape(W, W - 1) == ~alive[:, None]).all()


def test_a_message_says_nothing_of_its_value():
  ones = np.ones((W, 5000), np.float32)
  of_round = by_hand(jax.random.key(3), {"x": ones, "y": ones})
  ring, messages = np.asarray(of_round.ring["x"]), np.asarray(of_round.messages["x"])
  assert not looks_uniform(ring[0])
  assert all(looks_uniform(y) for y in messages)
  # the values are equal: the difference of two messages, or two leaves, is one of masks
  assert all(looks_uniform(messages[i] - messages[i - 1]) for i in range(W))
  assert all(looks_uniform(y) for y in messages - np.asarray(of_round.messages["y"]))
  expand = jax.jit(jax.vmap(lambda seed: masks.expand(seed, {"x": ring[0]})["x"]))
  for i in (0, 4):
    signs = np.where(np.arange(W) < i, -1, 1).astype(np.uint32)[:, None]
    hidden_by = signs * np.asarray(expand(of_round.seeds[i]))
    for unknown in range(W):
      left = messages[i] - np.delete(hidden_by, unknown, 0).sum(0, dtype=np.uint32)
      assert looks_uniform(left)
      assert np.array_equal(left - hidden_by[unknown], ring[i])


@pytest.mark.slow
def test_fixed_point_at_the_ends_of_its_range():
  x = jnp.array([0.0, 1e-9, -1e9, 1e9, CLIP, -CLIP, CLIP / 3], jnp.float32)
  for bits in (2, 16, 31):
    ring = secure.quantize(x, CLIP, bits)
    levels = 2 ** (bits - 1) - 1
    signed = np.asarray(ring).view(np.int32)
    assert (np.abs(signed) <= levels).all()
    assert (signed[:6] == [0, 0 if bits < 31 else 1, -levels, levels, levels, -levels]).all()
    found = secure.dequantize(ring, CLIP, bits)
    unit = CLIP / levels
    assert np.abs(found - np.clip(x, -CLIP, CLIP)).max() <= max(unit / 2, 1e-6)
  pair = {"x": jnp.full((2, 3), CLIP)}
  assert np.allclose(run(secure_sum(clip=CLIP, bits=31), pair).value["x"], CLIP)
  alone = run(secure_sum(clip=CLIP), {"x": jnp.full((1, 3), 0.5)})
  assert np.abs(alone.value["x"] - 0.5).max() <= UNIT


@pytest.mark.parametrize("aggregator", [SUM, CLIPPED])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(aggregator, bad):
  broken = TREES["a"].copy()
  broken[3, 2, 1] = bad
  value, sent, _ = run(aggregator, {**TREES, "a": broken})
  assert all(np.isnan(x).all() for x in value.values())
  for x in sent.values():
    assert (np.isnan(x.reshape(W, -1)).all(1) == (np.arange(W) == 3)).all()


def test_leaves_keep_their_types():
  tree = {"x": jnp.full((W, 3), 0.5, jnp.bfloat16), "empty": jnp.zeros((W, 0))}
  for aggregator in (secure_sum(clip=1.0), noisy(mean(), clip=9.0, noise=0.0)):
    value, sent, _ = run(aggregator, tree)
    assert jax.tree.map(lambda a: a.dtype, value) == jax.tree.map(lambda a: a.dtype, tree)
    assert same(jax.tree.map(lambda a: np.broadcast_to(a, (W, *a.shape)), value), sent)


@pytest.mark.parametrize("aggregator", [secure_sum(clip=1.0), noisy(mean(), clip=1.0, noise=1.0)])
def test_a_tree_without_leaves_is_no_mistake(aggregator):
  aggregate = lambda key: aggregator.aggregate((), (), key).value
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), W))
  assert jax.eval_shape(jax.vmap(aggregate, axis_name="data"), keys) == ()


REFUSED = {
  "clip=0 is not in .1e-20": lambda: secure_sum(clip=0),
  "bits=32 is not in": lambda: secure_sum(clip=1.0, bits=32),
  "bits=1 is not in": lambda: secure_sum(clip=1.0, bits=1),
  "threshold=0 is not in": lambda: secure_sum(clip=1.0, threshold=0),
  "dropout=1 is not in": lambda: secure_sum(clip=1.0, dropout=1),
  "bits=30: the sum of 8": lambda: run(secure_sum(clip=1.0, bits=30), TREES),
  "clip=-1 is not in": lambda: noisy(mean(), clip=-1, noise=1.0),
  "noise=-1 is not in": lambda: noisy(mean(), clip=1.0, noise=-1),
  "noise=1e.308 times clip=1.0 is not in": lambda: noisy(mean(), clip=1.0, noise=1e308),
  "noise=1e-20 times clip=1e-20 is not in": lambda: noisy(mean(), clip=1e-20, noise=1e-20),
  "noisy cannot be combined": lambda: noisy(
    noisy(mean(), clip=1.0, noise=1.0), clip=1.0, noise=1.0
  ),
  "quorum=4 is not in": lambda: shamir.share(jnp.zeros(1, jnp.uint32), 4, 3, jax.random.key(0)),
  "conversion='zcdp' is not in rdp": lambda: epsilon(1.0, 1.0, 1, 1e-5, "zcdp"),
  "rate=0 is not in": lambda: epsilon(1.0, 0, 1, 1e-5),
  "noise=0 is not in": lambda: epsilon(0, 1.0, 1, 1e-5),
  "steps=0": lambda: epsilon(1.0, 1.0, 0, 1e-5),
  "delta=1 is not in": lambda: epsilon(1.0, 1.0, 1, 1),
  "clients=0 is not at least 1": lambda: spending(1.0, 1e-5, clients=0),
  "clients=5 is not at least 1, or, with rate=0.5, 1": lambda: spending(
    1.0, 1e-5, rate=0.5, clients=5
  ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_refused(message):
  with pytest.raises(ValueError, match=message):
    REFUSED[message]()


def test_quorum_is_not_rounded_up_by_floats():
  assert [secure.quorum_of(2 / 3, w) for w in (1, 2, 3, 6, 8, 9, 30)] == [1, 2, 2, 4, 6, 6, 20]
  assert secure.quorum_of(0.1, 30) == 3


def test_no_worker_moves_the_sum_by_more_than_the_clip():
  run_all = lambda trees: run(CLIPPED, trees).value
  gone = {k: x * (np.arange(W) != 5).reshape(-1, *[1] * (x.ndim - 1)) for k, x in TREES.items()}
  base = run_all(gone)
  moves = []
  for scale in (0.0, 1e-3, 1.0, 1e8):
    one = {k: np.where(gone[k] == x, x, scale * x) for k, x in TREES.items()}
    moved = jax.tree.map(lambda a, b: W * (a - b), run_all(one), base)
    moves.append(float(np.sqrt(sum(np.sum(np.square(m)) for m in jax.tree.leaves(moved)))))
  norm = np.sqrt(sum(np.sum(np.square(x[5])) for x in TREES.values()))
  np.testing.assert_allclose(moves, [0, 1e-3 * norm, 2, 2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("execution", ["vmap", "shard_map"])
def test_the_workers_noise_adds_up(execution):
  """The sum's deviation is noise * clip, though the workers sent nothing but noise."""
  n, clip, noise = 20_000, 3.0, 0.7
  tree = {"a": np.zeros((W, n), np.float32), "b": np.zeros((W, n), np.float32)}
  value, sent, _ = run(noisy(mean(), clip=clip, noise=noise), tree, execution=execution)
  for name in tree:
    deviation = np.std(W * value[name])
    assert abs(deviation / (noise * clip) - 1) < 4 / np.sqrt(2 * n)
    own = np.std(sent[name], axis=1)
    assert np.abs(own * np.sqrt(W) / (noise * clip) - 1).max() < 5 / np.sqrt(2 * n)
  drawn = np.concatenate([sent["a"], sent["b"]])
  between = np.corrcoef(drawn) - np.eye(2 * W)
  assert np.abs(between).max() < 5 / np.sqrt(n)
  again = run(noisy(mean(), clip=clip, noise=noise), tree, seed=1).value["a"]
  assert abs(np.corrcoef(again, value["a"])[0, 1]) < 5 / np.sqrt(n)


def test_noise_under_a_secure_sum():
  """The same noise as over a plain mean, to the accuracy of the fixed point."""
  two = {name: TREES[name] for name in ("a", "c")}
  plain = run(noisy(mean(), clip=1.0, noise=0.5), two)
  hidden = run(noisy(secure_sum(clip=4.0, bits=24), clip=1.0, noise=0.5), two)
  for got, want in zip(jax.tree.leaves(hidden), jax.tree.leaves(plain), strict=True):
    assert np.abs(got - want).max() <= 4 / 2**23
  traits = noisy(secure_sum(clip=4.0), clip=1.0, noise=0.5).traits
  assert traits == Trait.NOISE | Trait.WHOLE | Trait.DENSE | Trait.SECRET


def test_the_accountant_knows_the_known_numbers():
  """MNIST, 15 epochs of lots of 256, noise 1.3, delta 1e-5."""
  rate, steps = 256 / 60000, round(15 * 60000 / 256)
  assert steps == 3516
  spent = {c: epsilon(1.3, rate, steps, 1e-5, c) for c in ("rdp_old", "rdp", "pld")}
  want = {"rdp_old": 1.19, "rdp": 0.954, "pld": 0.865}
  assert spent == pytest.approx(want, rel=0.005)
  # without sampling, by hand: rdp(a) = T a / (2 noise^2), whose best order is known
  r, t = 10 / (2 * 4.0**2), np.log(1e5)
  assert epsilon(4.0, 1.0, 10, 1e-5, "rdp_old") == pytest.approx(r + 2 * np.sqrt(r * t), rel=1e-3)
  for conversion in want:
    over_time = [epsilon(1.3, rate, steps, 1e-5, conversion) for steps in (1, 1000)]
    assert over_time == sorted(over_time)
    assert over_time[-1] < spent[conversion]


def test_spending_is_what_the_library_says_after_every_round():
  library = pytest.importorskip("dp_accounting")
  for rate in (256 / 60000, 1.0):
    spent = spending(1.3, 1e-5, rate=rate)
    event = library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(1.3))
    for rounds in (1, 100, 3516):
      accountant = library.rdp.RdpAccountant()
      accountant.compose(library.SelfComposedDpEvent(event, rounds))
      assert spent(rounds) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
      assert spent(rounds) == epsilon(1.3, rate, rounds, 1e-5)
    assert spent(0) == 0


def test_small_rates_are_not_lost_to_rounding():
  """Between zero, which differences near 1 come out as, and ten times the rate."""
  rounds = 2**31 - 1
  for rate, larger in ((1e-10, 1e-9), (1e-9, 1e-8), (1e-7, 1e-6)):
    found = spending(1.3, 1e-5, rate=rate)(rounds)
    assert 0 < found <= spending(1.3, 1e-5, rate=larger)(rounds)
  # somebody is seen with probability 1 - (1 - q)^T: alone that is no (0, delta) guarantee
  assert spending(1.3, 1e-5, rate=1e-10)(rounds) > 0
  assert spending(1.3, 1e-5, rate=1e-10)(1) == 0


def test_noises_at_the_ends_of_what_floats_hold():
  for clients in (1, 3):
    little, much = (spending(noise, 1e-5, clients=clients) for noise in (1e-300, 1e308))
    assert (little(0), little(1), much(2**31)) == (0, np.inf, 0)
    tiny = spending(1e-9, 1e-5, clients=clients)(1)  # rdp(a) = a / (2 noise^2), the least order
    assert tiny == pytest.approx(1.1 / 2 * 1e18)


def strata_by_hand(noise, own, others, rounds, delta, orders):
  """The epsilon of one stratum whose clients have these values, in shares of the clip, and zero."""
  x = np.arange(-15.0, 35.0, 0.02)
  around = lambda value: np.exp(-((x - value / noise) ** 2) / 2) / np.sqrt(2 * np.pi)
  rest = sum(around(value) for value in others)
  present, gone = ((rest + around(value)) / (len(others) + 1) for value in (own, 0))
  found = []
  for p, q in ((present, gone), (gone, present)):
    powers = np.exp(np.outer(orders, np.log(p)) + np.outer(1 - orders, np.log(q)))
    rdp = np.log(0.02 * powers.sum(1)) / (orders - 1)
    found.append(min(rounds * rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)))
  return max(found)


@pytest.mark.parametrize(
  ("noise", "clients", "rounds"), [(1.0, 3, 1), (2.0, 4, 20), (4.0, 10, 200)]
)
def test_strata_are_counted_by_their_worst_clients(noise, clients, rounds):
  """No clients spend more than is said, and those at opposite ends nearly as much."""
  said, orders = spending(noise, 1e-5, clients=clients)(rounds), np.arange(1.5, 20, 0.5)
  spent = lambda own, others: strata_by_hand(noise, own, others, rounds, 1e-5, orders)
  random = np.random.default_rng(0)
  drawn = [spent(1.0, random.uniform(-1, 1, clients - 1)) for _ in range(10)]
  ends = [spent(1.0, [end] * (clients - 1)) for end in (-1, 1)]
  assert max(drawn) < max(ends) <= said * (1 + 1e-3)
  assert max(ends) > 0.9 * said
  # more than with Poisson sampling, less than with none, and than any replacement would
  import dp_accounting

  sample = dp_accounting.SampledWithoutReplacementDpEvent
  event = sample(clients, 1, dp_accounting.GaussianDpEvent(noise / 2))
  replaced = dp_accounting.rdp.RdpAccountant(
    neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
  ).compose(dp_accounting.SelfComposedDpEvent(event, rounds))
  assert epsilon(noise, 1 / clients, rounds, 1e-5) < said
  assert said < min(epsilon(noise, 1.0, rounds, 1e-5), replaced.get_epsilon(1e-5))


def test_little_noise_or_many_clients_are_no_mistake():
  assert spending(0.004, 1e-5, clients=3)(1) == pytest.approx(epsilon(0.004, 1.0, 1, 1e-5))
  assert 0 < spending(20.0, 1e-5, clients=10**6)(10**6) < 0.1


def test_the_accountant_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "dp_accounting", None)
  with pytest.raises(ImportError, match=r'pip install -e "\.\[private\]"'):
    epsilon(1.0, 1.0, 1, 1e-5)
