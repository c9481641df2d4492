"""Drives a server run: starts and restarts processes, polls the head and takes snapshots."""

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.server import cluster, events
from research.server import setup as setups
from research.server.actors import HeadProcess, Shard, Sizes, Snapshot, WorkerProcess, inherited
from research.server.hogwild import HogwildRun
from research.server.polled import Polled
from research.server.setup import Setup
from research.training import fingerprint, loop
from research.training import folder as folders
from research.training.config import Config, UsageError
from research.training.hooks import heartbeat
from research.training.hooks.finite import NonFinite
from research.training.hooks.hook import Event, FunctionHook, Hook, Rewound
from research.training.reports import figures, report
from research.training.reports.timing import Timing
from research.training.run import BaseRun

_POLL = 0.1  # seconds between two polls of the head


def train(
  config: Config, hooks: Sequence[Hook | Callable[[BaseRun, Event], str | None]] = ()
) -> tuple[dict[str, Any], Path]:
  """Starts or resumes the run that the flags describe; the `loop.train` of --executor=server.

  Args:
    config: the run's flags.
    hooks: see `research.train`.

  Returns:
    The summary, and the folder of the run.

  Raises:
    UsageError: if a flag is invalid, or all workers are refused.
    CheckpointError: if the run has checkpoints, but none is intact.
    NonFinite: if the loss is not finite, or pushes are refused because they are not finite.
    SaveError: if a checkpoint cannot be written.
  """
  heartbeat.announce()
  with contextlib.ExitStack() as stack:
    timing = stack.enter_context(Timing())
    folder = folders.check(config)
    made = setups.setup(config)
    steps = made.updates * made.job.method.local_steps
    made_of = functools.partial(fingerprint.of_specs, made.job.task, made.job.method)
    folders.check_prints(config, folder, made_of)
    if summary := folders.finished(config, folder, steps, made_of):
      figures.show_again(folder, summary)
      return summary, folder
    stack.enter_context(folders.claimed(config, folder))
    folders.describe(config, folder, made_of)
    if config.server_mode == "hogwild":
      run: Polled = HogwildRun(made, folder, timing)
    else:
      size = sum(x.size * x.dtype.itemsize for x in made.shapes.values())
      ray = stack.enter_context(cluster.running(config, made.workers + config.shards, size))
      run = ServerRun(made, folder, timing, ray)
    stack.callback(run.close)
    own = loop.Hooks(run, stack, run.store, folder=folder)  # after Ray has set its signal handlers
    run.start(own.log.last)
    user = [hook if isinstance(hook, Hook) else FunctionHook(hook) for hook in hooks]
    for _ in loop.events(run, (*user, *own.all)):
      pass
    summary = run.summary(own.evaluate)
    figures.write_result(folder, summary)
  return summary, folder


