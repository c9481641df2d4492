"""A parameter server without a network: order, what is counted and refused, replay from a trace."""

import asyncio
import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance, regression, split
from subset import slow_except
from test_asynchronous import ORDER, SIZES

from research.aggregate.mean import mean
from research.core import registry
from research.methods.asynchronous import asgd
from research.parallel.job import Job
from research.server import cluster, driver, events, replay, setup, store, work
from research.server.events import Event, Push
from research.server.halves import halves
from research.server.head import DENIED, Head
from research.server.messages import Spent
from research.server.part import ShardState
from research.training import folder, loop
from research.training.config import Config, UsageError
from research.training.hooks.hook import End, Evaluation, Pause, Rounds, Saved, Stop

TOP = "error_feedback(gather_mean(top_k(0.3)))"
# name -> method, mode, shards
RUNS = {
  "async": ("asgd(sgd(0.05, momentum=0.5), mean())", "async", 2),
  "aware": (f"staleness_aware(data_parallel(adam(0.02), {TOP}), last_pull())", "async", 1),
  "compensated": ("dc_asgd(0.05, gather_mean(int8()), last_pull(), lam=0.5)", "async", 2),
  "ssp": (f"data_parallel(sgd(0.05), {TOP}, period=2)", "ssp", 1),
  "sync": ("local_sgd(sgd(0.05, momentum=0.5), mean(), period=3)", "sync", 2),
  "elastic": (f"diloco(adam(0.02), sgd(0.7, momentum=0.9), {TOP}, period=5)", "elastic", 1),
}


@functools.cache
def made(
  method: str, mode: str = "async", shards: int = 1, batch_size: int | None = 5, **rest: Any
) -> setup.Setup:
  """A setup of four workers on the regression."""
  built, task = registry.build("method", method), regression(80)
  examples, sizes = split(task, SIZES)
  config = Config(executor="server", server_mode=mode, workers=4, shards=shards, **rest)
  job = Job(built, task, {"data": 4}, sizes, batch_size)
  shapes = work.shapes_of(jax.eval_shape(task.init, jax.random.key(0)))
  parts, keys = work.cut(shapes, shards), work.keys_of(0)
  apart = halves(built, jax.eval_shape(task.init, jax.random.key(0)))
  return setup.Setup(config, job, apart, keys, shapes, parts, examples, None, 24)


SPENT = Spent(0.5, 0.1, 0.01, 0.02, 0.15, 8, 8)


class Server:
  """A head and its shards in this process, and workers that take turns as somebody says."""

  def __init__(self, of: setup.Setup, now: Any = None, counted: Any = ()):
    self.setup = of
    payloads = work.payload_shapes(of.apart.link, of.shapes)
    params = setup.initial(of)
    self.parts = [
      ShardState(
        work.side(of.job.method, of.keys, of.shapes, leaves),
        setup.chosen(of, shard, params),
        [payloads[leaf] for leaf in leaves],
        shard,
      )
      for shard, leaves in enumerate(of.parts)
    ]
    self.clock = 0.0

    def elsewhere(pushes, shares):
      for part in self.parts[1:]:
        part.apply(pushes, shares)

    rules = of.rules("code")._replace(lag=1)
    self.head = Head(rules, self.parts[0], elsewhere, counted, now or (lambda: self.clock))
    self.compute = work.worker(of.job, of.apart, of.keys)
    self.treedef = jax.tree.structure(jax.eval_shape(of.job.task.init, jax.random.key(0)))

  def params(self) -> dict[str, np.ndarray]:
    found = {name: x for part in self.parts for name, x in part.snapshot()[1].items()}
    return {name: found[name] for name in self.setup.shapes}

  def model(self, own: Any, worker: int) -> tuple[Any, tuple[int, ...]]:
    pulls = [own, *(part.pull(worker) for part in self.parts[1:])]
    leaves: list[Any] = [None] * len(self.setup.shapes)
    for part, pulled in zip(self.setup.parts, pulls, strict=True):
      for leaf, value in zip(part, pulled.leaves, strict=True):
        leaves[leaf] = value
    return self.treedef.unflatten(leaves), tuple(pulled.version for pulled in pulls)

  async def worker(self, number: int, pauses: Any, dies: int = 0) -> None:
    """One incarnation after the other; one whose every `dies`-th push is its last."""
    examples, size = work.examples_of(self.setup.examples, self.setup.job.sizes, number)
    data, own = (examples, size, jnp.int32(number)), jnp.int32(number)
    while not self.head.reason:
      joined = await self.head.join(number, "code")
      for part in self.parts[1:]:
        part.join(number, joined.incarnation)
      params, versions = self.model(joined.pulled, number)
      held = self.compute.held(params)
      at, first = joined.number, joined.first
      while True:
        pause = pauses.integers(1, 5)
        for _ in range(pause):
          await asyncio.sleep(0)
        if self.setup.config.server_mode == "elastic":
          steps = int(pause)
          self.clock += 0.3
          local, total = self.compute.begin(params, held)
          for step in range(steps):
            at_step = jnp.int32(first + step)
            local, total = self.compute.step(local, total, params, held, *data, at_step)
        else:
          steps = self.setup.job.method.local_steps
          local, total = self.compute.steps(params, held, *data, jnp.int32(first))
        payloads, held = self.compute.end(local, params, held, own, jnp.int32(at))
        payloads = jax.tree.map(np.asarray, payloads)
        push = Push(number, joined.incarnation, at, first, steps, versions)
        if dies and pauses.integers(dies) == 0:
          await self.head.leave(number)
          break
        for part, leaves in zip(self.parts[1:], self.setup.parts[1:], strict=True):
          part.stage(push, [payloads[leaf] for leaf in leaves])
        mine = [payloads[leaf] for leaf in self.setup.parts[0]]
        reply = await self.head.push(push, mine, SPENT._replace(loss=float(total)))
        if reply.kind not in ("counted", "late"):
          break
        if reply.kind == "counted":
          at, first = at + 1, first + steps
        params, versions = self.model(reply.pulled, number)


