"""Aggregators against plain numpy transcriptions of their papers, three steps each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import regression

from research.analysis import wire
from research.core import registry
from research.core.base import EVERYONE, Aggregate, Presence
from research.parallel import inference, traffic
from research.parallel.job import Job, resolved
from research.parallel.layout import over_workers

W, SHAPE = 4, (6, 5)
RANDOM = np.random.default_rng(0)
STEPS = RANDOM.normal(size=(3, W, *SHAPE)).astype(np.float32)  # what each worker has, by step


def run(spec: str, steps: Any = STEPS) -> list[Aggregate]:
  """The aggregator's results at each step, all workers' [W, ...]; `hierarchical` on two slices.

  Args:
    spec: of the aggregator.
    steps: what each worker has, leaves [steps, W, ...].
  """
  aggregator = registry.build("aggregator", spec)
  axes = {"slice": 2, "data": W // 2} if "hierarchical" in spec else {"data": W}

  def worker(values):
    def one(state, step):
      out = aggregator.aggregate(step[1], state, jax.random.key(step[0]))
      return out.state, out

    start = aggregator.init(jax.tree.map(lambda x: x[0], values))
    return jax.lax.scan(one, start, (jnp.arange(len(STEPS)), values))[1]

  fold = lambda x: np.moveaxis(x, 1, 0).reshape(*axes.values(), len(x), *x.shape[2:])
  found = jax.jit(over_workers(worker, axes, 0, 0))(jax.tree.map(fold, steps))
  rows = jax.tree.map(lambda x: np.asarray(x).reshape(W, *x.shape[len(axes) :]), found)
  return [jax.tree.map(lambda x, step=step: x[:, step], rows) for step in range(len(STEPS))]


def top_k(x: np.ndarray, k: int) -> np.ndarray:
  kept = np.argsort(-np.abs(x).ravel(), kind="stable")[:k]
  out = np.zeros(x.size, x.dtype)
  out[kept] = x.ravel()[kept]
  return out.reshape(x.shape)


def scaled_sign(x: np.ndarray) -> np.ndarray:
  return np.abs(x).mean() * np.where(x >= 0, 1, -1)


def error_feedback_by_hand(compress: Callable[[np.ndarray], np.ndarray]):
  memory = np.zeros((W, *SHAPE))
  for x in STEPS.astype(np.float64):
    corrected = x + memory
    sent = np.stack([compress(c) for c in corrected])
    memory = corrected - sent
    yield sent.mean(0)


def loco_by_hand(compress, beta, reset):
  memory = np.zeros((W, *SHAPE))
  for t, x in enumerate(STEPS.astype(np.float64), 1):
    corrected = x + memory
    sent = np.stack([compress(c) for c in corrected])
    memory = (1 - beta) * memory + beta * (corrected - sent)
    unit = np.abs(memory).max(-1, keepdims=True) / 127
    memory = unit * np.rint(memory / unit) if t % reset else np.zeros_like(memory)
    yield sent.mean(0)


def ef21_by_hand(compress):
  local = np.zeros((W, *SHAPE))
  for x in STEPS.astype(np.float64):
    local = local + np.stack([compress(c) for c in x - local])
    yield local.mean(0)


def diana_by_hand(compress, alpha):
  shift = np.zeros((W, *SHAPE))
  for x in STEPS.astype(np.float64):
    delta = np.stack([compress(c) for c in x - shift])
    yield (shift + delta).mean(0)
    shift = shift + alpha * delta


def two_phase_sign_by_hand():
  """1-bit compression with error memories of workers and of each chunk's server."""
  memory, server = np.zeros((W, 30)), np.zeros((W, 8))
  for x in STEPS.astype(np.float64):
    corrected = x.reshape(W, 30) + memory
    chunks = np.pad(corrected, ((0, 0), (0, 2))).reshape(W, W, 8)
    sent = np.stack([[scaled_sign(c) for c in row] for row in chunks])
    memory = corrected - sent.reshape(W, 32)[:, :30]
    owed = sent.mean(0) + server
    answer = np.stack([scaled_sign(c) for c in owed])
    server = owed - answer
    yield answer.reshape(-1)[:30].reshape(SHAPE)


def power_sgd_by_hand(q: np.ndarray):
  memory = np.zeros((W, *SHAPE))
  for x in STEPS.astype(np.float64):
    corrected = x + memory
    p = np.mean([m @ q for m in corrected], 0)
    p, _ = np.linalg.qr(p)
    own = [m.T @ p for m in corrected]
    memory = np.stack([m - p @ o.T for m, o in zip(corrected, own, strict=True)])
    q = np.mean(own, 0)
    yield p @ q.T