class ServerRun(Polled):
  """One run of servers and workers on Ray."""

  def __init__(self, setup: Setup, folder: Path, timing: Timing, ray: Any):
    super().__init__(setup, folder, timing)
    self._ray = ray
    self.deaths = Counter(workers=0, servers=0)
    self.events = []
    self.trace: events.Trace | None = None
    self.workers: dict[Any, int] = {}  # maps a worker's `run` future to the worker's number
    self.handles: dict[int, Any] = {}
    self.servers: list[Any] = []
    self.pids: dict[str, Any] = {"driver": os.getpid()}
    self.gone: list[str] = []  # refusals of workers

  def start(self, last: Mapping[str, Any] | None) -> None:
    super().start(last)
    self._options = cluster.accelerators(self._ray, self.setup.workers)
    self._start_servers()
    for number in range(self.setup.workers):
      self._start_worker(number)

  def close(self) -> None:
    if self.trace:
      self.trace.close()

  def advance(self, to: int) -> Event:
    """Processes the head's report and takes a snapshot if the run has reached step `to`."""
    time.sleep(_POLL)
    try:
      event = self._follow(to)
    except self._ray.exceptions.RayActorError as error:
      event = self._restart_servers(error)
    if not self.reason:
      self._look_at_workers()
    return event

  def _follow(self, to: int) -> Event:
    head, *shards = self.servers
    pids = [shard.pid.remote() for shard in shards]
    self.pids["shards"] = self._ray.get(pids)  # fails if a shard is dead
    if self._told:
      self._ray.get(head.stop.remote(self._told))
    over = self._take_in(self._ray.get(head.report.remote()))
    if over.startswith("refused"):
      raise NonFinite(f"{over}; {self.kept()}") if "finite" in over else UsageError(over)
    whole = over != "" or self._newest >= to
    if whole:
      self.state = self._snapshot()
    self.reason = over
    return self._event(whole)

  def _take_in(self, found: dict[str, Any]) -> str:
    """Adds the contents of a report; returns the reason why the run is over, or ''."""
    assert self.trace
    self.trace.write(found["events"])
    self.events += found["events"]
    for note in found["notes"][:5]:
      report.note(note)
    self.refused.update(found["refused"])
    if self.started is None and found["since"]:
      self.started = self._ago(found["since"])
    for worker, spent in found["spent"]:
      self.spent[worker] += (*spent[1:], 1)
    for version, loss, moved, then in found["losses"]:
      self._add(version * self.period, loss, moved, then)
    pids = self.pids | {"head": found["pid"], "workers": found["pids"]}
    if pids != self.pids:
      self.pids = pids
      report.write_json(self.folder / "processes.json", pids)
    return found["reason"]

  def _snapshot(self) -> Snapshot:
    """Returns the state of all shards and the counts, at one version."""
    found, own, counted, others = self._ray.get(self.servers[0].snapshot.remote())
    self._take_in(found)
    parts = [own, *self._ray.get(others)]
    assert len({version for version, _, _ in parts}) == 1, "a snapshot is of one version"
    leaves = {name: x for _, params, _ in parts for name, x in params.items()}
    params = {name: leaves[name] for name in self.setup.shapes}
    states = {number: state for number, (_, _, state) in enumerate(parts)}
    return Snapshot(own[0], params, states, counted)

  # ---- processes

  def _start_servers(self) -> None:
    """Starts the head and all shards from `state`, and the trace from the version of `state`."""
    setup, config = self.setup, self.config
    self.trace = events.Trace(self.folder, setup.parts, self.state.version)
    self.events = list(self.trace.kept)
    empty = [[0, 0, 0] for _ in range(setup.workers)]
    counted = self.state.counted + empty[len(self.state.counted) :]
    place = self.state._replace(counted=counted)
    leaves = [(name, x.shape, str(x.dtype)) for name, x in setup.shapes.items()]
    sizes, given = Sizes(leaves, setup.parts), inherited()
    of = (config.method, config.seed, sizes)
    remote = lambda kind, name: self._ray.remote(kind).options(name=name, num_cpus=1)
    shards = [
      _named(remote(Shard, f"shard-{number}"), *of, number, place, given)
      for number in range(1, config.shards)
    ]
    rules = setup.rules(setups.code_of(setup))
    head = _named(remote(HeadProcess, "head"), rules, *of, place, shards, given)
    self.servers = [head, *shards]

  def _start_worker(self, number: int) -> None:
    options = self._options[number]
    platform = "" if options else "cpu"
    kind = self._ray.remote(WorkerProcess)
    kind = kind.options(num_cpus=1, scheduling_strategy="SPREAD", **options)
    handle = kind.remote(self.config, number, platform, inherited())
    self.handles[number] = handle
    self.workers[handle.run.remote()] = number

  def _restart_servers(self, error: Exception) -> Rewound:
    """Restarts all servers from the newest checkpoint after one died; later updates are lost."""
    self._died("servers", f"a server process has died: {' '.join(str(error).split())[:200]}")
    for server in self.servers:
      self._ray.kill(server)
    initial = 0, Snapshot(0, setups.initial(self.setup), None, [])
    self.step, self.state = self.store.restore(self.state, report.note) or initial
    report.note(f"the servers start again at step {self.step}")
    self._updates = []
    self.close()
    self._start_servers()
    return Rewound(self.step)

  def _look_at_workers(self) -> None:
    """Restarts dead workers, except those that were refused."""
    ray, runs = self._ray, list(self.workers)
    done = ray.wait(runs, num_returns=len(runs), timeout=0)[0] if runs else []
    for run in done:
      number = self.workers.pop(run)
      try:
        refused = ray.get(run)
      except ray.exceptions.RayActorError:
        self._died("workers", f"worker {number} has died")
        with contextlib.suppress(ray.exceptions.RayActorError):
          ray.get(self.servers[0].leave.remote(number))
        ray.kill(self.handles[number])  # the worker may be alive but unreachable
        self._start_worker(number)
        continue
      except ray.exceptions.RayTaskError as error:
        cause = " ".join(str(error.cause).split())[:200]
        raise UsageError(
          f"worker {number} has failed: {type(error.cause).__name__}: {cause}"
        ) from error
      if refused:
        self.gone.append(refused)
        report.note(refused)
      else:  # servers that have since died stopped the worker
        self._start_worker(number)
    all_are_needed = self.config.server_mode in ("sync", "ssp")
    if self.gone and (all_are_needed or not self.workers):
      raise UsageError(f"all workers must take part: {self.gone[-1]}")


def _named(kind: Any, *args: Any) -> Any:
  """Starts a named actor; waits until the previous actor of that name is gone."""
  for _ in range(100):
    try:
      return kind.remote(*args)
    except ValueError as error:
      if "already" not in str(error):
        raise
      time.sleep(0.1)
  return kind.remote(*args)
