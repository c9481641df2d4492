"""Runs a worker process, which pulls, computes and pushes, possibly overlapping these steps."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayActorError

from research.server import setup as setups
from research.server import work
from research.server.events import Push
from research.server.messages import Spent
from research.training.config import Config

PATIENCE = 120.0  # seconds without a server after which a worker process ends


class Gone(Exception):
  """Reports that the worker must join again: servers died or do not know this incarnation."""


class Servers(NamedTuple):
  """Handles of the head and of the other shards."""

  head: Any
  shards: list[Any]


class Worker:
  """The process of worker number `worker`."""

  def __init__(self, config: Config, worker: int):
    self.config, self.number = config, worker
    self.setup = setups.setup(config)
    self.code = setups.code_of(self.setup)
    self.rules = self.setup.rules(self.code)
    self.slowdown = setups.slowdown(config).get(worker, 1.0)
    self.compute = work.worker(self.setup.job, self.setup.apart, self.setup.keys)
    examples, size = work.examples_of(self.setup.examples, self.setup.job.sizes, worker)
    self.data = (jax.device_put(examples), size, jax.numpy.int32(worker))
    shapes = self.setup.shapes.values()
    self.bytes = sum(x.size * x.dtype.itemsize for x in shapes)  # size of a pull
    self.treedef = jax.tree.structure(jax.eval_shape(self.setup.job.task.init, jax.random.key(0)))
    self.warm()

  def warm(self) -> None:
    """Compiles all functions before the worker joins, so that no other worker waits for it."""
    shapes = self.setup.shapes.values()
    params = self.treedef.unflatten([jax.numpy.zeros(x.shape, x.dtype) for x in shapes])
    held = self.compute.held(params)
    if self.config.server_mode == "elastic":
      local, total = self.compute.begin(params, held)
      local, total = self.compute.step(local, total, params, held, *self.data, np.int32(0))
    else:
      local, total = self.compute.steps(params, held, *self.data, np.int32(0))
    jax.block_until_ready(self.compute.end(local, params, held, self.data[2], np.int32(0)))

  def run(self) -> str:
    """Works until the run is over; returns '', or the reason why this worker may not take part."""
    alone_since = time.monotonic()
    while time.monotonic() - alone_since < PATIENCE:
      try:
        servers = self.servers()
        joined: Any = ray.get(servers.head.join.remote(self.number, self.code, os.getpid()))
      except (ValueError, RayActorError):  # the actors do not exist yet, or no longer
        time.sleep(0.2)
        continue
      if joined.refused:
        return joined.refused
      try:
        self.work(servers, joined)
        return ""
      except (Gone, RayActorError):
        alone_since = time.monotonic()
    return f"worker {self.number} has had no server for {PATIENCE:.0f} s"

  def servers(self) -> Servers:
    names = ["head", *(f"shard-{number}" for number in range(1, self.config.shards))]
    head, *shards = map(ray.get_actor, names)
    return Servers(head, shards)

  # ---- one incarnation

  def work(self, servers: Servers, joined: Any) -> None:
    """Computes and pushes pieces of work, one after another.

    Raises:
      Gone: if the worker must join again.
    """
    for shard in servers.shards:
      ray.get(shard.join.remote(self.number, joined.incarnation))
    params, versions = self.model(joined.pulled, self.pulls(servers, joined.pulled.version))
    held = self.compute.held(params)
    number, first, ends = joined.number, joined.first, time.monotonic() + joined.round_ends
    flight: deque[tuple[Any, Any]] = deque()
    waited, received, since = 0.0, self.bytes, time.monotonic()
    while True:
      start = time.monotonic()
      local, loss, steps = self.piece(params, held, first, ends)
      computed = time.monotonic()
      payloads, held = self.compute.end(local, params, held, self.data[2], np.int32(number))
      payloads = jax.tree.map(np.asarray, payloads)
      now = time.monotonic()
      push = Push(self.number, joined.incarnation, number, first, steps, versions)
      spent = Spent(loss, computed - start, now - computed, waited, now - since, 0, received)
      since = now
      flight.append(self.push(servers, push, payloads, spent))
      number, first, waited, received = number + 1, first + steps, 0.0, 0
      if len(flight) < self.rules.lag:
        continue
      start = time.monotonic()
      answer, pulls = flight.popleft()
      reply: Any = ray.get(answer)
      if reply.kind == "stop":
        return
      if reply.kind not in ("counted", "late"):
        raise Gone
      if reply.kind == "late":  # the next piece gets the number of the late piece
        number, first = push.number, push.first
      if pulls is None:
        pulls = self.pulls(servers, reply.pulled.version)
      params, versions = self.model(reply.pulled, pulls)
      ends = time.monotonic() + self.config.round_seconds
      waited, received = time.monotonic() - start, self.bytes

  def piece(self, params: Any, held: Any, first: int, ends: float) -> tuple[Any, float, int]:
    """Runs a piece's local steps; returns the Local, the mean loss and the number of steps."""
    elastic, period = self.config.server_mode == "elastic", self.setup.job.method.local_steps
    if not elastic:
      with self.limping():
        found = self.compute.steps(params, held, *self.data, np.int32(first))
        local, loss = jax.block_until_ready(found)
      return local, float(loss), period
    local, total = self.compute.begin(params, held)
    steps = 0
    while steps == 0 or (steps < period and time.monotonic() < ends):
      with self.limping():
        found = self.compute.step(local, total, params, held, *self.data, np.int32(first + steps))
        local, total = jax.block_until_ready(found)
      steps += 1
    return local, float(total) / steps, steps

  @contextlib.contextmanager
  def limping(self) -> Iterator[None]:
    """Context manager that slows the enclosed code down by the factor in --slowdown."""
    start = time.monotonic()
    yield
    if self.slowdown > 1:
      time.sleep((self.slowdown - 1) * (time.monotonic() - start))

  def push(self, servers: Servers, push: Any, payloads: Sequence[Any], spent: Any) -> Any:
    """Stages a push on the other shards and sends it to the head.

    Returns:
      A future of the reply, and futures of the next pulls if the worker overlaps pulls and
      computation.

    Raises:
      Gone: if a shard refuses the push.
    """
    by_shard = [[payloads[leaf] for leaf in part] for part in self.setup.parts]
    stage = lambda: [
      shard.stage.remote(push, part)
      for shard, part in zip(servers.shards, by_shard[1:], strict=True)
    ]
    start = time.monotonic()
    for refusal in ray.get(self.patiently(servers, push, stage)):
      if refusal:
        ray.get(servers.head.deny.remote(*refusal))
        raise Gone
    waiting = spent.waiting + time.monotonic() - start
    told = spent._replace(waiting=waiting, sent=sum(x.nbytes for x in jax.tree.leaves(payloads)))
    answer = self.patiently(
      servers, push, lambda: servers.head.push.remote(push, by_shard[0], told)
    )
    pulls = None
    if self.rules.lag > 1:
      pulls = [shard.pull.remote(self.number) for shard in servers.shards]
    return answer, pulls

  def patiently(self, servers: Servers, push: Any, send: Any) -> Any:
    """Calls `send`; while the object store is full, reports the problem, waits and retries."""
    for pause in (0.1, 0.5, 2.0, 5.0):
      try:
        return send()
      except (ObjectStoreFullError, OutOfDiskError) as error:
        text = f"push {push.number} of worker {push.worker} waits: the object store is full"
        servers.head.deny.remote("object store", f"{text} ({type(error).__name__})")
        time.sleep(pause)
    return send()

  # ---- models

  def pulls(self, servers: Servers, version: int) -> list[Any]:
    """Pulls the other shards, each at `version` or later."""
    found: list[Any] = [None] * len(servers.shards)
    while any(shard is None for shard in found):
      for place, shard in enumerate(servers.shards):
        if found[place] is None:
          found[place] = ray.get(shard.pull.remote(self.number, version))
    return found

  def model(self, own: Any, pulls: Sequence[Any]) -> tuple[Any, tuple[int, ...]]:
    """Places the parameters on this worker's device; also returns each shard's version."""
    shards = [own, *(ray.get(x) if isinstance(x, ray.ObjectRef) else x for x in pulls)]
    leaves: list[Any] = [None] * len(self.setup.shapes)
    for part, pulled in zip(self.setup.parts, shards, strict=True):
      for leaf, value in zip(part, pulled.leaves, strict=True):
        leaves[leaf] = value
    return jax.device_put(self.treedef.unflatten(leaves)), tuple(x.version for x in shards)
