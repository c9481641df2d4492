"""Rounds: by epochs, of lengths that change, with workers lost, mapped, on a virtual clock."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EXECUTORS, Running, distance, regression
from subset import slow_except

from research.aggregate.mean import mean
from research.analysis import wire
from research.core import registry
from research.core.base import EVERYONE
from research.methods import marina
from research.methods.federated import fed_avg
from research.methods.local import local_sgd
from research.methods.post_local import PostLocalSGD
from research.methods.scaffold import scaffold
from research.optim.transform import as_optax
from research.parallel import inference
from research.parallel.cohorts import draw
from research.parallel.job import Job, resolved, stages
from research.training.config import Config, UsageError
from research.training.loop import train
from research.training.plan import Plan, Sent, Stage

SIZES = (24, 16, 40, 8, 32, 24, 3, 13)
STAGED = "local_sgd(sgd(0.1), mean(), period=[[0, 1], [5, 4], [9, 2]])"
TASK = "least_squares(samples=160, features=5)"


def by_epochs(executor: str, **rest) -> Running:
  """Two workers serve eight clients of unlike sizes, two passes each."""
  method = scaffold(0.1, mean(), epochs=2)
  return Running(method, executor, {"data": 2}, SIZES, task=regression(160), **rest)


@pytest.mark.slow
def test_a_round_by_epochs_is_so_many_passes():
  """Each client sees each of its examples twice, but for what does not fill a batch."""
  run = by_epochs("simulate")
  assert run.job.method.local_steps == 2 * 40 // 8
  numbers = jnp.arange(20, dtype=jnp.int32)
  for worker in range(2):
    lots = jax.device_get(draw(run.job, run.data, run.state.key, numbers, jnp.int32(worker)))
    assert set(lots.owner) == set(range(4 * worker, 4 * worker + 4))
    for owner, index in zip(lots.owner, lots.index, strict=True):
      size, steps = SIZES[owner], int(run.job.own_steps(SIZES[owner]))
      seen = np.bincount(index[:steps].reshape(-1), minlength=size)
      assert seen.sum() == 2 * max(8, size // 8 * 8)
      if size % 8 == 0:
        assert set(seen) == {2}


@pytest.mark.slow
def test_executions_of_a_round_by_epochs_agree():
  """With clients that are lost, and with workers one after the other."""
  dropout = 0.4
  want = by_epochs("simulate", local_phase="vmap", dropout=dropout).rounds(5)
  mapped = by_epochs("simulate", local_phase="map", dropout=dropout).rounds(5)
  spread = by_epochs("spmd", dropout=dropout).rounds(5)
  for got in (mapped, spread):
    assert distance(got.params(), want.params()) <= 1e-5
    np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=1e-4)
  rows = jax.tree.leaves(want.state.method.own_control)
  assert all(row.shape[0] == len(SIZES) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, None])
def test_workers_one_after_the_other_are_workers_at_once(batch_size):
  """Eight on eight devices, and twelve on four: three after one another on each."""
  method = local_sgd(optax.adam(0.01), mean(), period=3)
  for count in (8, 12):
    sizes = (240 // count, 240 // count + 4, 240 // count - 4, 240 // count) * (count // 4)
    both = [
      Running(method, "simulate", {"data": count}, sizes, batch_size, local_phase=phase).rounds(4)
      for phase in ("vmap", "map")
    ]
    assert distance(both[1].params(), both[0].params()) <= 1e-6
    moments = [run.state.method.inner[0].mu for run in both]
    assert distance(jax.device_get(moments[1]), jax.device_get(moments[0])) <= 1e-6


@pytest.mark.slow
def test_who_is_lost_is_weighted_out():
  """The share of the lost, weights that average to one, and nobody's round leaves the model."""
  run = Running(fed_avg(optax.sgd(0.1), mean()), "simulate", {"data": 8}, (30,) * 8, dropout=0.3)
  numbers = jnp.arange(4000, dtype=jnp.int32)
  of_worker = lambda worker: draw(run.job, run.data, run.state.key, numbers, worker)
  lots = jax.device_get(jax.vmap(of_worker)(jnp.arange(8, dtype=jnp.int32)))
  lost = lots.weight == 0
  deviation = np.sqrt(0.3 * 0.7 / lost.size)
  assert abs(lost.mean() - 0.3) < 4 * deviation
  assert np.abs(np.corrcoef(lost) - np.eye(8)).max() < 5 / np.sqrt(len(numbers))
  present = ~lost.all(0)
  np.testing.assert_allclose(lots.weight.mean(0)[present], 1, rtol=1e-6)
  np.testing.assert_allclose(lots.share.mean(0), 1, rtol=1e-6)
  alone = Running(fed_avg(optax.sgd(0.1), mean()), "spmd", {"data": 8}, (30,) * 8, dropout=1 - 1e-9)
  before = alone.params()
  assert distance(alone.rounds(2).params(), before) == 0
  assert alone.metrics["loss"].min() > 0


