"""The server's consistency protocol: which pushes form an update, and which workers wait.

    async    every push is an update
    ssp      as async, but no worker gets more than `bound` pieces of work ahead of the slowest
    sync     an update is the mean of one push of every worker, at the same version
    elastic  an update is the mean of the pushes that arrive before the round's deadline, weighted
             by steps; a late push is not counted, and its worker restarts from the current model

A push counts once, on all shards or on no shard. A push is staged on the other shards before the
head receives it. The push's number must follow the last number counted for its worker, and the
push's incarnation must be the worker's current incarnation. Waiting callers are suspended
coroutines. This module does not use the network.

Reference: Li et al. 2014, OSDI (parameter server); Ho et al. 2013, NeurIPS (stale synchronous).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from research.core.base import Tree
from research.server.events import Event, Push
from research.server.messages import Joined, Reply, Rules, Spent
from research.server.part import Refused, ShardState
from research.server.work import shares

DENIED = 20  # consecutive refusals per worker after which the run is aborted


class Head:
  """Orders the updates, holds one shard of the model, and collects the metrics of all workers."""

  def __init__(
    self,
    rules: Rules,
    part: ShardState,
    elsewhere: Callable[[Sequence[Push], Sequence[float]], None] = lambda pushes, shares: None,
    counted: Sequence[Sequence[int]] = (),
    now: Callable[[], float] = time.monotonic,
  ):
    """Starts from the counts of a checkpoint.

    Args:
      rules: the protocol's settings.
      part: the head's own shard.
      elsewhere: a function that makes the other shards apply an update, in the order of the calls.
      counted: for each worker, (incarnation, pieces counted, steps counted), from a checkpoint.
      now: a function that returns the time in seconds.
    """
    self.rules, self.part, self.now = rules, part, now
    self._elsewhere = elsewhere
    empty = [[0, 0, 0] for _ in range(rules.workers)]
    self.counted = [list(row) for row in counted] or empty
    self.alive: set[int] = set()
    self.waiting: dict[int, Push] = {}  # pushes of the current round
    self.reason = "steps" if part.version >= rules.updates else ""  # why the run is over
    self.since = 0.0  # time of the first join
    self._changed = asyncio.Condition()
    self._round_ends = self.now() + rules.seconds
    self._denied = 0
    # since the last report
    self.events: list[Event] = []
    self.losses: list[tuple[int, float, int, float]] = []  # version, loss, bytes, time
    self.notes: list[str] = []
    self.refused: Counter[str] = Counter()
    self.spent: list[tuple[int, Spent]] = []
    self._told: dict[int, Spent] = {}  # statistics of pushes not yet applied

  # ---- workers

  async def join(self, worker: int, code: str) -> Joined:
    """Registers a new incarnation of a worker; in `elastic`, the worker joins the current round."""
    if code != self.rules.code:
      text = f"worker {worker} has another model or other code ({code}, not {self.rules.code})"
      self._refuse("code", text)
      return Joined(0, 0, 0, 0.0, None, text)
    async with self._changed:
      row = self.counted[worker]
      row[0] += 1
      self.since = self.since or time.time()
      self.waiting.pop(worker, None)
      self.part.join(worker, row[0])
      if not self.alive:
        self._round_ends = self.now() + self.rules.seconds
      self.alive.add(worker)
      self._changed.notify_all()
      await self._changed.wait_for(lambda: self._may_start(worker, row[1] + self.rules.lag - 1))
    pulled = self.part.pull(worker)
    return Joined(row[0], row[1], row[2], self._left(), pulled)

  async def leave(self, worker: int) -> None:
    """Removes a worker whose process has ended."""
    async with self._changed:
      self.alive.discard(worker)
      if self.rules.mode == "elastic":
        self._close_round()
      self._changed.notify_all()

  async def push(self, push: Push, payloads: Sequence[Tree], spent: Spent) -> Reply:
    """Counts a push; replies with the model once the worker may continue."""
    async with self._changed:
      if (
        self.rules.lag > 1 and push.worker < self.rules.workers
      ):  # this push may have overtaken the previous one
        await self._changed.wait_for(lambda: self.reason or not self._is_early(push))
      kind = self._take(push, payloads, spent)
      self._changed.notify_all()
      if kind.kind not in ("counted", "late"):
        return kind
      if self.rules.mode in ("sync", "elastic") and kind.kind == "counted":
        await self._round(push)
      else:
        ahead = push.number + self.rules.lag
        await self._changed.wait_for(lambda: self._may_start(push.worker, ahead))
    if self.reason:
      return Reply("stop", self.reason)
    if self.counted[push.worker][0] != push.incarnation:
      return Reply("rejoin", "another process has taken its place")
    pulled = self.part.pull(push.worker)
    return kind._replace(pulled=pulled)

  async def deny(self, kind: str, text: str) -> None:
    """Records that another shard refused a push, or that a worker waits to send a push."""
    async with self._changed:
      self._refuse(kind, text)
      self._denied -= kind == "object store"
      self._changed.notify_all()

  async def stop(self, reason: str) -> None:
    async with self._changed:
      self.reason = self.reason or reason
      self._changed.notify_all()

  # ---- counting

  def _is_early(self, push: Push) -> bool:
    return self.counted[push.worker][:2] == [push.incarnation, push.number - 1]

  def _take(self, push: Push, payloads: Sequence[Tree], spent: Spent) -> Reply:
    if self.reason:
      return Reply("stop", self.reason)
    if not 0 <= push.worker < self.rules.workers:
      self._refuse("order", f"push of worker {push.worker}: there are {self.rules.workers}")
      return Reply("refused", self.notes[-1])
    incarnation, number, first = self.counted[push.worker]
    if push.incarnation != incarnation:
      return Reply("rejoin", f"incarnation {push.incarnation} of worker {push.worker} is over")
    try:
      if (push.number, push.first) != (number, first) or push.worker in self.waiting:
        where = f"({push.number}, {push.first}), not ({number}, {first})"
        text = f"push {where} of worker {push.worker} is counted already or out of order"
        raise Refused("order", text)
      self.part.stage(push, payloads)
      in_rounds = self.rules.mode in ("sync", "elastic")
      if in_rounds and any(version != self.part.version for version in push.versions):
        self.part.drop(push)
        if self.rules.mode == "elastic":
          return self._late(push)
        text = f"computed with versions {list(push.versions)}, the round is {self.part.version}"
        raise Refused("version", f"push {number} of worker {push.worker}: {text}")
    except Refused as error:
      self._refuse(error.kind, str(error))
      return Reply("refused", str(error))
    self._denied = 0
    self._account(push, spent)
    if self.rules.mode in ("sync", "elastic"):
      self.waiting[push.worker] = push
      self._close_round()
    else:
      self._update((push,), (1.0,))
    return Reply("counted")

  def _account(self, push: Push, spent: Spent) -> None:
    self._told[push.worker] = spent
    self.spent.append((push.worker, spent))

  def _late(self, push: Push) -> Reply:
    """Records an uncounted push for replays, because the push changed the worker's own state."""
    self.refused["late"] += 1
    self.events.append(Event(self.part.version, (push,), counted=False))
    return Reply("late", f"round {push.versions[0]} was over")

  def _refuse(self, kind: str, text: str) -> None:
    self.refused[kind] += 1
    self.notes.append(f"refused: {text}")
    self._denied += 1
    if self._denied >= DENIED * self.rules.workers:
      self.reason = self.reason or f"refused: {text}"

  def _update(self, pushes: tuple[Push, ...], weights: Sequence[float]) -> None:
    """Applies an update on all shards; the order of these calls is the same on every shard."""
    self.events.append(Event(self.part.version, pushes))
    for push in pushes:
      row = self.counted[push.worker]
      row[1], row[2] = push.number + 1, push.first + push.steps
    self.part.apply(pushes, weights)
    self._elsewhere(pushes, weights)
    told = [self._told[push.worker] for push in pushes]
    loss = sum(w * spent.loss for w, spent in zip(weights, told, strict=True))
    moved = sum(spent.sent + spent.received for spent in told)
    self.losses.append((self.part.version, float(loss), moved, time.time()))
    if self.part.version >= self.rules.updates:
      self.reason = self.reason or "steps"

  # ---- waiting

  def _may_start(self, worker: int, number: int) -> bool:
    """Returns whether a worker may start its piece of work `number`."""
    if self.reason or self.rules.mode != "ssp":
      return True
    rows = self.counted[: self.rules.workers]  # an earlier run may have had more workers
    others = [row[1] for other, row in enumerate(rows) if other != worker]
    return number - min(others, default=number) <= self.rules.bound

  def _close_round(self) -> None:
    """Makes the round's update if all expected pushes have arrived or the round's time is over."""
    everybody = range(self.rules.workers) if self.rules.mode == "sync" else self.alive
    over = self.rules.mode == "elastic" and self.now() >= self._round_ends + self.rules.seconds
    if not self.waiting or not (over or set(everybody) <= set(self.waiting)):
      return
    pushes = tuple(self.waiting[worker] for worker in sorted(self.waiting))
    self.waiting = {}
    self._update(pushes, round_shares(self.rules, pushes))
    self._round_ends = self.now() + self.rules.seconds

  async def _round(self, push: Push) -> None:
    """Waits for the end of a push's round, which a straggler can extend by one more period T."""
    is_over = lambda: self.reason != "" or self.waiting.get(push.worker) != push
    while not is_over():
      left = None
      if self.rules.mode == "elastic":
        left = max(0.0, self._left() + self.rules.seconds) + 1e-3
      try:
        await asyncio.wait_for(self._changed.wait(), left)
      except TimeoutError:
        self._close_round()
        self._changed.notify_all()

  def _left(self) -> float:
    return self._round_ends - self.now()

  # ---- reports

  def report(self) -> dict[str, Any]:
    """Returns the records since the last report, and deletes these records."""
    found = {
      "version": self.part.version,
      "events": self.events,
      "losses": self.losses,
      "notes": self.notes,
      "reason": self.reason,
      "since": self.since,
      "refused": dict(self.refused),
      "spent": self.spent,
    }
    self.events, self.losses, self.notes, self.spent = [], [], [], []
    self.refused.clear()
    return found


def round_shares(rules: Rules, pushes: Sequence[Push]) -> Any:
  """Weights a round's pushes by the workers' examples or, in `elastic`, by the completed steps."""
  if rules.mode == "sync":
    return shares([rules.weights[push.worker] for push in pushes])
  return shares([push.steps for push in pushes])
