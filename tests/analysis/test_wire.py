"""Traffic is what the traced program sends: hand-made cases with known bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import METHODS
from jax import lax
from problems import Running

from research.analysis import wire
from research.comm import collectives, sending
from research.core import registry
from research.parallel import traffic

X = jax.ShapeDtypeStruct((1000,), jnp.float32)
EIGHT = {"data": 8}

# a program over 8 workers on 4000 bytes -> operation, dtype, payload, bytes sent on a ring
CASES = {
  "psum": (lambda x: lax.psum(x, "data"), "all-reduce", "float32", 4000, 7000),
  "pmean": (lambda x: lax.pmean(x, "data"), "all-reduce", "float32", 4000, 7000),
  "pmax": (lambda x: lax.pmax(x, "data"), "all-reduce", "float32", 4000, 7000),
  "half": (
    lambda x: lax.psum(x.astype(jnp.bfloat16), "data"), "all-reduce", "bfloat16", 2000, 3500
  ),
  "gather": (lambda x: lax.all_gather(x, "data"), "all-gather", "float32", 4000, 28000),
  "bytes": (
    lambda x: lax.all_gather(x.astype(jnp.int8), "data"), "all-gather", "int8", 1000, 7000
  ),
  "scatter": (
    lambda x: lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", "float32", 4000, 3500
  ),
  "exchange": (
    lambda x: lax.all_to_all(x.reshape(8, 125), "data", 0, 0), "all-to-all", "float32", 4000, 3500
  ),
  "ring": (
    lambda x: lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]),
    "permute", "float32", 4000, 4000,
  ),
  "one pair": (
    lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]), "permute", "float32", 4000, 1000
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_operation(name):
  program, operation, dtype, payload, sent = CASES[name]
  assert wire.traffic(program, X, axes=EIGHT) == [
    wire.Transfer(operation, ("data",), dtype, payload, sent, 1)
  ]


SHORT_AND_LONG = {
  "bias": jnp.arange(8 * 5, dtype=jnp.float32).reshape(8, 5),
  "matrix": jnp.arange(8 * 6, dtype=jnp.float32).reshape(8, 3, 2),
  "codes": jnp.arange(8 * 7, dtype=jnp.int8).reshape(8, 7),
  "nothing": jnp.zeros((8, 0)),
  "long": jnp.arange(8 * 20000, dtype=jnp.float32).reshape(8, 20000),
}


@pytest.mark.parametrize("name", ["gather", "exchange"])
def test_short_leaves_of_a_type_travel_as_one_message(name):
  send = {"gather": collectives.gather, "exchange": collectives.exchange}[name]
  everyone = jax.tree.map(lambda x: jnp.stack([100 * i + x for i in range(8)]), SHORT_AND_LONG)
  everyone = jax.tree.map(lambda x, like: x.astype(like.dtype), everyone, SHORT_AND_LONG)
  sent = everyone if name == "exchange" else jax.tree.map(lambda x: x[:, 0], everyone)
  found = jax.vmap(lambda tree: send(tree, "data"), axis_name="data")(sent)
  to_all = lambda x: jnp.broadcast_to(x, (8, *x.shape))
  expected = jax.tree.map(lambda x: x.swapaxes(0, 1) if name == "exchange" else to_all(x), sent)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  mine = jax.tree.map(lambda x: x[0], sent)
  transfers = wire.traffic(lambda tree: send(tree, "data"), mine, axes=EIGHT)
  assert sorted((t.dtype, t.payload < 80_000) for t in transfers) == [
    ("float32", False), ("float32", True), ("int8", True)
  ]  # fmt: skip


TO_THE_THIRD = [(i, (i + 3) % 8) for i in range(8)]
SENDING = {
  "gather": collectives.gather,
  "exchange": collectives.exchange,
  "permute": lambda tree, axes: collectives.permute(tree, TO_THE_THIRD, axes),
}


@pytest.mark.slow
@pytest.mark.parametrize("axes", [EIGHT, {"slice": 2, "data": 4}], ids=["flat", "slices"])
@pytest.mark.parametrize("name", SENDING)
def test_what_is_long_goes_between_processes_in_pieces(name, axes, monkeypatch):
  """The same values and bytes; what is sent another worker at once is a piece, and no more."""
  send, piece = lambda tree: SENDING[name](tree, tuple(axes)), 2**13
  longs = {"flat": jnp.arange(8 * 40_000, dtype=jnp.float32).reshape(8, 8, 5000)}
  longs |= {"cube": jnp.arange(8 * 8 * 9999, dtype=jnp.bfloat16).reshape(8, 8, 9, 1111)}
  longs |= {"short": jnp.arange(8 * 8 * 5, dtype=jnp.int8).reshape(8, 8, 5)}
  mine = jax.tree.map(lambda x: x[0], longs)

  def run():
    worker = lambda tree: send(tree)  # traced each time
    for axis in reversed(axes):
      worker = jax.vmap(worker, axis_name=axis)
    return worker(jax.tree.map(lambda x: x.reshape(*axes.values(), *x.shape[1:]), longs))

  sent = lambda: wire.traffic(lambda tree: send(tree), mine, axes=axes)
  whole, before = run(), sent()
  monkeypatch.setattr(sending, "PIECE", piece)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  jax.tree.map(np.testing.assert_array_equal, run(), whole)
  rows = min(axes.values()) if name == "exchange" else 1  # of receivers, in a message
  assert max(t.payload for t in before) > 2 * rows * piece
  assert rows * piece / 2 < max(t.payload for t in sent()) <= rows * (piece + 4 * 128 * 4)  # filled
  assert wire.by_axis(sent()) == pytest.approx(wire.by_axis(before), rel=0.02)


def test_loops_in_loops_multiply():
  def program(x):
    inner = lambda x, _: (lax.pmean(x, "data"), None)
    outer = lambda x, _: (lax.scan(inner, x, None, 5)[0] + lax.pmean(x, "data"), None)
    return jax.jit(lambda x: lax.scan(outer, x, None, 3)[0])(x)

  found = wire.traffic(program, X, axes=EIGHT)
  assert sorted(t.times for t in found) == [3, 15]
  assert wire.by_axis(found) == {"data": 18 * 7000}


def test_axes_are_told_apart():
  def program(x):
    return lax.pmean(lax.pmean(lax.pmean(x, "data"), "slice"), ("slice", "data"))

  found = wire.by_axis(wire.traffic(program, X, axes={"slice": 2, "data": 4}))
  assert found == {"data": 6000, "slice": 4000, "slice+data": 7000}


def test_what_is_no_fact_is_refused():
  loop = lambda x: lax.while_loop(lambda x: x[0] < 1, lambda x: lax.pmean(x, "data"), x)
  with pytest.raises(ValueError, match="not static"):
    wire.traffic(loop, X, axes=EIGHT)
  branch = lambda x: lax.cond(x[0] < 1, lambda x: lax.pmean(x, "data"), lambda x: x, x)
  with pytest.raises(ValueError, match="branches"):
    wire.traffic(branch, X, axes=EIGHT)
  same = lambda x: lax.cond(
    x[0] < 1, lambda x: lax.pmean(x, "data"), lambda x: lax.pmean(-x, "data"), x
  )
  assert wire.by_axis(wire.traffic(same, X, axes=EIGHT)) == {"data": 7000}


def test_one_worker_sends_nothing():
  assert wire.by_axis(wire.traffic(lambda x: lax.pmean(x, "data"), X, axes={"data": 1})) == {
    "data": 0
  }


@pytest.mark.parametrize("name", ["sgd", "adam", "accumulation", "averaged"])
def test_data_parallelism_sends_one_gradient_per_round(name):
  """21 parameters of four bytes, 2 (W-1)/W of them, once in `period` steps."""
  run = Running(METHODS[name], "simulate", EIGHT)
  found = traffic.of_method(run.job, run.layout, 1).transfers
  assert wire.by_axis(found, METHODS[name].local_steps) == {
    "data": 84 * 14 / 8 / METHODS[name].local_steps
  }
  assert wire.by_axis(traffic.of_dense(run.job)) == {"data": 84 * 14 / 8}
  metrics = wire.by_axis(traffic.of_metrics(run.job, 10))
  assert metrics == {"data": 4 * (10 * METHODS[name].local_steps + 1) * 14 / 8}


def test_hierarchical_mean_crosses_the_slow_axis_with_a_chunk():
  """Per worker 2 (2-1)/2 of a quarter of a gradient between two slices; leaves fill up to 24 and 8.

  Within a slice (4-1)/4 of it leaves in parts, and 4-1 copies of a quarter come back.
  """
  method = registry.build("method", "data_parallel(sgd(0.1), hierarchical_mean())")
  run = Running(method, "simulate", {"slice": 2, "data": 4})
  found = wire.by_axis(traffic.of_method(run.job, run.layout, 1).transfers)
  assert found == {"data": 128 * 3 / 4 + 3 * 32, "slice": 32}


def test_a_warm_up_is_followed_round_by_round():
  """Ten dense rounds, ten of one kind of top-k, then another; the counter is seen to count."""
  aggregator = registry.build(
    "aggregator",
    "error_feedback(warm_up(gather_mean(top_k(0.01)), steps=20, "
    "stages=[mean(), gather_mean(top_k(0.25))]))",
  )
  program = lambda state, x: aggregator.aggregate(x, state, jax.random.key(0)).state
  state = jax.eval_shape(aggregator.init, X)
  first = lambda: aggregator.init(jnp.zeros(X.shape))
  rounds = wire.RoundTraffic(program, state, X, axes=EIGHT, first=first)
  found = rounds.between(0, 30)
  of_top_k = lambda k: 7 * (4 * k + 10 * k / 8)
  sent = np.repeat([7000.0, of_top_k(250), of_top_k(10)], 10)
  np.testing.assert_allclose(found.sent, sent, atol=7 * 3)
  assert found.sent.sum() == pytest.approx(sum(t.total for t in found.transfers))
  assert {t.times for t in found.transfers} == {10}
  later = rounds.between(7, 24)
  np.testing.assert_array_equal(later.sent, found.sent[7:24])
  assert [t.times for t in later.transfers] == [3, *[10] * 2, *[4] * 2]


def test_a_condition_on_what_does_not_count_is_refused():
  branch = lambda pick, x: lax.cond(pick, lambda x: lax.pmean(x, "data"), lambda x: x, x)

  def flips(state, x):
    return {"n": -state["n"], "x": branch(state["n"] > 0, x)}

  def doubles(state, x):
    return {"n": 2 * state["n"], "x": branch(state["n"] > 0, x)}

  def counts(state, x):
    return {"n": state["n"] + 1, "x": branch(state["n"] % 3 == 0, x)}

  state = {"n": jax.ShapeDtypeStruct((), jnp.int32), "x": X}
  first = lambda: {"n": jnp.zeros((), jnp.int32), "x": jnp.zeros(1000)}
  read = lambda program, first=first: wire.RoundTraffic(program, state, X, axes=EIGHT, first=first)
  for program in (flips, doubles):
    with pytest.raises(ValueError, match="branches"):
      read(program).between(0, 8)
  found = read(counts).between(0, 8)
  np.testing.assert_array_equal(found.sent, 7000.0 * (np.arange(8) % 3 == 0))
  last = 2**31 - 1
  far = read(counts).between(last - 8, last)
  np.testing.assert_array_equal(far.sent, 7000.0 * (np.arange(last - 8, last) % 3 == 0))
  later = lambda: {"n": jnp.full((), 3, jnp.int32), "x": jnp.zeros(1000)}
  with pytest.raises(ValueError, match="branches"):
    read(counts, later).between(0, 8)


def test_branches_that_differ_only_in_when_they_send_are_told_apart():
  send = lambda x: lax.pmean(x, "data")
  early = lambda n, x: lax.cond(n < 3, send, lambda x: x, x)
  late = lambda n, x: lax.cond(n >= 3, send, lambda x: x, x)

  def program(state, pick, x):
    return {"n": state["n"] + 1, "x": lax.cond(pick, early, late, state["n"], x)}

  state = {"n": jax.ShapeDtypeStruct((), jnp.int32), "x": X}
  first = lambda: {"n": jnp.zeros((), jnp.int32), "x": jnp.zeros(1000)}
  with pytest.raises(ValueError, match="branches"):
    wire.RoundTraffic(program, state, True, X, axes=EIGHT, first=first).between(0, 6)


@pytest.mark.parametrize("dropped", [0, 5], ids=["equal rounds", "rounds that differ"])
def test_each_device_that_holds_the_same_messages_sends_them(dropped):
  """Once per copy, whether all rounds are equal or a counter decides."""
  shape = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((16,), jnp.float32)

  def round_(state, x):
    send = lambda x: lax.pmean(x, "data")
    x = lax.cond(state < dropped, lambda x: x, send, x) if dropped else send(x)
    return state + 1, x

  first = lambda: jnp.zeros((), jnp.int32)
  one, three = (
    wire.RoundTraffic(round_, *shape, axes={"data": 4}, first=first, copies=copies).between(0, 8)
    for copies in (1, 3)
  )
  assert one.sent.sum() == (8 - dropped) * 2 * 3 / 4 * 64
  np.testing.assert_array_equal(three.sent, 3 * one.sent)
  assert sum(t.total for t in three.transfers) == three.sent.sum()