def test_neighbours_do_not_drop_out():
  method = registry.build("method", "d_psgd(sgd(0.1), gossip(ring()))")
  with pytest.raises(ValueError, match="leave its links empty"):
    Running(method, "simulate", {"data": 8}, (30,) * 8, dropout=0.1)


# ---- a period that changes


def test_a_plan_counts_rounds_and_steps():
  """Five rounds of one step, four of four, then of two."""
  method = local_sgd(optax.sgd(0.1), mean(), period=[[0, 1], [5, 4], [9, 2]])
  plan = Plan(stages(Job(method, regression(), {"data": 8}, np.full(8, 30), 8)))
  ends = [0, 1, 2, 3, 4, 5, 9, 13, 17, 21, 23, 25]
  assert [plan.steps(rounds) for rounds in range(12)] == ends
  assert [plan.rounds(step) for step in ends] == list(range(12))
  assert [plan.end(step) for step in (4, 5, 6, 9, 20, 21, 22)] == [4, 5, 9, 9, 21, 21, 23]
  assert [plan.stage(step) for step in (0, 4, 5, 20, 21, 99)] == [0, 0, 1, 1, 2, 2]
  assert [plan.next_stage(step) for step in (0, 5, 21)] == [5, 21, None]
  with pytest.raises(ValueError, match="rounds of one length"):
    as_optax(method)


@pytest.mark.slow
def test_a_changing_period_is_local_sgd_with_each():
  """The same examples in the same order, averaged where the schedule says: by hand."""
  changing = local_sgd(optax.sgd(0.1), mean(), period=[[0, 1], [5, 4], [9, 2]])
  run = Running(changing, "spmd", {"data": 8})
  state, jobs = run.state, stages(run.job._replace(method=changing))
  for job, rounds in zip(jobs, (5, 4, 3), strict=True):
    state, _ = EXECUTORS["spmd"](job).run(state, run.data, rounds=rounds)
  task, params = regression(), run.job.task.init(jax.random.split(jax.random.key(0))[0])
  one = Running(local_sgd(optax.sgd(0.1), mean(), period=1), "simulate", {"data": 8})
  lots = jax.vmap(
    lambda worker: draw(one.job, one.data, one.state.key, jnp.arange(27, dtype=jnp.int32), worker)
  )(jnp.arange(8, dtype=jnp.int32))
  models = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
  gradient = jax.vmap(lambda p, e, i: jax.grad(task.loss)(p, {k: v[i] for k, v in e.items()}, None))
  for step in range(27):
    grads = gradient(models, jax.device_get(one.data.examples), lots.index[:, step, 0])
    models = jax.tree.map(lambda x, g: x - 0.1 * g, models, grads)
    if step + 1 in (1, 2, 3, 4, 5, 9, 13, 17, 21, 23, 25, 27):
      models = jax.tree.map(lambda x: jnp.broadcast_to(x.mean(0), x.shape), models)
  want = jax.tree.map(lambda x: x[0], models)
  assert distance(jax.device_get(state.method.params), jax.device_get(want)) <= 1e-5


# ---- what rounds send, read in pieces