def ran(of: setup.Setup, dies: int = 0, seed: int = 0) -> tuple[Server, list[Event]]:
  """Four workers in an order of their own."""

  async def together() -> tuple[Server, list[Event]]:
    server = Server(of)
    pauses = np.random.default_rng(seed).spawn(4)
    await asyncio.gather(*(server.worker(w, pauses[w], dies) for w in range(4)))
    return server, server.head.report()["events"]

  return asyncio.run(asyncio.wait_for(together(), 60))


@pytest.mark.parametrize("name", slow_except([*RUNS][:1], RUNS))
def test_a_trace_gives_the_same_parameters_again(name, tmp_path):
  """With workers that die now and then: every piece of work is counted once."""
  method, mode, shards = RUNS[name]
  of = made(method, mode, shards, bound=1)
  server, happened = ran(of, dies=6)
  trace = events.Trace(tmp_path, of.parts, 0)
  trace.write(happened)
  trace.close()
  head, read = events.read(tmp_path / events.FILE)  # checks that nothing is counted twice
  assert head["shards"] == of.parts
  assert read == happened
  assert sum(event.counted for event in read) == of.updates
  assert len({push.incarnation for event in read for push in event.pushes}) > 1
  again = replay.Replayed(of, setup.initial(of), read)
  played = [event for event in loop.events(again) if isinstance(event, Rounds)]
  assert played[-1].last == again.step == of.updates * of.job.method.local_steps
  assert replay.distance(again.params(), server.params()) <= 1e-6
  assert replay.distance(server.params(), setup.initial(of)) > 0.05


def test_the_replay_is_the_simulated_method():
  """Of the same order of clients: `asgd` in a simulated run, its gradients over all examples."""
  task, method = regression(80), asgd(optax.sgd(0.1, momentum=0.5), mean())
  run = Running(method, "simulate", {"data": 1}, SIZES, None, task=task, order=ORDER)
  of = made("asgd(sgd(0.1, momentum=0.5), mean())", batch_size=None)
  initial = {f"['{name}']": x for name, x in run.params().items()}
  counted, pulled, happened = [0] * 4, [0] * 4, []
  for update, worker in enumerate(ORDER.tolist()):
    push = Push(worker, 1, counted[worker], counted[worker], 1, (pulled[worker],))
    happened.append(Event(update, (push,)))
    counted[worker], pulled[worker] = counted[worker] + 1, update + 1
  again = replay.Replayed(of, initial, happened)
  assert [event.reason for event in loop.events(again) if isinstance(event, Stop)] == ["steps"]
  want = run.rounds(len(ORDER)).params()
  got = {name: again.params()[f"['{name}']"] for name in want}
  assert distance(got, want) <= 1e-5


# ---- what is counted, and what is refused


METHOD = "asgd(sgd(0.1), mean())"