def momentum_correction_by_hand(compress, clip_norm=np.inf):
  """Deep gradient compression with m = 0.9, local clipping and momentum factor masking."""
  velocity, memory = np.zeros((W, *SHAPE)), np.zeros((W, *SHAPE))
  for x in STEPS.astype(np.float64):
    norms = np.sqrt((x**2).sum((1, 2), keepdims=True))
    velocity = 0.9 * velocity + x * np.minimum(1, clip_norm / np.sqrt(W) / norms)
    memory = memory + velocity
    sent = np.stack([compress(v) for v in memory])
    memory = memory - sent
    velocity = np.where(sent == 0, velocity, 0)
    yield sent.mean(0)


def worker_momentum_by_hand(rule):
  m = np.zeros((W, *SHAPE))
  for x in STEPS.astype(np.float64):
    m = 0.9 * m + 0.1 * x
    yield rule(m, 0)


def ef21_sgdm_by_hand(compress):
  """EF21-SGDM with eta = 0.1, from v = g = 0."""
  v, g = np.zeros((W, *SHAPE)), np.zeros((W, *SHAPE))
  for x in STEPS.astype(np.float64):
    v = 0.9 * v + 0.1 * x
    g = g + np.stack([compress(c) for c in v - g])
    yield g.mean(0)


def warm_up_by_hand(*stages):
  """Error feedback around another compressor in each step."""
  memory = np.zeros((W, *SHAPE))
  for x, compress in zip(STEPS.astype(np.float64), stages, strict=True):
    corrected = x + memory
    sent = np.stack([compress(c) for c in corrected])
    memory = corrected - sent
    yield sent.mean(0)


def hierarchical_by_hand():
  """Two slices of two workers: signs of the slices' means, chunk by chunk, each with a server.

  A leaf's four chunks belong to the workers in turn: in each slice, its first worker looks after
  chunks 0 and 2 of the slice's mean, and owes twice what the slice did not send of them.
  """
  memory, server = np.zeros((2, 2, 4, 8)), np.zeros((4, 8))
  mine = np.array([[True, False, True, False], [False, True, False, True]])[None, :, :, None]
  inside = (np.arange(32) < 30).reshape(4, 8)
  for x in STEPS.astype(np.float64):
    whole = np.pad(x.reshape(W, 30), ((0, 0), (0, 2))).reshape(2, 2, 4, 8)
    means = (whole + memory).mean(1)
    sent = np.stack([[scaled_sign(c) for c in chunks] for chunks in means])
    memory = np.where(mine & inside, 2 * (means - sent)[:, None], 0)
    owed = sent.mean(0) + server
    answer = np.stack([scaled_sign(c) for c in owed])
    server = owed - answer
    yield answer.reshape(-1)[:30].reshape(SHAPE)


def first_factor() -> np.ndarray:
  aggregator = registry.build("aggregator", "power_sgd(2)")
  return np.asarray(aggregator.init(jnp.zeros(SHAPE)), np.float64)


BY_HAND = {
  "error_feedback(gather_mean(top_k(0.2)))": lambda: error_feedback_by_hand(lambda x: top_k(x, 6)),
  "error_feedback(gather_mean(sign()))": lambda: error_feedback_by_hand(scaled_sign),
  "loco(gather_mean(top_k(0.2)), beta=0.6)": lambda: loco_by_hand(lambda x: top_k(x, 6), 0.6, 512),
  "loco(gather_mean(sign()), reset=2)": lambda: loco_by_hand(scaled_sign, 0.2, 2),
  "ef21(gather_mean(top_k(0.2)))": lambda: ef21_by_hand(lambda x: top_k(x, 6)),
  "diana(gather_mean(top_k(0.2)), alpha=0.5)": lambda: diana_by_hand(lambda x: top_k(x, 6), 0.5),
  "error_feedback(two_phase(sign()))": two_phase_sign_by_hand,
  "error_feedback(power_sgd(2))": lambda: power_sgd_by_hand(first_factor()),
  "momentum_correction(gather_mean(top_k(0.2)))": lambda: momentum_correction_by_hand(
    lambda x: top_k(x, 6)
  ),
  "momentum_correction(gather_mean(top_k(0.2)), clip_norm=3.0)": lambda: (
    momentum_correction_by_hand(lambda x: top_k(x, 6), 3.0)
  ),
  "worker_momentum(mean())": lambda: worker_momentum_by_hand(np.mean),
  "worker_momentum(ef21(gather_mean(top_k(0.2))))": lambda: ef21_sgdm_by_hand(
    lambda x: top_k(x, 6)
  ),
  "worker_momentum(median())": lambda: worker_momentum_by_hand(np.median),
  "error_feedback(warm_up(gather_mean(top_k(0.2)), steps=2, stages=[gather_mean(top_k(0.5)), "
  "gather_mean(sign())]))": lambda: warm_up_by_hand(
    lambda x: top_k(x, 15), scaled_sign, lambda x: top_k(x, 6)
  ),
  "error_feedback(hierarchical(two_phase(sign(), axis='slice')))": hierarchical_by_hand,
  "majority_vote()": lambda: (np.where(np.sign(x).sum(0) >= 0, 1, -1) for x in STEPS),
}


