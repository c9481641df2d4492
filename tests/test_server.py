"""A parameter server without a network: order, what is counted and refused, replay from a trace."""

import asyncio
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance, regression, split
from test_asynchronous import ORDER, SIZES

from research import registry
from research.aggregate.mean import mean
from research.methods.asynchronous import asgd
from research.parallel.job import Job
from research.server import events, replay, setup, work
from research.server.events import Event, Push
from research.server.head import Head, Spent
from research.server.part import Part
from research.train.config import Config

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
  return setup.Setup(config, job, built.served, keys, shapes, parts, examples, None, 24)


SPENT = Spent(0.5, 0.1, 0.01, 0.02, 0.15, 8, 8)


class Server:
  """A head and its shards in this process, and workers that take turns as somebody says."""

  def __init__(self, of: setup.Setup, now: Any = None, counted: Any = ()):
    self.setup = of
    payloads = work.payload_shapes(of.served, of.shapes)
    params = setup.initial(of)
    self.parts = [
      Part(
        work.side(of.served, of.keys, of.shapes, leaves),
        setup.chosen(of, shard, params),
        [payloads[leaf] for leaf in leaves],
        shard,
      )
      for shard, leaves in enumerate(of.parts)
    ]
    self.clock = 0.0
    elsewhere = lambda pushes, shares: [p.apply(pushes, shares) for p in self.parts[1:]]
    rules = of.rules("code")._replace(lag=1)
    self.head = Head(rules, self.parts[0], elsewhere, counted, now or (lambda: self.clock))
    self.compute = work.worker(of.job, of.served, of.keys)
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
            local, total = self.compute.step(local, total, *data, jnp.int32(first + step))
        else:
          steps = self.setup.job.method.period
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


@pytest.mark.parametrize("name", RUNS)
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
  again = replay.Replayed(of, setup.initial(of))
  again.play(read)
  assert replay.distance(again.params(), server.params()) <= 1e-6
  assert replay.distance(server.params(), setup.initial(of)) > 0.05


def test_the_replay_is_the_simulated_method():
  """Of the same order of clients: `asgd` in a simulated run, its gradients over all examples."""
  task, method = regression(80), asgd(optax.sgd(0.1, momentum=0.5), mean())
  run = Running(method, "simulate", {"data": 1}, SIZES, None, task=task, order=ORDER)
  of = made("asgd(sgd(0.1, momentum=0.5), mean())", batch_size=None)
  again = replay.Replayed(of, {f"['{name}']": x for name, x in run.params().items()})
  counted, pulled, happened = [0] * 4, [0] * 4, []
  for update, worker in enumerate(ORDER.tolist()):
    push = Push(worker, 1, counted[worker], counted[worker], 1, (pulled[worker],))
    happened.append(Event(update, (push,)))
    counted[worker], pulled[worker] = counted[worker] + 1, update + 1
  again.play(happened)
  want = run.rounds(len(ORDER)).params()
  got = {name: again.params()[f"['{name}']"] for name in want}
  assert distance(got, want) <= 1e-5
