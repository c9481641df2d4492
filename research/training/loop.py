"""The training loop: a run, the hooks of a run, and the generator of the run's events."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core.base import Params
from research.core.task import Data, TrainState
from research.parallel import diagnostics, resize, workers
from research.training import fingerprint
from research.training import folder as folders
from research.training.assemble import NOTHING_GIVEN, Given, Problem, assemble, check
from research.training.checkpoint.checkpoint import Checkpoints
from research.training.config import Config, UsageError
from research.training.feed import Training
from research.training.hooks import heartbeat
from research.training.hooks.evaluate import Evaluate, Tolerance
from research.training.hooks.finite import NonFinite
from research.training.hooks.hook import End, Event, Hook, Pause, Rounds, Stop
from research.training.hooks.log import Columns, Log
from research.training.hooks.network import Network
from research.training.hooks.profile import Profile
from research.training.hooks.replicas import Replicas, ReplicasDiffer
from research.training.hooks.save import CheckpointStore, Save
from research.training.hooks.signals import Signals
from research.training.reports import figures
from research.training.reports.summary import Costs, params_sha256, summarized
from research.training.reports.timing import Timing
from research.training.result import Result
from research.training.run import BaseRun
from research.training.together import same_everywhere, together
from research.training.virtual import VirtualServer

__all__ = ["NonFinite", "ReplicasDiffer", "Run", "events", "params_sha256", "train", "trained"]


def train(config: Config) -> tuple[dict[str, Any], Path]:
  """Starts or resumes the run that the flags describe.

  Returns:
    The contents of summary.json, and the run's folder.

  Raises:
    UsageError: if a flag is invalid.
    CheckpointError: if the run has checkpoints, but none is intact.
    NonFinite: if a loss, the state or an evaluation is not finite.
    ReplicasDiffer: if the copies of the state on different devices differ.
  """
  result = trained(config, NOTHING_GIVEN, (), writes=True)
  assert result.folder
  return result.summary, result.folder


def trained(
  config: Config, given: Given, hooks: Sequence[Hook], *, writes: bool, shown: bool = True
) -> Result:
  """Starts or resumes a run; with `writes`, the run has its own folder.

  Args:
    config: the numbers, the switches, and the specs or labels.
    given: the objects that replace specs.
    hooks: the user's hooks, which receive each event before the built-in hooks.
    writes: whether to write files; False keeps everything in memory.
    shown: whether progress is printed on stderr.
  """
  heartbeat.announce()
  main = jax.process_index() == 0
  wide = config.x64 or bool(jax.config.read("jax_enable_x64"))
  with Timing() as timing, jax.enable_x64(wide), ThreadPoolExecutor(1) as aside:
    _same_everywhere(config)
    with together():
      setting = check(config, given)
      folder = folders.check(config) if writes else None
      problem = assemble(config, setting)
      made_of, summary = None, None
      if folder:  # fingerprints are computed while the programs are compiled
        parts = (problem.job.task, setting.method, setting.partition, setting.speeds)
        parts += () if setting.network is None else (setting.network,)
        made_of = aside.submit(_made_of(given), *parts).result
        folders.check_prints(config, folder, made_of)
        summary = folders.finished(config, folder, problem.steps, made_of)
    if folder and summary:
      if main:
        figures.show_again(folder, summary, told=shown)
      params = lambda: _restored(config, problem, folder)
      return Result(summary, folder, [], params, problem.job.task.model)
    with contextlib.ExitStack() as stack:
      with together():
        if main and folder:
          stack.enter_context(folders.claimed(config, folder))
      run = Run(config, problem, timing)
      costs, network = Costs(run), Network(run, main)
      own = Hooks(
        run,
        stack,
        run.store(folder) if folder else None,
        columns=costs.row,
        of_dispatches=network.row,
        folder=folder if main else None,
        shown=main and shown,
        first=[network, *([Profile(folder)] if folder and config.profile else [])],
        judges=[Replicas(run)],
      )
      if main and folder:
        folders.describe(config, folder, made_of)
      for _ in events(run, (*hooks, *own.all)):
        pass
      summary, params = summarized(run, own.evaluate, costs, network), run.params()
      if main and folder:
        figures.write_result(folder, summary)
  return Result(
    summary,
    folder,
    own.log.rows,
    lambda: params,
    problem.job.task.model,
    stopped_by=own.signals.stopped,
  )


def _same_everywhere(config: Config) -> None:
  """Rejects a job whose processes have different flags, before processes wait for each other."""
  if not same_everywhere(json.dumps(folders.identity(config))):
    raise UsageError("the processes of the job were given different flags")


def _made_of(given: Given) -> Callable[..., dict[str, str]]:
  """Returns a function that computes the fingerprints of a run, from its objects or specs."""
  return fingerprint.of_objects if any(x is not None for x in given) else fingerprint.of_specs


def _restored(config: Config, problem: Problem, folder: Path) -> Params:
  """Restores the deployed model of a complete run from its newest checkpoint."""
  with jax.enable_x64(config.x64 or bool(jax.config.read("jax_enable_x64"))):
    run = Run(config, problem)
    with contextlib.closing(Save(run, run.store(folder))) as save:
      save.restore(run)
    return run.params()


class Hooks:
  """The hooks of a run, in the order in which they receive events."""

  def __init__(
    self,
    run: BaseRun,
    stack: contextlib.ExitStack,
    store: CheckpointStore | None,
    *,
    columns: Columns = lambda step: {},
    of_dispatches: Columns = lambda step: {},
    folder: Path | None = None,
    shown: bool = True,
    first: Sequence[Hook] = (),
    judges: Sequence[Hook] = (),
  ):
    """Evaluates the initial model, and restores the run's newest checkpoint.

    Args:
      run: the run, at step 0.
      stack: closes every hook, even if another hook raises an exception.
      store: the run's checkpoints; None saves nothing.
      columns: maps a step to further columns of the row of that step.
      of_dispatches: columns of the last row of a dispatch.
      folder: the folder of metrics.jsonl; None keeps the rows in memory.
      shown: whether this process shows progress.
      first: further hooks that receive each event before all others.
      judges: further hooks that receive each event after the rows of a dispatch are written.
    """
    closing = lambda hook: (stack.callback(hook.close), hook)[1]
    self.evaluate = Evaluate(run)
    saves = [closing(Save(run, store))] if store else []
    for save in saves:
      run.kept = save.kept
      save.restore(run)
    label = self.evaluate.label
    self.log = closing(Log(run, label, columns, of_dispatches, folder=folder, shown=shown))
    # A dispatch's rows are written before checks run, and its state is saved before signals are
    # handled.
    self.all: list[Hook] = [*first, self.log, *judges, self.evaluate, Tolerance()]
    self.signals = closing(Signals())
    self.all += [*saves, self.signals]


class Run(BaseRun):
  """Executes a run's compiled programs in this process.

  Attributes:
    problem: the parts of the run.
    data: the training data of each dispatch.
    state: the TrainState; reading the state waits for exchanges in flight.
    metrics: the metrics of the newest dispatch, on the devices.
  """

  def __init__(self, config: Config, problem: Problem, timing: Timing | None = None):
    super().__init__(config, problem.plan, problem.steps, timing)
    self.problem = problem
    init_key, self.data_key = jax.random.split(jax.random.key(config.seed))
    self._state: Any = problem.executor.init(init_key)
    placed = problem.executor.place(problem.examples, problem.sizes, self.data_key)
    self.data = Training(config, problem.job, placed)
    without = jax.config.values["jax_disable_jit"]  # without jit, each step starts on the host
    self._transfers = "allow" if without else "disallow"

  @property
  def state(self) -> TrainState:
    found = self.problem.executor.settled(self._state)
    # the metrics of a dispatch do not cover exchanges in flight
    if found is not self._state and not bool(_all_finite(found.method)):
      raise NonFinite(f"the state became non-finite before step {self.step}; {self.kept()}")
    return found

  @state.setter
  def state(self, state: TrainState) -> None:
    self._state = state

  def wait(self) -> None:
    jax.block_until_ready(self._state)

  def advance(self, to: int) -> Rounds:
    """Starts the rounds up to a step without waiting for their end."""
    first, plan = self.step, self.plan
    rounds = round(plan.rounds(to) - plan.rounds(first))
    executor = self.problem.executors[plan.stage(first)]
    data = self.data.of(first, to)
    with jax.transfer_guard(self._transfers):
      self._state, self.metrics = executor.run(self._state, data, rounds=rounds)
    self.step = to
    return Rounds(first, to, self.metrics)

  def prepare(self, to: int) -> None:
    self.data.ahead(self.step, to)

  def alone(self) -> tuple[float, float]:
    """Returns the seconds per step of the computation and of the exchange, each measured alone."""
    measure = self.problem.executor.alone
    assert measure
    return measure(self._state, self.data.placed)

  def end(self, every: Sequence[int]) -> int:
    return super().end((self.config.steps_per_dispatch, *every))

  def params(self) -> Params:
    return self.problem.executor.params(self._state)

  def examples(self) -> tuple[Data, Data | None]:
    test = self.problem.test
    place = self.problem.executor.place
    return self.data.placed, place(*test, self.data_key) if test else None

  def rows(self, first: int, last: int, metrics: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    found = super().rows(first, last, metrics)
    if norms := metrics.get("norms"):
      return {step: {"diagnostics": self._diagnostics(norms, first, step)} for step in found}
    return found

  def _diagnostics(
    self, norms: Mapping[str, np.ndarray], first: int, step: int
  ) -> dict[str, float]:
    """Returns a round's diagnostics, given a step of the round and its dispatch's first step."""
    number = math.ceil(self.plan.rounds(step)) - 1
    place = number - round(self.plan.rounds(first))
    means = {name: float(norms[name][place]) for name in diagnostics.NAMES}
    steps = len(norms[diagnostics.GRADIENT]) // len(norms["update"])
    last_step = (place + 1) * steps - 1  # last step of the round
    found = diagnostics.columns(means, float(norms[diagnostics.GRADIENT][last_step]))
    if isinstance(self.problem.virtual, VirtualServer):
      found["staleness"] = float(self.problem.virtual.staleness[number])
    return found

  def store(self, folder: Path) -> Checkpoints:
    """Opens the checkpoints in the run's folder."""
    placed = resize.placed(self.job, self.problem.executor.layout.state, self.state)
    return Checkpoints(folder.resolve() / "checkpoints", self.state, placed)


_all_finite = jax.jit(workers.all_finite)


def events(run: BaseRun, hooks: Sequence[Hook] = ()) -> Iterator[Event]:
  """Runs the remaining rounds of a run, until it is complete or stopped, and yields its events.

  The caller receives every event first, and then each hook receives the event; this also holds for
  events that hooks yield. The run's state is that of the newest `Rounds` event. Reading the state
  waits for the devices.
  """
  every = [hook.every for hook in hooks]
  while run.step < run.steps and not run.reason:
    first, last = run.step, run.end(every)
    with contextlib.ExitStack() as around:
      for hook in hooks:
        around.enter_context(hook.around(run, first, last))
      event = run.advance(last)
    if run.step < run.steps:
      run.prepare(run.end(every))
    yield from _told(run, hooks, event)
  run.reason = run.reason or "steps"
  yield from _told(run, hooks, Stop(run.step, run.reason))
  yield from _told(run, hooks, End(run.step, run.reason))
  yield from _told(run, hooks, Pause(run.step))


def _told(run: BaseRun, hooks: Sequence[Hook], event: Event) -> Iterator[Event]:
  yield event
  for hook in hooks:
    for further in hook.on(run, event):
      yield from _told(run, hooks, further)
