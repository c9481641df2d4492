"""Recomputes a server run from its trace: computes the same pieces of work in the same order.

A replay is sequential, and no push is lost. A replay computes each event's pushes with the
functions of `work.py` that the workers ran, and applies the pushes with the functions of the
shards.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core import blame
from research.core.base import Params
from research.server import events, store, work
from research.server import setup as setups
from research.server.events import Event, Push
from research.server.head import round_shares
from research.server.part import ShardState
from research.server.setup import Setup
from research.training import loop
from research.training.config import Config, UsageError, flag
from research.training.hooks.hook import Rounds
from research.training.hooks.log import Log
from research.training.plan import Plan
from research.training.reports import report
from research.training.run import BaseRun

TOLERANCE = 1e-5  # max |difference| / max |parameter|


class Replayed(BaseRun):
  """The servers and workers of a run, executed sequentially in one process.

  A dispatch consists of the updates of one row; their losses are recomputed.
  """

  def __init__(self, setup: Setup, params: Mapping[str, np.ndarray], happened: Iterable[Event]):
    """Starts from a run's initial parameters.

    Args:
      setup: the setup of the run.
      params: leaves by name.
      happened: the run's events, in order.
    """
    self.setup, apart, keys = setup, setup.apart, setup.keys
    self.happened, self.place = list(happened), 0
    self.period = setup.job.method.local_steps
    updates = sum(event.counted for event in self.happened)
    super().__init__(setup.config, Plan((setup.job,)), updates * self.period)
    self.worker = work.worker(setup.job, apart, keys)
    payloads = work.payload_shapes(apart.link, setup.shapes)
    self.parts = [
      ShardState(
        work.side(setup.job.method, keys, setup.shapes, leaves),
        setups.chosen(setup, shard, params),
        [payloads[leaf] for leaf in leaves],
        shard,
      )
      for shard, leaves in enumerate(setup.parts)
    ]
    self.treedef = jax.tree.structure(jax.eval_shape(setup.job.task.init, jax.random.key(0)))
    self.past = [{0: part.params} for part in self.parts]  # models by version, of each shard
    self.held: dict[int, tuple[int, work.WorkerState]] = {}  # incarnation and kept state, by worker
    self._last_uses = _last_uses(self.happened)

  def end(self, every: Sequence[int]) -> int:
    return super().end((self.config.log_every, *every))

  def advance(self, to: int) -> Rounds:
    """Replays the events up to the update at step `to`."""
    first, losses = self.step, []
    while self.step < to:
      losses += self._play(self.happened[self.place])
      self.place += 1
    self.metrics = {"loss": np.repeat(losses, self.period), "finite": True}
    return Rounds(first, self.step, self.metrics)

  def _play(self, event: Event) -> list[float]:
    """Replays an event; returns the loss of its update, or nothing if its push was not counted.

    Models that no later push was computed from are freed.
    """
    found = [self.computed(push) for push in event.pushes]
    losses = []
    if event.counted:
      weights = round_shares(self.setup.rules(""), event.pushes)
      pushes = [(push, payloads) for push, (payloads, _) in zip(event.pushes, found, strict=True)]
      for shard, part in enumerate(self.parts):
        self.apply(shard, part, pushes, weights)
      losses.append(float(np.dot(weights, [loss for _, loss in found])))
      self.step += self.period
    for shard, models in enumerate(self.past):
      now, last = self.parts[shard].version, self._last_uses
      for version in [v for v in models if v != now and last.get((shard, v), -1) <= self.place]:
        del models[version]
    return losses

  def computed(self, push: Push) -> tuple[list[Any], float]:
    """Computes the payloads and the loss of a push."""
    params = self.model(push.versions)
    incarnation, held = self.held.get(push.worker, (-1, None))
    if incarnation != push.incarnation or held is None:
      held = self.worker.held(params)
    examples, size = work.examples_of(self.setup.examples, self.setup.job.sizes, push.worker)
    data = (examples, size, np.int32(push.worker))
    own, at = np.int32(push.worker), np.int32(push.number)
    if self.setup.config.server_mode == "elastic":
      local, total = self.worker.begin(params, held)
      for step in range(push.steps):
        at_step = np.int32(push.first + step)
        local, total = self.worker.step(local, total, params, held, *data, at_step)
      loss = total / push.steps
    else:
      local, loss = self.worker.steps(params, held, *data, np.int32(push.first))
    payloads, held = self.worker.end(local, params, held, own, at)
    self.held[push.worker] = (push.incarnation, held)
    return jax.tree.map(np.asarray, payloads), float(loss)

  def model(self, versions: tuple[int, ...]) -> Params:
    """Assembles the model that a worker had pulled, given the version of each shard."""
    leaves: list[Any] = [None] * len(self.setup.shapes)
    names = list(self.setup.shapes)
    for shard, (part, version) in enumerate(zip(self.setup.parts, versions, strict=True)):
      for leaf in part:
        leaves[leaf] = self.past[shard][version][names[leaf]]
    return self.treedef.unflatten(leaves)

  def apply(
    self, shard: int, part: ShardState, pushes: list[tuple[Push, list[Any]]], weights: np.ndarray
  ) -> None:
    for push, payloads in pushes:
      version = push.versions[shard]
      part.join(push.worker, push.incarnation)
      part.pulled[push.worker].append((version, self.past[shard][version]))
      part.stage(push, [payloads[leaf] for leaf in self.setup.parts[shard]])
    part.apply([push for push, _ in pushes], weights.tolist())
    self.past[shard][part.version] = part.params

  def params(self) -> dict[str, np.ndarray]:
    """Returns the leaves of the model, by name."""
    found = {name: np.asarray(x) for part in self.parts for name, x in part.params.items()}
    return {name: found[name] for name in self.setup.shapes}


def _last_uses(happened: list[Event]) -> dict[tuple[int, int], int]:
  """Maps (shard, version) to the last event with a push that was computed from this version."""
  return {
    (shard, version): place
    for place, event in enumerate(happened)
    for push in event.pushes
    for shard, version in enumerate(push.versions)
  }


def distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
  """Computes max |a - b| / max |b| over all leaves."""
  top = max(float(np.abs(x).max()) for x in b.values())
  return max(float(np.abs(a[name] - b[name]).max()) for name in b) / max(top, 1e-30)


def replay(folder: Path, out: Path | None = None) -> dict[str, Any]:
  """Replays the run in a folder up to its newest checkpoint.

  Args:
    folder: the folder of the run.
    out: the folder in which `replay.json` is written; None means `folder`.

  Returns:
    The numbers of `updates` and `pushes`, the `distance` between the parameters, and the path of
    `replay.json`.

  Raises:
    UsageError: if the folder contains no run, or the run's trace is invalid.
  """
  with flag("replay", str(folder)):
    try:
      stored = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
      raise ValueError("holds no run") from None
    known = {name: value for name, value in stored.items() if name in Config.names()}
    config = Config(**known)
    if config.executor != "server":
      raise ValueError("is not a run with --executor=server")
    if config.server_mode == "hogwild":
      raise ValueError("is a run of hogwild, whose order of updates is not recorded")
    setup = setups.setup(config, needs_ray=False)
    with blame.of_libraries():
      head, happened = events.read(folder / events.FILE)
    names = list(setup.shapes)
    checkpoints = store.ShardStore(folder / "checkpoints", names, setup.parts)
    _, place = checkpoints.restore(None, report.note) or (0, None)
    if head.get("from"):
      raise ValueError(f"has a trace that starts only at update {head['from']}: shards changed")
    if place is None or head["shards"] != setup.parts:
      raise ValueError("has no checkpoint to compare with, or other shards in its trace")
  counted = sum(event.counted for event in happened)
  if counted < place.version:
    raise UsageError(f"--replay='{folder}': the trace has {counted} of {place.version} updates")
  part = list(events.until(happened, place.version))
  again = Replayed(setup, setups.initial(setup), part)
  with contextlib.closing(Log(again, str)) as log:
    for _ in loop.events(again, [log]):
      pass
  found = {
    "updates": place.version,
    "pushes": sum(len(event.pushes) for event in part),
    "distance": distance(again.params(), place.params),
  }
  goal = out or folder
  goal.mkdir(parents=True, exist_ok=True)
  report.write_json(goal / "replay.json", found)
  return found | {"written": str(goal / "replay.json")}


def table(found: Mapping[str, Any]) -> str:
  """Formats a replay's results as text, one number per line."""
  shown = {**found, "distance": f"{found['distance']:.3g} (at most {TOLERANCE:g})"}
  return "\n".join(f"{name:<10}{value}" for name, value in shown.items())
