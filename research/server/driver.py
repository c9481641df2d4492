"""The driver of a server run: starts processes, polls the head, measures, saves and restarts."""

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import Any

from research.server import cluster, events, hogwild, store
from research.server import setup as setups
from research.server.actors import HeadProcess, Shard, Sizes, Snapshot, WorkerProcess, inherited
from research.server.measure import Measured, digest
from research.server.setup import Setup
from research.training import fingerprint
from research.training import folder as folders
from research.training.config import Config, UsageError
from research.training.hooks import heartbeat, signals
from research.training.hooks.finite import NonFinite
from research.training.reports import figures, report
from research.training.reports.timing import Timing

_POLL = 0.1  # seconds between two polls of the head


def train(config: Config) -> tuple[dict[str, Any], Path]:
  """Starts or resumes the run that the flags describe: `loop.train` for --executor=server.

  Args:
    config: the run's flags.

  Returns:
    The summary, and the folder of the run.

  Raises:
    UsageError: for invalid flags, or if all workers are refused.
    CheckpointError: if the run has checkpoints and none is intact.
    NonFinite: if the loss is not finite, or pushes are refused as not finite.
    SaveError: if a checkpoint cannot be written.
  """
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
      run = stack.enter_context(contextlib.closing(hogwild.HogwildRun(made, folder, timing)))
      return _written(run.train(), folder)
    run = stack.enter_context(contextlib.closing(ServedRun(made, folder, timing)))
    size = sum(x.size * x.dtype.itemsize for x in made.shapes.values())
    with cluster.running(config, made.workers + config.shards, size) as ray:
      summary = run.train(ray)
    return _written(summary, folder)


def _written(summary: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path]:
  figures.write_result(folder, summary)
  return summary, folder