class Hand(Server):
  """A server whose pushes are made by hand, of zeros unless told otherwise."""

  def payloads(self, value: float = 0.0) -> list[np.ndarray]:
    shapes = self.setup.shapes.values()
    return [np.full(x.shape, value, x.dtype) for x in shapes]

  async def pushed(self, push: Push, payloads: Any = None) -> Any:
    return await self.head.push(push, payloads or self.payloads(0.5), SPENT)


def hand(mode: str = "async", **rest: Any) -> Hand:
  return Hand(made(METHOD, mode, **rest))


def asynchronous(test: Any) -> Any:
  """A test that is a coroutine, of a few seconds."""

  @functools.wraps(test)
  def run(**named: Any) -> None:
    asyncio.run(asyncio.wait_for(test(**named), 20))

  return run


@asynchronous
async def test_a_push_counts_once():
  server = hand()
  joined = await server.head.join(0, "code")
  push = Push(0, joined.incarnation, 0, 0, 1, (0,))
  assert (await server.pushed(push)).kind == "counted"
  after = server.params()
  assert (await server.pushed(push)).kind == "refused"
  gap = push._replace(number=2, first=2)
  assert (await server.pushed(gap)).kind == "refused"
  other = await server.head.join(0, "code")  # another process in its place
  assert other.pulled
  assert (other.incarnation, other.number, other.first) == (2, 1, 1)
  assert (await server.pushed(push._replace(number=1, first=1))).kind == "rejoin"
  assert replay.distance(server.params(), after) == 0
  assert server.head.report()["refused"] == {"order": 2}
  right = Push(0, 2, 1, 1, 1, (other.pulled.version,))
  assert (await server.pushed(right)).kind == "counted"
  assert server.head.counted[0] == [2, 2, 2]


MALFORMED = {
  "shape": (lambda x: x.reshape(-1), "array 1 is [18], not [6, 3]"),
  "dtype": (lambda x: x.astype(np.float64), "array 1 is float64, not float32"),
  "array": (lambda x: x.tolist(), "another model or compressor"),
  "nan": (lambda x: np.where(np.arange(3) == 1, np.nan, x), "values that are not finite"),
  "infinite": (lambda x: x + np.float32(np.inf), "values that are not finite"),
}


@pytest.mark.parametrize("name", MALFORMED)
@asynchronous
async def test_a_malformed_push_is_refused_and_counted(name):
  server = hand()
  joined = await server.head.join(2, "code")
  spoil, says = MALFORMED[name]
  first, second = server.payloads(1.0)
  spoilt = spoil(second)
  if name == "nan":
    spoilt = spoilt.astype(np.float32)
  push = Push(2, joined.incarnation, 0, 0, 1, (0,))
  reply = await server.pushed(push, [first, spoilt])
  assert reply.kind == "refused"
  assert says in reply.text
  assert reply.text.startswith("push 0 of worker 2: ")
  old = await server.pushed(push._replace(versions=(7,)))
  assert (old.kind, "has not pulled" in old.text) == ("refused", True)
  found = server.head.report()
  assert sum(found["refused"].values()) == 2
  assert found["refused"]["version"] == 1
  assert found["notes"] == [f"refused: {reply.text}", f"refused: {old.text}"]
  assert (await server.pushed(push)).kind == "counted"  # it is up


@asynchronous
async def test_a_worker_of_other_code_is_refused():
  server = hand()
  joined = await server.head.join(1, "other")
  assert joined.refused == "worker 1 has another model or other code (other, not code)"
  assert server.head.report()["refused"] == {"code": 1}
  assert server.head.alive == set()


@asynchronous
async def test_a_run_ends_when_nothing_but_refusals_comes():
  server = hand()
  joined = await server.head.join(0, "code")
  push = Push(0, joined.incarnation, 0, 0, 1, (0,))
  for _ in range(4 * DENIED):
    await server.pushed(push, server.payloads(np.nan))
  assert server.head.reason.startswith("refused: push 0 of worker 0")
  assert (await server.pushed(push)).kind == "stop"


@asynchronous
async def test_nobody_gets_further_ahead_than_the_bound():
  server = hand("ssp", bound=2)
  joined = {worker: await server.head.join(worker, "code") for worker in range(4)}
  version = 0
  for number in range(2):
    reply = await server.pushed(Push(0, joined[0].incarnation, number, number, 1, (version,)))
    version = reply.pulled.version
  third = asyncio.ensure_future(server.pushed(Push(0, 1, 2, 2, 1, (version,))))
  for worker in (1, 2):
    await server.pushed(Push(worker, 1, 0, 0, 1, (0,)))
  for _ in range(20):
    await asyncio.sleep(0)
  assert not third.done()  # worker 3 has done nothing
  assert server.head.counted[0][1] == 3  # what it has pushed is counted all the same
  await server.pushed(Push(3, 1, 0, 0, 1, (0,)))
  assert (await third).kind == "counted"