@pytest.mark.parametrize("spec", BY_HAND)
def test_three_steps_equal_numpy(spec):
  for got, want in zip(run(spec), BY_HAND[spec](), strict=True):
    for worker in range(W):
      np.testing.assert_allclose(got.value[worker], want, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_locos_memory_has_a_byte_per_element_and_makes_up_for_the_errors():
  """The mean of what is sent for a constant approaches it, as with error feedback."""
  x = jnp.asarray(STEPS[0, :1])
  aggregator = registry.build("aggregator", "loco(gather_mean(top_k(0.2)), reset=1000)")

  def worker(x):
    def one(state, _):
      value, _, state = aggregator.aggregate(x, state, jax.random.key(0))
      return state, value

    return jax.lax.scan(one, aggregator.init(x), length=400)

  state, values = jax.jit(jax.vmap(worker, axis_name="data"))(x)
  assert np.abs(values[0].mean(0) - x[0]).max() <= 0.05 * np.abs(x).max()
  assert sum(e.nbytes for e in state.memory) == 30 + 4 * 6


def test_leaves_in_a_bucket_share_a_scale():
  """Two leaves of 20 and 10 elements as one message: what one leaf of 30 would be."""
  leaves = {"first": STEPS[:, :, :4], "second": STEPS[:, :, 4:]}
  found = run("error_feedback(bucketed(gather_mean(sign())))", leaves)
  for got, want in zip(found, error_feedback_by_hand(scaled_sign), strict=True):
    whole = np.concatenate([got.value["first"][0], got.value["second"][0]])
    np.testing.assert_allclose(whole, want, atol=1e-5)


def test_only_large_leaves_are_compressed():
  """The leaf of 30 elements as if alone; the one of 5 by its mean, of which nothing is held."""
  small = STEPS[:, :, 0]
  out = run("error_feedback(only_large(gather_mean(sign()), min_size=6))", {"a": STEPS, "b": small})
  for got, want, exact in zip(out, error_feedback_by_hand(scaled_sign), small, strict=True):
    np.testing.assert_allclose(got.value["a"][0], want, atol=1e-5)
    np.testing.assert_allclose(got.value["b"][0], exact.mean(0), atol=1e-6)
    assert not got.state.memory["b"].any()


EXACT = (
  "gather_mean(identity())",
  "sum_mean(identity())",
  "two_phase(identity())",
  "error_feedback(two_phase(identity()))",
  "only_large(gather_mean(top_k(0.1)), min_size=31)",
  "power_sgd(5)",
)


@pytest.mark.parametrize("spec", EXACT)
def test_without_loss_it_is_the_mean(spec):
  for got, x in zip(run(spec), STEPS, strict=True):
    np.testing.assert_allclose(got.value, np.broadcast_to(x.mean(0), x.shape), atol=1e-6)
    np.testing.assert_allclose(got.sent, x, atol=1e-6)


@pytest.mark.parametrize(
  "compressor", ["top_k(0.1)", "sign()", "int8()", "int4()", "qsgd(23)", "natural()"]
)
def test_error_feedback_telescopes(compressor):
  """What was received in all, plus what the workers still hold, is what they had in all."""
  out = run(f"error_feedback(gather_mean({compressor}))")
  received = np.sum([step.value[0] for step in out], 0)
  held = np.mean(out[-1].state.memory, 0)
  np.testing.assert_allclose(received + held, STEPS.sum(0).mean(0), atol=1e-5)


@pytest.mark.parametrize("workers", [2, 4, 8, 16, 64])
def test_two_phase_int8_costs_the_same_at_any_number_of_workers(workers):
  """At most 2.15 bytes per element, and at most 0.27 of a float32 ring all-reduce."""
  x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
  aggregator = registry.build("aggregator", "two_phase(int8())")

  def program(x):
    return aggregator.aggregate(x, aggregator.init(x), jax.random.key(0)).value

  axes = {"data": workers}
  sent = sum(wire.by_axis(wire.traffic(program, x, axes=axes)).values())
  dense = sum(wire.by_axis(wire.traffic(lambda x: jax.lax.pmean(x, "data"), x, axes=axes)).values())
  assert sent <= 2.15 * x.size
  assert sent <= 0.27 * dense


def test_power_sgd_sends_two_messages_of_thin_factors():
  """However many leaves there are; those that are no matrices go with the first."""
  aggregator = registry.build("aggregator", "power_sgd(4)")
  shapes = {"w": (200, 100), "b": (100,), "v": (2, 20, 50)}
  params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

  def program(x):
    return aggregator.aggregate(x, aggregator.init(x), jax.random.key(0)).value

  found = wire.traffic(program, params, axes={"data": 8})
  first, second = 4 * (200 + 40) + 100, 4 * (100 + 50)
  assert [t.payload for t in found] == [4 * first, 4 * second]


def test_a_rank_r_matrix_is_sent_exactly_once_it_is_known():
  """The second step's power iteration has found a constant rank-2 mean."""
  left, right = RANDOM.normal(size=(20, 2)), RANDOM.normal(size=(2, 15))
  m = np.broadcast_to(left @ right, (3, W, 20, 15)).astype(np.float32)
  np.testing.assert_allclose(run("power_sgd(2)", m)[1].value, m[1], atol=1e-4)


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("sum_mean(top_k(0.1))", "only a linear compressor"),
    ("power_sgd(0)", "rank=0"),
    ("error_feedback(mean(), decay=1.5)", "decay=1.5"),
    ("diana(mean(), alpha=0.0)", "alpha=0.0"),
    ("worker_momentum(mean(), momentum=1.0)", "momentum=1.0"),
  ],
)
def test_what_has_no_sense_is_refused_when_built(spec, words):
  with pytest.raises(ValueError, match=words):
    registry.build("aggregator", spec)