class ServedRun:
  """One run, from its start or its newest checkpoint to its end."""

  def __init__(self, setup: Setup, folder: Path, timing: Timing):
    self.setup, self.config, self.folder, self.timing = setup, setup.config, folder, timing
    self.period = setup.job.method.local_steps
    names = list(setup.shapes)
    self.checkpoints = folder / "checkpoints"
    found = store.restore(self.checkpoints, names, setup.parts, report.note)
    if found:
      report.note(f"resuming at step {found.version * self.period}")
    empty = [[0, 0, 0] for _ in range(setup.workers)]
    self.saved = found or Snapshot(0, setups.initial(setup), None, empty)
    counted = self.saved.counted + empty[len(self.saved.counted) :]
    self.saved = self.saved._replace(counted=counted)
    self.version, self.saved_at = self.saved.version, timing.elapsed()
    self.trace = events.Trace(folder, setup.parts, self.version)
    self.events = list(self.trace.kept)
    self.measured = Measured(setup, folder, self.version, timing)
    self.workers: dict[Any, int] = {}  # a worker's `run` future -> its number
    self.handles: dict[int, Any] = {}
    self.servers: list[Any] = []
    self.deaths = {"workers": 0, "servers": 0}
    self.pids: dict[str, Any] = {"driver": os.getpid()}
    self.gone: list[str] = []  # refusals of workers

  def close(self) -> None:
    self.trace.close()
    self.measured.close()

  # ---- processes

  def start_servers(self, ray: Any) -> None:
    """Starts the head and all shards from the newest checkpoint."""
    setup, config = self.setup, self.config
    leaves = [(name, x.shape, str(x.dtype)) for name, x in setup.shapes.items()]
    sizes, given = Sizes(leaves, setup.parts), inherited()
    of = (config.method, config.seed, sizes)
    remote = lambda kind, name: ray.remote(kind).options(name=name, num_cpus=1)
    shards = [
      _named(remote(Shard, f"shard-{number}"), *of, number, self.saved, given)
      for number in range(1, config.shards)
    ]
    rules = setup.rules(setups.code_of(setup))
    head = _named(remote(HeadProcess, "head"), rules, *of, self.saved, shards, given)
    self.servers = [head, *shards]

  def start_worker(self, ray: Any, number: int) -> None:
    options = self.given[number]
    platform = "" if options else "cpu"
    kind = ray.remote(WorkerProcess).options(num_cpus=1, scheduling_strategy="SPREAD", **options)
    handle = kind.remote(self.config, number, platform, inherited())
    self.handles[number] = handle
    self.workers[handle.run.remote()] = number

  def restart_servers(self, ray: Any, error: Exception) -> None:
    """Restarts all servers from the newest checkpoint after one died; later updates are lost."""
    self._died("servers", f"a server process has died: {' '.join(str(error).split())[:200]}")
    for server in self.servers:
      ray.kill(server)
    report.note(f"the servers start again at step {self.saved.version * self.period}")
    self.version = self.saved.version
    self.trace.close()
    self.trace = events.Trace(self.folder, self.setup.parts, self.version)
    self.events = list(events.until(self.events, self.version))
    self.measured.rewind(self.version)
    self.start_servers(ray)

  def _died(self, kind: str, text: str) -> None:
    report.note(text)
    self.deaths[kind] += 1
    if sum(self.deaths.values()) > self.config.restarts:
      raise UsageError(f"--restarts={self.config.restarts}: {text}, once more than that")

  def _look_at_workers(self, ray: Any) -> None:
    """Restarts dead workers; refused ones are left out."""
    runs = list(self.workers)
    done = ray.wait(runs, num_returns=len(runs), timeout=0)[0] if runs else []
    for run in done:
      number = self.workers.pop(run)
      try:
        refused = ray.get(run)
      except ray.exceptions.RayActorError:
        self._died("workers", f"worker {number} has died")
        with contextlib.suppress(ray.exceptions.RayActorError):
          ray.get(self.servers[0].leave.remote(number))
        ray.kill(self.handles[number])  # it may only be unreachable
        self.start_worker(ray, number)
        continue
      except ray.exceptions.RayTaskError as error:
        cause = " ".join(str(error.cause).split())[:200]
        raise UsageError(
          f"worker {number} has failed: {type(error.cause).__name__}: {cause}"
        ) from error
      if refused:
        self.gone.append(refused)
        report.note(refused)
      else:  # stopped by servers that have since died
        self.start_worker(ray, number)
    all_are_needed = self.config.server_mode in ("sync", "ssp")
    if self.gone and (all_are_needed or not self.workers):
      raise UsageError(f"no worker may be missing: {self.gone[-1]}")

  # ---- the run

  def train(self, ray: Any) -> dict[str, Any]:
    """Runs until the updates are done or a signal stops the run."""
    self.given = cluster.accelerators(ray, self.setup.workers)
    self.start_servers(ray)
    for number in range(self.setup.workers):
      self.start_worker(ray, number)
    told = ""
    with signals.watch() as stopped:
      while True:
        try:
          reason = self._follow(ray, told)
        except ray.exceptions.RayActorError as error:
          self.restart_servers(ray, error)
          continue
        if reason:
          break
        told = told or stopped()
        self._look_at_workers(ray)
        time.sleep(_POLL)
      return self._summary(reason)

  def _follow(self, ray: Any, told: str) -> str:
    """Processes a report, evaluates and saves if due; returns why the run ended, or ''."""
    head, *shards = self.servers
    self.pids["shards"] = ray.get([shard.pid.remote() for shard in shards])  # fails if one is dead
    if told:
      ray.get(head.stop.remote(told))
    found = ray.get(head.report.remote())
    self._take_in(found)
    over = found["reason"]
    if over.startswith("refused"):
      raise NonFinite(f"{over}; {self._kept()}") if "finite" in over else UsageError(over)
    due = self._due(self.config.checkpoint_every, self.saved.version)
    save = over or (due and self.timing.elapsed() - self.saved_at >= self.config.checkpoint_seconds)
    evaluate = self._due(self.config.eval_every, self.measured.evaluated_at)
    if not (save or evaluate) or self.version == self.saved.version:
      return over
    place = self._snapshot(ray)
    with self.timing.aside():
      if evaluate or over == "steps":
        self.measured.evaluate(place.version, place.params, self._kept())
      if save:
        store.save(self.checkpoints, place, self.setup.parts)
        self.saved, self.saved_at = place, self.timing.elapsed()
    return over

  def _take_in(self, found: dict[str, Any]) -> None:
    self.version = found["version"]
    self.trace.write(found["events"])
    self.events += found["events"]
    for note in found["notes"][:5]:
      report.note(note)
    self.measured.take_in(found)
    if found["events"]:
      heartbeat.beat()
    pids = self.pids | {"head": found["pid"], "workers": found["pids"]}
    if pids != self.pids:
      self.pids = pids
      report.write_json(self.folder / "processes.json", pids)

  def _snapshot(self, ray: Any) -> Snapshot:
    """All shards and counts at one version."""
    found, own, counted, others = ray.get(self.servers[0].snapshot.remote())
    self._take_in(found)
    parts = [own, *ray.get(others)]
    assert len({version for version, _, _ in parts}) == 1, "a snapshot is of one version"
    leaves = {name: x for _, params, _ in parts for name, x in params.items()}
    params = {name: leaves[name] for name in self.setup.shapes}
    states = {number: state for number, (_, _, state) in enumerate(parts)}
    return Snapshot(own[0], params, states, counted)

  def _due(self, every: int, last: int) -> bool:
    return every > 0 and self.version * self.period // every > last * self.period // every

  def _kept(self) -> str:
    step = self.saved.version * self.period
    return f"checkpoint {step} is kept" if step else "no checkpoint was saved yet"

  def _summary(self, reason: str) -> dict[str, Any]:
    if not self.measured.found or self.measured.evaluated_at != self.saved.version:
      self.measured.evaluate(self.saved.version, self.saved.params, self._kept())
    return self.measured.summary(reason, self.saved.version, self.events, self.deaths) | {
      "params_sha256": digest(self.saved.params)
    }


def _named(kind: Any, *args: Any) -> Any:
  """Starts a named actor, waiting until the previous one of that name is gone."""
  for _ in range(100):
    try:
      return kind.remote(*args)
    except ValueError as error:
      if "already" not in str(error):
        raise
      time.sleep(0.1)
  return kind.remote(*args)