def synchronises(t: int) -> bool:
  """Whether 0/1 Adam does in round t: every round of the 6 first, then 1, 2, 4, 4, ... apart."""
  return t < 6 or (t - 6 + 1) % min(2 ** ((t - 6) // 8), 4) == 0


# method -> the bytes that a worker sends in round t, of 21 numbers: 147 for a mean over 8 workers
SENT = {
  "data_parallel(sgd(0.1), mean())": lambda t: 147,
  "post_local_sgd(sgd(0.1), mean(), period=4, switch=9)": lambda t: (
    147 * (t < 9 or (t + 1 - 9) % 4 == 0)
  ),
  "zero_one_adam(0.1, mean(), warm_up=6, variance_scale=2, double_every=8, longest=4)": lambda t: (
    147 * (t in (0, 1, 2, 4)) + 147 * synchronises(t)
  ),
  "onebit_adam(0.1, gather_mean(identity()), warm_up=9)": lambda t: 147 if t < 9 else 7 * 84,
  "marina(0.1, gather_mean(identity()), probability=0.3, seed=5)": lambda t: (
    147 if t == 0 or marina.coin(jnp.asarray([t]), 0.3, 5)[0] else 7 * 84
  ),
  "d_psgd(sgd(0.1), gossip(one_peer_exponential()))": lambda t: 84,
  "data_parallel(sgd(0.1), warm_up(gather_mean(identity()), steps=13))": lambda t: (
    147 if t < 13 else 7 * 84
  ),
  "streaming_diloco(sgd(0.1), sgd(0.7), mean(), period=2, fragments=2)": lambda t: (84, 63)[t % 2],
}


@pytest.mark.parametrize("method", slow_except([*SENT][-2:], SENT))
def test_bytes_of_rounds_read_in_pieces(method, monkeypatch):
  """Against a sum over rounds of what each is known to send, in any order of questions."""
  rounds, of_round = 43, [float(SENT[method](t)) for t in range(43)]
  built = registry.build("method", method)
  job = resolved(Job(built, regression(), {"data": 8}, np.full(8, 30), 8))
  layout, plan = inference.layout_of(job), Plan((job,))
  until = lambda x: sum(of_round[: int(x)]) + (x % 1 and x % 1 * of_round[int(x)])
  for piece in (5, 64):
    monkeypatch.setattr(Stage, "PIECE", piece)
    sent = Sent(plan, layout, plan.steps(rounds))
    for asked in (0, 1, 5, 5.5, 9, 10, 31.5, 42, 43, 17, 3.5, 43):
      got = sent.until(asked * job.method.local_steps)  # pyright: ignore[reportArgumentType]
      assert got == pytest.approx(until(asked), abs=1e-9), asked
      totals = wire.by_axis(sent.transfers(round(asked * job.method.local_steps)))
      assert sum(totals.values()) == pytest.approx(until(max(1, round(asked))), abs=1e-9)


def test_bytes_of_stages_read_in_pieces(monkeypatch):
  """Rounds of other lengths, each stage from its first round on."""
  monkeypatch.setattr(Stage, "PIECE", 4)
  ramp = "warm_up(gather_mean(identity()), steps=7)"
  method = registry.build("method", f"local_sgd(sgd(0.1), {ramp}, period=[[0, 1], [5, 4], [9, 2]])")
  jobs = stages(Job(method, regression(), {"data": 8}, np.full(8, 30), 8))
  plan = Plan(jobs)
  sent = Sent(plan, inference.layout_of(jobs[0]), plan.steps(30))
  for rounds in (1, 4, 5, 6, 8, 9, 10, 29, 30):
    want = 147 * min(rounds, 7) + 588 * max(rounds - 7, 0)
    assert sent.until(plan.steps(rounds)) == want
    assert sum(wire.by_axis(sent.transfers(plan.steps(rounds))).values()) == want


def test_what_is_read_at_once_does_not_grow_with_the_steps(monkeypatch):
  """Of as many rounds as there can be, the first and the last piece are read."""
  read, between = [], wire.RoundTraffic.between

  def noted(self, first, last):
    read.append((first, last))
    return between(self, first, last)

  monkeypatch.setattr(wire.RoundTraffic, "between", noted)
  method = registry.build("method", "marina(0.1, gather_mean(qsgd()))")
  job = resolved(Job(method, regression(), {"data": 8}, np.full(8, 30), 8))
  layout, last = inference.layout_of(job), 2**31 - 1
  read.clear()
  sent = Sent(Plan((job,)), layout, last)
  sent.until(100)
  sent.transfers(100)
  assert set(read) == {(last - Stage.PIECE, last), (0, Stage.PIECE), (0, 100)}


def test_a_counter_that_stops_is_refused_before_the_first_round():
  """It counts for longer than a piece, and the run is longer than that."""
  stop = Stage.PIECE + 5

  class Stopping(PostLocalSGD):
    def sync(self, local, state, *, key, presence=EVERYONE):
      after = super().sync(local, state, key=key, presence=presence)
      return after._replace(count=jnp.minimum(after.count, stop))

  method = Stopping(optax.sgd(0.1), mean())
  job = resolved(Job(method, regression(), {"data": 8}, np.full(8, 30), 8))
  layout, plan = inference.layout_of(job), Plan((job,))
  Sent(plan, layout, stop)
  with pytest.raises(ValueError, match="branches"):
    Sent(plan, layout, 2 * stop)


def config(out, **changes) -> Config:
  quick = {"eval_every": 8, "checkpoint_every": 3, "checkpoint_seconds": 0.0, "log_every": 2}
  return Config(task=TASK, batch_size=32, out=str(out), **quick | changes)


def rows(out) -> list[dict]:
  return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_whose_period_changes_goes_on_as_an_unbroken_one(tmp_path):
  """Stopped in each stage; bytes are a message per round."""
  whole, _ = train(config(tmp_path / "whole", method=STAGED, rounds=14))
  assert whole["steps"] == 31
  for rounds in (7, 12, 14):
    last = config(tmp_path / "broken", method=STAGED, rounds=rounds, allow_changes=True)
    broken, _ = train(last)
  assert broken["params_sha256"] == whole["params_sha256"]
  dense = whole["wire"]["dense_bytes_per_step_per_worker"]
  assert whole["wire"]["total_bytes_per_worker"] == 14 * dense
  assert whole["wire"]["bytes_per_step_per_worker"]["data"] == pytest.approx(14 * dense / 31)
  found = {row["step"]: row["bytes"] for row in rows(tmp_path / "whole")}
  assert [found[step] for step in (4, 9, 21, 31)] == [4 * dense, 6 * dense, 9 * dense, 14 * dense]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"steps": 7, "method": STAGED}, "a round of 4 steps; nearest: 9"),
    ({"rounds": 3, "epochs": 1.0}, "cannot be combined with --epochs"),
    ({"dropout": 1.0}, r"not in \[0, 1\)"),
    ({"delta": 0.0}, r"not in \(0, 1\)"),
    ({"population": 4}, "smaller than the cohort, the 8 workers"),
    ({"local_phase": "loop"}, "legal: auto, vmap, map"),
    ({"local_phase": "map", "executor": "spmd"}, "applies only to --executor=simulate"),
    ({"virtual_seconds": 3.0}, "needs --clock"),
    ({"clock": "steady(1.0)", "virtual_seconds": 0.5}, "the first round ends only after 1 s"),
    ({"clock": "steady([1.0, 2.0])"}, "those of 2 workers, and there are 8"),
    ({"clock": "stedy(1.0)"}, "did you mean 'steady'"),
    ({"method": "asgd(sgd(0.1), mean())", "executor": "spmd"}, "one by one"),
    ({"method": "asgd(sgd(0.1), mean())", "population": 16}, "one by one"),
  ],
)
def test_what_cannot_be_is_refused(changes, words, tmp_path):
  with pytest.raises(UsageError, match=words):
    train(config(tmp_path / "out", **changes))
  assert not (tmp_path / "out").exists()