@asynchronous
async def test_a_round_waits_for_all_or_until_its_time_is_over():
  sync, elastic = hand("sync"), Hand(made(RUNS["elastic"][0].replace(TOP, "mean()"), "elastic"))
  for server in (sync, elastic):
    for worker in range(4):
      await server.head.join(worker, "code")
  rounds = [asyncio.ensure_future(sync.pushed(Push(w, 1, 0, 0, 1, (0,)))) for w in range(3)]
  await asyncio.sleep(0.05)
  assert not any(task.done() for task in rounds)
  await sync.pushed(Push(3, 1, 0, 0, 1, (0,)))
  assert [(await task).pulled.version for task in rounds] == [1, 1, 1]
  waiting = asyncio.ensure_future(elastic.pushed(Push(0, 1, 0, 0, 3, (0,))))
  await asyncio.sleep(0.01)
  assert not waiting.done()
  elastic.clock = 2.5  # the round had a second, and as much again for who is late
  await elastic.head.leave(3)
  assert (await waiting).pulled.version == 1
  late = await elastic.pushed(Push(1, 1, 0, 0, 2, (0,)))
  assert late.kind == "late"
  assert late.pulled.version == 1
  found = elastic.head.report()
  assert found["refused"] == {"late": 1}
  assert [event.counted for event in found["events"]] == [True, False]


def test_rounds_are_weighted_by_work():
  """A mean of two messages by steps, in one shard and in two."""
  method = "local_sgd(sgd(0.1), mean(), period=9)"
  for shards in (1, 2):
    of = made(method, "elastic", shards)
    server = Server(of)
    before = server.params()
    pushes = [Push(0, 1, 0, 0, 1, (0,) * shards), Push(1, 1, 0, 0, 3, (0,) * shards)]
    for part, leaves in zip(server.parts, of.parts, strict=True):
      for push, value in zip(pushes, (1.0, 5.0), strict=True):
        part.join(push.worker, 1)
        part.pull(push.worker)
        shapes = [list(of.shapes.values())[leaf] for leaf in leaves]
        part.stage(push, [np.full(x.shape, value, x.dtype) for x in shapes])
      part.apply(pushes, [0.25, 0.75])
    for name, leaf in server.params().items():
      np.testing.assert_allclose(leaf, before[name] + 4.0, rtol=1e-6)


def test_traces_that_cannot_be():
  push = Push(0, 1, 0, 0, 2, (0,))
  events.check([Event(0, (push,)), Event(1, (push._replace(number=1, first=2, versions=(1,)),))], 1)
  twice = [Event(0, (push,)), Event(1, (push,))]
  ahead = [Event(0, (push._replace(versions=(1,)),))]
  skipped = [Event(0, (push._replace(number=1, first=2),))]
  for wrong in (twice, ahead, skipped, [Event(1, (push,))]):
    with pytest.raises(ValueError, match="of the trace is invalid"):
      events.check(wrong, 1)


def test_checkpoints_are_whole_or_set_aside(tmp_path):
  """Also with other shards, which the optimizer cannot be cut into."""
  of = made("asgd(sgd(0.1, momentum=0.9), mean())", shards=2)
  server, _ = ran(of)
  states = {n: part.snapshot()[2] for n, part in enumerate(server.parts)}
  counted, params, notes = server.head.counted, server.params(), []
  checkpoints = store.ShardStore(tmp_path, list(of.shapes), of.parts, period=3)
  for version in (5, 9):
    checkpoints.save(3 * version, store.Snapshot(version, params, states, counted), 0.0)
  assert checkpoints.latest() == 27
  found = checkpoints.restore(None, notes.append)
  assert found is not None
  step, place = found
  assert step == 27
  assert (place.version, place.counted) == (9, counted)
  assert replay.distance(place.params, params) == 0
  assert place.states is not None
  for shard, leaves in states.items():
    for a, b in zip(leaves, place.states[shard], strict=True):
      np.testing.assert_array_equal(a, b)
  assert not notes
  (tmp_path / "9" / "state.npz").write_bytes(b"torn")
  found = store.ShardStore(tmp_path, list(of.shapes), [[0, 1]]).restore(None, notes.append)
  assert found is not None
  place = found[1]
  assert (place.version, place.states) == (5, None)
  assert "9.damaged" in notes[0]
  assert "is reinitialized" in notes[1]