def test_chunks_of_a_slice_are_rounded_apart():
  """The workers of a slice look after equal chunks here; each draws with a key of its own."""
  aggregator = registry.build("aggregator", "hierarchical(gather_mean(qsgd(1), axis='slice'))")
  x = np.broadcast_to(np.tile(STEPS[0, 0].ravel(), 2), (2, 2, 60)).astype(np.float32)
  run = lambda x: aggregator.aggregate(x, (), jax.random.key(0)).value
  per_slice = jax.vmap(run, axis_name="data")
  value = np.asarray(jax.jit(jax.vmap(per_slice, axis_name="slice"))(x))
  np.testing.assert_array_equal(value, np.broadcast_to(value[0, 0], value.shape))
  halves = value[0, 0].reshape(2, 2, 15)  # [slice part, worker, ...]
  assert (halves[:, 0] != halves[:, 1]).any()


def test_a_warm_up_sends_by_rounds_where_a_mesh_cuts_a_worker():
  spec = "data_parallel(sgd(0.1), warm_up(gather_mean(top_k(0.05)), steps=3))"
  mesh, sizes = {"data": 4, "fsdp": 2}, np.full(4, 60)
  job = resolved(Job(registry.build("method", spec), regression(), mesh, sizes, 8))
  sent = traffic.of_method(job, inference.layout_of(job), 6).sent
  assert (sent[:3] == sent[0]).all()
  assert (sent[3:] == sent[3]).all()
  assert sent[3] < sent[0] == sum(t.total for t in traffic.of_dense(job))


def test_clipping_of_no_leaves():
  spec = "only_large(momentum_correction(gather_mean(top_k(0.1)), clip_norm=1.0), min_size=1000)"
  np.testing.assert_allclose(run(spec)[0].value[0], STEPS[0].mean(0), atol=1e-6)


# ---- means over the senders


def test_an_element_is_divided_by_the_workers_that_sent_it():
  """Also if some are absent, and if those present weigh differently."""
  aggregator = registry.build("aggregator", "gather_mean(top_k(0.3), over='senders')")
  x = np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32)
  weight = np.asarray([2, 0.5, 1, 1.5, 0], np.float32)
  top = np.argsort(-np.abs(x), axis=1)[:, :3]
  sent = np.zeros_like(x)
  np.put_along_axis(sent, top, np.take_along_axis(x, top, 1), 1)
  run = lambda presence: (
    lambda x, w: aggregator.aggregate({"w": x}, (), jax.random.key(0), presence(w)).value["w"]
  )
  for presence, share in (
    (lambda w: EVERYONE, np.ones(5, np.float32)),
    (lambda w: Presence(w, w > 0), weight),
  ):
    got = jax.jit(jax.vmap(run(presence), axis_name="data"))(x, weight)
    total, shares = (share[:, None] * sent).sum(0), (share[:, None] * (sent != 0)).sum(0)
    want = np.where(shares > 0, total / np.where(shares > 0, shares, 1), 0)
    np.testing.assert_allclose(got, np.tile(want, (5, 1)), atol=1e-6)


def test_a_mean_over_senders_needs_a_sparse_compressor():
  with pytest.raises(ValueError, match="over='senders' needs a sparse compressor"):
    registry.build("aggregator", "gather_mean(int8(), over='senders')")
  with pytest.raises(ValueError, match="over='sender' is unknown; did you mean 'senders'"):
    registry.build("aggregator", "gather_mean(top_k(0.1), over='sender')")