# ---- on a virtual clock


@pytest.mark.slow
def test_a_virtual_clock_orders_what_a_server_sees(tmp_path):
  """One worker is four times slower: synchronous rounds wait, a server does not; both reproduce."""
  clock = {"clock": "steady(1.0, slowdown={0: 4})", "virtual_seconds": 40.0, "eval_every": 0}
  clock |= {"checkpoint_every": 0, "log_every": 10}
  waiting, _ = train(
    config(tmp_path / "waiting", method="data_parallel(sgd(0.1), mean())", **clock)
  )
  assert (waiting["steps"], waiting["virtual_seconds"]) == (10, 40.0)
  asynchronous = {"method": "asgd(sgd(0.05), mean())", **clock}
  served, _ = train(config(tmp_path / "served", **asynchronous))
  assert served["steps"] == 7 * 40 + 10
  assert served["workers"] == 8
  assert served["wire"]["bytes_per_step_per_worker"] == {}
  seconds = [row["virtual_seconds"] for row in rows(tmp_path / "served")]
  assert seconds == sorted(seconds)
  assert served["train_loss"] < waiting["train_loss"]
  again, _ = train(config(tmp_path / "again", **asynchronous))
  assert again["params_sha256"] == served["params_sha256"]
  local = {"method": "local_sgd(sgd(0.1), mean(), period=5)", **clock}
  assert train(config(tmp_path / "local", **local))[0]["steps"] == 10