def test_clipping_by_the_global_norm_wants_all_leaves():
  """Not so Adam, momentum, and clipping of each leaf."""
  shapes = made(METHOD).shapes
  across = lambda spec: work.looks_across(
    made(f"asgd({spec}, mean())").job.method, shapes, [[0], [1]]
  )
  assert across("chain(clip_by_global_norm(1.0), sgd(0.1))")
  assert not across("adam(0.1)")
  assert not across("chain(clip(0.1), sgd(0.1, momentum=0.9))")


BASE = Config(executor="server", task="digits()", method=METHOD)
WRONG = {
  "mode": ({"server_mode": "asink"}, "--server_mode='asink': unknown; did you mean 'async'?"),
  "seconds": ({"round_seconds": 0.0}, "--round_seconds=0.0: not in"),
  "clock": ({"clock": "steady(1.0)"}, "--clock='steady(1.0)': is not for --executor=server"),
  "mesh": ({"mesh": "data:2,fsdp:2"}, "--mesh='data:2,fsdp:2': a server's workers"),
  "slowdown": ({"slowdown": "{9: 4}"}, "--slowdown='{9: 4}': {9: 4} is not a worker's"),
  "factor": ({"slowdown": "4"}, "--slowdown='4': not a factor by worker number"),
  "method": (
    {"method": "signum(0.1, majority_vote())"},
    "majority_vote is an exchange among workers",
  ),
  "exchange": ({"method": "asgd(sgd(0.1), two_phase(int8()))"}, "cannot be split"),
  "period": ({"method": "local_sgd(sgd(0.1), mean(), period=[[0, 1], [5, 2]])"}, "one period"),
  "elastic": ({"server_mode": "elastic"}, "elastic workers take local steps"),
  "batch": ({"batch_size": 7}, "--batch_size=7: does not divide among 8 workers"),
  "shards": ({"shards": 9}, "--shards=9: the model has 4 leaves"),
  "across": (
    {"shards": 2, "method": "asgd(chain(clip_by_global_norm(1.0), sgd(0.1)), mean())"},
    "--shards=2: the server's optimizer needs all leaves at once",
  ),
  "steps": ({"method": "local_sgd(sgd(0.1), mean(), period=7)"}, "nearest: 406"),
  "hogwild": (
    {"server_mode": "hogwild", "method": "asgd(adam(0.1), mean())"},
    "hogwild adds gradients to one model",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_flags_that_cannot_be(name):
  flags, says = WRONG[name]
  with pytest.raises(UsageError) as caught:
    setup.setup(BASE.replace(**flags), needs_ray=False)
  assert says in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_run_keeps_its_name_whatever_a_server_has_for_flags():
  """The flags of a server are none of other executions, and say what a server's run is."""
  assert "server_mode" not in folder.identity(Config())
  assert folder.default_folder(Config(workers=3)) == folder.default_folder(Config())
  assert folder.identity(BASE)["server_mode"] == "async"


@pytest.fixture(scope="module")
def lock_free(tmp_path_factory):
  """Two processes on sparse rows in shared memory."""
  here = tmp_path_factory.mktemp("hogwild")
  lines = ["+1 1:1 3:0.5", "-1 2:1", "+1 1:0.7 4:1", "-1 2:0.9 4:0.3"] * 8
  (here / "libsvm").mkdir()
  (here / "libsvm" / "made").write_text("\n".join(lines) + "\n")
  return here


@pytest.mark.slow
def test_hogwild_learns_and_leaves_nothing_behind(lock_free, monkeypatch):
  before = set(Path("/dev/shm").iterdir())
  config = Config(
    executor="server",
    server_mode="hogwild",
    workers=2,
    task="libsvm('made', sparse=True)",
    method="hogwild(1.0, mean(), bound=2)",
    batch_size=4,
    steps=300,
    eval_every=0,
    data_dir=str(lock_free),
    out=str(lock_free / "run"),
  )
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  summary, out = driver.train(config)
  assert summary["steps"] in (300, 301)
  assert summary["eval"]["accuracy"] == 1
  assert summary["train_loss"] < 0.1
  assert set(Path("/dev/shm").iterdir()) <= before
  rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == summary["steps"]


# Two workers without locks on the sparse table of `lock_free`.
LOCK_FREE = BASE.replace(
  server_mode="hogwild",
  workers=2,
  task="libsvm('made', sparse=True)",
  method="hogwild(1.0, mean(), bound=2)",
  batch_size=4,
  steps=10**6,
)


@pytest.mark.slow
def test_the_events_and_hooks_of_any_run_serve_a_server(lock_free, monkeypatch):
  """A user's hook stops it; it goes on from where it was saved until it has converged."""
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  told: list[Any] = []

  def watch(run: Any, event: Any) -> str | None:
    told.append(event)
    return "enough" if run.step >= 100 else None

  config = LOCK_FREE.replace(
    eval_every=50,
    checkpoint_every=50,
    checkpoint_seconds=0.0,
    tensorboard=True,
    data_dir=str(lock_free),
    out=str(lock_free / "hooked"),
  )
  summary, out = driver.train(config, [watch])
  assert summary["stopped_because"] == "enough"
  rounds = [event for event in told if isinstance(event, Rounds)]
  assert [event.last for event in rounds[:-1]] == [event.first for event in rounds[1:]]
  assert all(len(event.metrics["loss"]) == event.last - event.first for event in rounds)
  kinds = [type(event) for event in told if not isinstance(event, Evaluation)]
  assert kinds[-5:] == [Stop, Pause, Saved, End, Pause]
  assert any(isinstance(event, Evaluation) for event in told)
  rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == summary["steps"] == rounds[-1].last
  assert "gradient_norm" not in rows[-1]
  assert list((out / "tensorboard").iterdir())
  again, _ = driver.train(config.replace(tolerance=1.0, allow_changes=True))
  assert again["stopped_because"] == "converged"
  assert again["steps"] > summary["steps"]
  rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  steps = [row["step"] for row in rows]
  assert steps == sorted(set(steps))
  assert rows[-1]["gradient_norm"] < 1


@pytest.mark.slow
def test_a_dead_worker_of_hogwild_is_started_again_however_often_the_model_is_looked_at(
  lock_free, monkeypatch
):
  """The other worker reaches an evaluation between any two looks at the memory."""
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  killed: list[int] = []

  def kill(run: Any, event: Any) -> str | None:
    if isinstance(event, Rounds) and not killed and run.memory.steps.min() > 0:
      killed.append(run.step)
      os.kill(run.processes[1].pid, signal.SIGKILL)
    is_back = run.deaths["workers"] and run.processes[1].is_alive()
    return "seen" if is_back or (killed and run.step > killed[0] + 20_000) else None

  config = LOCK_FREE.replace(
    eval_every=1,
    checkpoint_every=0,
    data_dir=str(lock_free),
    out=str(lock_free / "killed"),
  )
  summary, _ = driver.train(config, [kill])
  assert summary["server"]["deaths"] == {"workers": 1}


@pytest.mark.parametrize(
  ("error", "says"),
  [
    (
      OSError("AF_UNIX path length cannot exceed 107 bytes: /long/ray/s"),
      "^TMPDIR='/long': too long",
    ),
    (PermissionError(13, "Permission denied", "/long/ray"), "^Ray cannot write /long/ray: Perm"),
    (ConnectionError("nobody there"), "^--node_ip='127.0.0.1': nobody there"),
  ],
)
def test_what_keeps_ray_from_starting_is_named(error, says, monkeypatch):
  ray = pytest.importorskip("ray")

  def init(**kwargs):
    raise error

  monkeypatch.setattr(ray, "init", init)
  monkeypatch.setattr(os, "environ", os.environ | {"TMPDIR": "/long"})
  monkeypatch.delitem(os.environ, "RAY_TMPDIR", raising=False)
  with pytest.raises(UsageError, match=says), cluster.running(BASE, 1, 1):
    pass


def test_a_task_without_labels_is_served(monkeypatch):
  """Its examples are counted by whatever arrays it has."""
  task = regression(80)
  loss = lambda params, batch, key: jnp.mean((batch["x"] @ params["w"]) ** 2)
  evaluate = lambda params, batch: {"loss": loss(params, batch, None)}
  x = {"x": task.train["x"]}
  bare = task._replace(loss=loss, evaluate=evaluate, train=x, test=None)
  monkeypatch.setattr(registry, "ADDED", {})
  registry.register("task", "bare")(lambda: bare)
  found = setup.setup(BASE.replace(task="bare()", batch_size=80), needs_ray=False)
  assert found.examples["x"].shape == (8, 10, 6)
