"""The training loop: job, state, rounds, evaluation, checkpoints, in the order of the run."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.analysis import wire
from research.comm.mesh import worker_axes
from research.core.base import Array, Params
from research.core.task import TrainState
from research.parallel import resize, sharded, workers
from research.training import folder as folders
from research.training import heartbeat, interrupt, metrics, reach
from research.training.assemble import Problem, assemble, check
from research.training.checkpoint.checkpoint import Checkpoints
from research.training.config import Config, UsageError
from research.training.feed import Training
from research.training.network import Network
from research.training.plan import Sent
from research.training.reports import figures, report
from research.training.reports.facts import facts
from research.training.reports.timing import Timing


class NonFinite(Exception):
  """The loss or the state of a run is no longer finite."""


class ReplicasDiffer(Exception):
  """Copies of what should be equal on all devices are not."""


def train(config: Config) -> tuple[dict[str, Any], Path]:
  """Runs, or goes on with, what the flags describe.

  Returns:
    The contents of summary.json, and the run's folder.

  Raises:
    UsageError: for flags that cannot be.
    CheckpointError: if the run has checkpoints and none is whole.
    NonFinite: names the steps; the last good checkpoint stays.
    ReplicasDiffer: names the step and the leaves.
  """
  main = jax.process_index() == 0
  wide = config.x64 or bool(jax.config.read("jax_enable_x64"))
  with contextlib.closing(Timing()) as timing, jax.enable_x64(wide):
    _same_everywhere(config)
    with together():
      setting = check(config)
      folder = folders.check(config)
      problem = assemble(config, setting)
      summary = folders.finished(config, folder, problem.steps)
    if summary:
      if main:
        figures.show_again(folder, summary)
      return summary, folder
    with contextlib.ExitStack() as stack:
      with together():
        if main:
          stack.enter_context(folders.claimed(config, folder))
      run = Run(config, problem, folder, timing, main)
      stack.callback(run.close)
      if main:
        folders.describe(config, folder)
      summary = run.train()
      if main:
        figures.write_result(folder, summary)
  return summary, folder


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A mistake that one process sees stops all of them, before any waits for it."""
  try:
    yield
  except UsageError:
    interrupt.all_well(False)
    raise
  if not interrupt.all_well(True):
    raise UsageError("another process of the job was given what cannot be; its message says what")


def _same_everywhere(config: Config) -> None:
  """Refuses a job whose processes were given different flags, before they wait for one another."""
  if not interrupt.same_everywhere(json.dumps(folders.identity(config))):
    raise UsageError("the processes of the job were given different flags")


class Pending(NamedTuple):
  """A dispatch under way, whose metrics the host fetches only after it has started the next."""

  first: int  # steps before it
  last: int  # steps after it
  metrics: Mapping[str, Array]


class Run:
  """One run, from its start or its newest checkpoint to its end, in this process."""

  def __init__(self, config: Config, problem: Problem, folder: Path, timing: Timing, main: bool):
    self.config, self.problem, self.folder, self.timing = config, problem, folder, timing
    job, executor = problem.job, problem.executor
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    self.layout = executor.layout
    self.state: TrainState = executor.init(init_key)
    without = jax.config.values["jax_disable_jit"]  # whose steps all begin on the host
    self.transfers = "allow" if without else "disallow"
    self.evaluated_on = "test" if problem.test else "train"
    self.progress = report.Progress(problem.steps, self.evaluated_on, main)
    self.checkpoints = Checkpoints(
      folder.resolve() / "checkpoints",
      self.state,
      resize.placed(job, self.layout.state, self.state),
    )
    self.data = executor.place(problem.examples, problem.sizes, data_key)
    self.training = Training(config, job, self.data)
    self.test = executor.place(*problem.test, data_key) if problem.test else None
    shared = job.batch_size if len(job.axes) > len(worker_axes(job.axes)) else None
    self.evaluate = metrics.evaluator(job.task, self.data.sizes.sharding.mesh, shared or 1)
    self.measure = jax.jit(job.task.measure)
    self.pending: Pending | None = None
    self.initial = self._initial()
    self.step = self._restore()
    self.differing = metrics.replica_check(self.state)
    self.sent = Sent(problem.plan, self.layout, problem.steps)
    self.facts = facts(config, job, self.layout)
    self.reaches = reach.reaches(self.layout.state_shapes)
    if job.order is not None:
      report.note("a server's pushes and pulls are no collectives: their bytes are not counted")
    if self.facts.note:
      report.note(self.facts.note)
    for name, reached in self.reaches.items():
      report.note(reach.describe(name, reached))
    self.network = Network(main)
    self.log = report.Metrics(folder, self.step, config.tensorboard) if main else None
    self.timing.resume(self.log.last["seconds"] if self.log and self.log.last else 0.0)
    self.dispatches = 0
    self.evaluated: dict[str, Any] = {}

  def close(self) -> None:
    with contextlib.ExitStack() as stack:  # each is closed, whatever the others raise
      stack.callback(self.progress.close)
      stack.callback(self.checkpoints.close)
      if self.log:
        stack.callback(self.log.close)

  def train(self) -> dict[str, Any]:
    """Rounds until the steps are done, the run has converged, or somebody stops it."""
    config, plan = self.config, self.problem.plan
    reason = "steps"
    self.progress.start(self.step)
    with interrupt.watch() as stopped:
      while self.step < self.problem.steps:
        before, self.step = self.step, self._next_stop()
        data = self.training.of(before, self.step)
        counted = self.network.over(before, self.step, lambda: self.state)
        with counted, self._profiled(), jax.transfer_guard(self.transfers):
          rounds = round(plan.rounds(self.step) - plan.rounds(before))
          executor = self.problem.executors[plan.stage(before)]
          self.state, found = executor.run(self.state, data, rounds=rounds)
        if self.step < self.problem.steps:
          self.training.ahead(self.step, self._next_stop())
        self._fetch()
        self.pending = Pending(before, self.step, found)
        if self._due(before, config.check_every):
          self._check_replicas()
        if self._due(before, config.eval_every) and self._converged(self._evaluate()):
          reason = "converged"
          break
        last = self.step == self.problem.steps  # evaluated first, so that its row says so
        if not last and self._due(before, config.checkpoint_every) and self._old_enough():
          self._save()
        told = stopped()
        if told and self.step < self.problem.steps:
          reason = told
          break
      return self._finish(reason)

  def _finish(self, reason: str) -> dict[str, Any]:
    """Evaluates, checks and saves; saves first if stopped, since who stops a run may not wait."""
    if reason in ("steps", "converged"):
      if self.evaluated.get("step") != self.step and self._converged(self._evaluate()):
        reason = "converged"
      self._check_replicas()
    if self.checkpoints.latest() != self.step:
      self._save()
    self.checkpoints.wait()
    if self.evaluated.get("step") != self.step:
      self._evaluate()
    if self.config.profile and self.dispatches < 2:
      report.note("--profile: the run had no second dispatch to trace")
    return self._summary(reason)

  # ---- when

  def _next_stop(self) -> int:
    """The next step at which the host has something to do, a whole number of rounds from zero.

    A function of absolute steps, so that a resumed run is cut where an unbroken one is.
    """
    config, plan = self.config, self.problem.plan
    every = (config.eval_every, config.checkpoint_every, config.check_every)
    stops = [(self.step // n + 1) * n for n in (*every, config.steps_per_dispatch) if n > 0]
    stops = [self.problem.steps, plan.next_stage(self.step) or self.problem.steps, *stops]
    return min(plan.end(min(stops)), self.problem.steps)

  def _due(self, before: int, every: int) -> bool:
    return every > 0 and self.step // every > before // every

  def _old_enough(self) -> bool:
    """Whether the last save is long enough ago, by the clock of the first process."""
    seconds = self.timing.elapsed() - self.checkpoints.saved_at
    return interrupt.of_first_process(seconds >= self.config.checkpoint_seconds)

  def _converged(self, row: dict[str, Any]) -> bool:
    return "gradient_norm" in row and row["gradient_norm"] < self.config.tolerance

  # ---- what

  def _fetch(self, **evaluated: Any) -> None:
    """Takes the pending dispatch's metrics to the host and writes its rows."""
    if self.pending is None:
      return
    (first, last, found), self.pending = self.pending, None
    found = jax.device_get(found)
    self.timing.dispatch_done(last - first)
    bad = first + 1 + np.flatnonzero(~np.isfinite(found["loss"]))
    if bad.size:
      shown = ", ".join(map(str, bad[:5])) + (f" and {bad.size - 5} more" if bad.size > 5 else "")
      raise NonFinite(f"the loss is not finite at step {shown}; {self._kept()}")
    if not found["finite"]:
      steps = f"{first + 1} to {last}"
      raise NonFinite(f"the state became non-finite in one of the steps {steps}; {self._kept()}")
    rows = self._rows(first, last, found["loss"])
    rows[-1] |= self.network.row(last) | evaluated
    heartbeat.beat()
    if self.log:
      self.log.write(rows)
    self.progress.update(rows[-1])

  def _rows(self, first: int, last: int, losses: np.ndarray) -> list[dict[str, Any]]:
    """Rows at the multiples of log_every and at the end: the mean loss since the row before."""
    every = self.config.log_every
    starts = [first, *range((first // every + 1) * every, last, every)]
    counts = np.diff([*starts, last])
    means = np.add.reduceat(losses, np.subtract(starts, first), dtype=np.float64) / counts
    seconds = round(self.timing.elapsed(), 4)
    return [
      {
        "step": stop,
        "loss": loss,
        "seconds": seconds,
        "bytes": round(self.sent.until(stop)),
        **self._spent(stop),
      }
      for stop, loss in zip([*starts[1:], last], means.tolist(), strict=True)
    ]

  def _spent(self, step: int) -> dict[str, Any]:
    """What the first so many steps have cost, of virtual seconds and of privacy."""
    plan, virtual = self.problem.plan, self.problem.virtual
    found: dict[str, Any] = {}
    if virtual:
      found["virtual_seconds"] = round(virtual.at(plan.rounds(step)), 6)
    if self.facts.epsilon:
      found["epsilon"] = self.facts.epsilon(math.ceil(plan.rounds(step)))
    return found

  def _evaluate(self) -> dict[str, Any]:
    """Measures the deployed model on the data; the last row of the pending dispatch carries it."""
    row = self._measured()
    self._check_finite(row)
    self._fetch(**row)
    self.evaluated = {"step": self.step, **row}
    return row

  def _measured(self) -> dict[str, Any]:
    """The deployed model's training loss, gradient norm where asked for, and evaluation."""
    with self._aside():
      params = self.problem.executor.params(self.state)
      task = self.problem.job.task
      gradient = self.config.tolerance > 0 or task.grads is not None
      found = self.evaluate(params, self.data, gradient=gradient)
      train = {name: float(value) for name, value in jax.device_get(found).items()}
      test = jax.device_get(self.evaluate(params, self.test)) if self.test else train
      test = {**test, **jax.device_get(self.measure(params))}
    row: dict[str, Any] = {"train_loss": train["loss"]}
    if "gradient_norm" in train:
      row["gradient_norm"] = train["gradient_norm"]
    row["eval"] = {k: float(v) for k, v in test.items() if k != "gradient_norm"}
    return row

  def _check_finite(self, row: Mapping[str, Any]) -> None:
    """Rejects an evaluation that is not finite, after the rows of the steps before it."""
    named = {f"{self.evaluated_on} {name}": value for name, value in row["eval"].items()}
    named |= {"training loss": row["train_loss"]}
    named |= {"gradient norm": row["gradient_norm"]} if "gradient_norm" in row else {}
    if bad := [name for name, value in named.items() if not math.isfinite(value)]:
      self._fetch()  # the losses of the steps tell more, if they are not finite either
      raise NonFinite(f"the {', '.join(bad)} is not finite at step {self.step}; {self._kept()}")

  def _initial(self) -> dict[str, Any]:
    """For the summary: what the model is like before the first step, as far as it is finite."""
    row, finite = self._measured(), math.isfinite
    loss = row["train_loss"]
    return {
      "initial_train_loss": loss if finite(loss) else None,
      "initial_eval": {name: value for name, value in row["eval"].items() if finite(value)},
    }

  def _check_replicas(self) -> None:
    with self._aside():
      names = self.differing(self.state)
    if names:
      raise ReplicasDiffer(f"at step {self.step} the devices' copies differ of {', '.join(names)}")

  def _save(self) -> None:
    self._fetch()
    with self._aside():
      self.checkpoints.save(self.step, self.state, self.timing.elapsed())

  def _kept(self) -> str:
    latest = self.checkpoints.latest()
    return "no checkpoint was saved yet" if latest is None else f"checkpoint {latest} is kept"

  def _restore(self) -> int:
    found = self.checkpoints.restore(self.state, report.note)
    if found is None:
      return 0
    step, self.state = found
    report.note(f"resuming at step {step}")
    return step

  @contextlib.contextmanager
  def _aside(self) -> Iterator[None]:
    """Around work that is no training step, begun when the steps under way are done."""
    jax.block_until_ready(self.pending)
    with self.timing.aside():
      yield

  @contextlib.contextmanager
  def _profiled(self) -> Iterator[None]:
    """Traces the second dispatch of this process, when all is compiled, into OUT/profile."""
    self.dispatches += 1
    if not self.config.profile or self.dispatches != 2:
      yield
      return
    jax.block_until_ready(self.pending)
    with jax.profiler.trace(str(self.folder / "profile")):
      yield
      jax.block_until_ready(self.state)

  # ---- result

  def _summary(self, reason: str) -> dict[str, Any]:
    config, job, evaluated = self.config, self.problem.job, self.evaluated
    dense = wire.by_axis(workers.dense_traffic(job))
    plan = self.problem.plan
    last = plan.jobs[plan.stage(self.step)]
    rounds = max(1, self.timing.largest // last.method.local_steps)
    shared = wire.by_axis(workers.metrics_traffic(last, rounds), rounds * last.method.local_steps)
    steps = max(job.method.local_steps, self.step)
    transfers = self.sent.transfers(steps)
    return {
      **config.named(),
      "workers": job.workers if job.order is None else len(job.sizes),
      "steps": self.step,
      "stopped_because": reason,
      "seconds": round(self.timing.elapsed(), 3),
      "compile_seconds": round(self.timing.compiling, 3),
      "steps_per_second": round(self.timing.steps_per_second(), 3),
      "aggregated": "per shard" if len(job.axes) > len(worker_axes(job.axes)) else "whole leaves",
      **self.initial,
      "train_loss": evaluated.get("train_loss"),
      **self.training.sampled,
      "eval": evaluated.get("eval", {}),
      "evaluated_on": self.evaluated_on,
      "wire": {
        "bytes_per_step_per_worker": wire.by_axis(transfers, steps) if job.order is None else {},
        "metrics_bytes_per_step_per_worker": shared,
        "total_bytes_per_worker": self.sent.until(self.step),
        "dense_bytes_per_step_per_worker": sum(dense.values()),
        "transfers": wire.table(transfers, steps),
        **self.network.summary(),
      },
      **{f"{name}_reaches": found.share for name, found in self.reaches.items()},
      **self.facts.found,
      **self._spent(self.step),
      "params_sha256": params_sha256(self.problem.executor.params(self.state)),
    }


def params_sha256(params: Params) -> str:
  """The SHA-256 of the parameters' names, types, shapes and bits, in the order of the tree."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
    whole = sharded.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))
    digest.update(np.ascontiguousarray(jax.device_get(whole(leaf))).tobytes())
  return digest.hexdigest()
