"""The training loop: a run, its hooks, and the one generator of its events."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from research.core.base import Array, Params
from research.core.task import TrainState
from research.training import fingerprint
from research.training import folder as folders
from research.training.assemble import NOTHING_GIVEN, Given, Problem, assemble, check
from research.training.config import Config, UsageError
from research.training.feed import Training
from research.training.hooks.evaluate import Evaluate, Tolerance
from research.training.hooks.finite import NonFinite
from research.training.hooks.hook import End, Event, Hook, Pause, Rounds, Stop
from research.training.hooks.log import Log
from research.training.hooks.network import Network
from research.training.hooks.profile import Profile
from research.training.hooks.replicas import Replicas, ReplicasDiffer
from research.training.hooks.save import Save
from research.training.hooks.signals import Signals
from research.training.reports import figures
from research.training.reports.summary import Costs, params_sha256, summarized
from research.training.reports.timing import Timing
from research.training.result import Result
from research.training.together import same_everywhere, together

__all__ = ["NonFinite", "ReplicasDiffer", "Run", "events", "params_sha256", "train", "trained"]


def train(config: Config) -> tuple[dict[str, Any], Path]:
  """Runs, or goes on with, what the flags describe.

  Returns:
    The contents of summary.json, and the run's folder.

  Raises:
    UsageError: for invalid flags.
    CheckpointError: if the run has checkpoints and none is whole.
    NonFinite: names the steps; the last good checkpoint stays.
    ReplicasDiffer: names the step and the leaves.
  """
  result = trained(config, NOTHING_GIVEN, (), writes=True)
  assert result.folder
  return result.summary, result.folder


def trained(config: Config, given: Given, hooks: Sequence[Hook], *, writes: bool) -> Result:
  """Runs, or goes on with, what was asked for; with `writes` in a folder of its own.

  Args:
    config: numbers, switches, and specs or labels.
    given: objects in place of specs.
    hooks: the user's, told each event before those of the run.
    writes: False keeps everything in memory and touches no file.
  """
  main = jax.process_index() == 0
  wide = config.x64 or bool(jax.config.read("jax_enable_x64"))
  with Timing() as timing, jax.enable_x64(wide), ThreadPoolExecutor(1) as aside:
    _same_everywhere(config)
    with together():
      setting = check(config, given)
      folder = folders.check(config) if writes else None
      problem = assemble(config, setting)
      made_of, summary = None, None
      if folder:  # the prints are taken while the devices' programs are compiled
        parts = (problem.job.task, setting.method, setting.partition, setting.speeds)
        made_of = aside.submit(_made_of(given), *parts).result
        folders.check_prints(config, folder, made_of)
        summary = folders.finished(config, folder, problem.steps, made_of)
    if folder and summary:
      if main:
        figures.show_again(folder, summary)
      return Result(summary, folder, [], lambda: _restored(config, problem, folder))
    with contextlib.ExitStack() as stack:
      with together():
        if main and folder:
          stack.enter_context(folders.claimed(config, folder))
      run = Run(config, problem, timing)
      own = Hooks(run, folder, main, stack)
      if main and folder:
        folders.describe(config, folder, made_of)
      for _ in events(run, (*hooks, *own.all)):
        pass
      summary, params = own.summary(run), run.params()
      if main and folder:
        figures.write_result(folder, summary)
  return Result(summary, folder, own.log.rows, lambda: params)


def _same_everywhere(config: Config) -> None:
  """Rejects a job whose processes got different flags, before they wait for one another."""
  if not same_everywhere(json.dumps(folders.identity(config))):
    raise UsageError("the processes of the job were given different flags")


def _made_of(given: Given) -> Callable[..., dict[str, str]]:
  """Takes the fingerprints of a run of objects, or of one of specs."""
  return fingerprint.of_objects if any(x is not None for x in given) else fingerprint.of_specs


def _restored(config: Config, problem: Problem, folder: Path) -> Params:
  """The deployed model of a complete run, from its newest checkpoint."""
  with jax.enable_x64(config.x64 or bool(jax.config.read("jax_enable_x64"))):
    run = Run(config, problem)
    with contextlib.closing(Save(run, folder)) as save:
      save.restore(run)
    return run.params()


class Hooks:
  """The hooks of a whole run, in the order in which they are told events."""

  def __init__(self, run: "Run", folder: Path | None, main: bool, stack: contextlib.ExitStack):
    """Evaluates the initial model, and puts the run at its newest checkpoint.

    Args:
      run: at step 0.
      folder: of the run; None writes nothing.
      main: whether this process writes and shows.
      stack: closes the hooks, each of them whatever the others raise.
    """
    closing = lambda hook: (stack.callback(hook.close), hook)[1]
    self.evaluate = Evaluate(run)
    save = closing(Save(run, folder)) if folder else None
    if save:
      run.kept = save.kept
      save.restore(run)
    replicas = Replicas(run)
    self.costs = Costs(run)
    self.network = Network(main)
    self.log = closing(
      Log(
        run,
        self.evaluate.evaluated_on,
        self.costs.row,
        self.network.row,
        folder=folder if main else None,
        shown=main,
      )
    )
    profile = [Profile(folder)] if folder and run.config.profile else []
    saves = [save] if save else []
    # Rows of a dispatch are written before it is judged; it is saved before a signal is asked for.
    self.all: list[Hook] = [self.network, *profile, self.log, replicas, self.evaluate, Tolerance()]
    self.all += [*saves, closing(Signals())]

  def summary(self, run: "Run") -> dict[str, Any]:
    """The contents of summary.json."""
    return summarized(run, self.evaluate, self.costs, self.network)


class Run:
  """A run in this process: its parts, its state, and where it is.

  Attributes:
    step: local steps that have been started.
    reason: why it stops; "" while it goes on.
    metrics: of the newest dispatch, on the devices.
    data: what each dispatch trains on.
    kept: says which checkpoint is left, for messages.
  """

  def __init__(self, config: Config, problem: Problem, timing: Timing | None = None):
    self.config, self.problem, self.timing = config, problem, timing or Timing()
    init_key, self.data_key = jax.random.split(jax.random.key(config.seed))
    self.state: TrainState = problem.executor.init(init_key)
    placed = problem.executor.place(problem.examples, problem.sizes, self.data_key)
    self.data = Training(config, problem.job, placed)
    self.step, self.reason = 0, ""
    self.metrics: Mapping[str, Array] = {}
    self.kept: Callable[[], str] = lambda: "no checkpoint was saved yet"
    without = jax.config.values["jax_disable_jit"]  # whose steps all begin on the host
    self._transfers = "allow" if without else "disallow"

  def advance(self, to: int) -> None:
    """Starts the rounds up to a step, and does not wait for them."""
    plan = self.problem.plan
    rounds = round(plan.rounds(to) - plan.rounds(self.step))
    executor = self.problem.executors[plan.stage(self.step)]
    data = self.data.of(self.step, to)
    with jax.transfer_guard(self._transfers):
      self.state, self.metrics = executor.run(self.state, data, rounds=rounds)
    self.step = to

  def stop(self, reason: str) -> None:
    """No more rounds are started; the run is evaluated and saved."""
    self.reason = reason

  def params(self) -> Params:
    """The model one would deploy now."""
    return self.problem.executor.params(self.state)

  def end(self, every: Sequence[int]) -> int:
    """Where the next dispatch ends: at a multiple of one of `every`, or of the plan's stages.

    It is a whole number of rounds from zero, and a function of absolute steps, so that a resumed
    run is cut where an unbroken one is.
    """
    plan, steps = self.problem.plan, self.problem.steps
    stops = [(self.step // n + 1) * n for n in every if n > 0]
    return min(plan.end(min([steps, plan.next_stage(self.step) or steps, *stops])), steps)

  def due(self, rounds: Rounds, every: int) -> bool:
    """Whether a dispatch comes to a multiple of `every`."""
    return every > 0 and rounds.last // every > rounds.first // every

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Work that is no training step: it starts when the dispatch under way is done."""
    jax.block_until_ready(self.metrics)
    with self.timing.aside():
      yield


def events(run: Run, hooks: Sequence[Hook] = ()) -> Iterator[Event]:
  """The rounds of a run from where it is, until its steps are done or it is stopped.

  Every event is given to the caller and then to each hook, and so are the events of hooks. The
  state is the run's as of the newest `Rounds`; whoever reads it waits for the devices.
  """
  every = (run.config.steps_per_dispatch, *(hook.every for hook in hooks))
  while run.step < run.problem.steps and not run.reason:
    first, last = run.step, run.end(every)
    with contextlib.ExitStack() as around:
      for hook in hooks:
        around.enter_context(hook.around(run, first, last))
      run.advance(last)
    if last < run.problem.steps:
      run.data.ahead(last, run.end(every))
    yield from _told(run, hooks, Rounds(first, last, run.metrics))
  run.reason = run.reason or "steps"
  yield from _told(run, hooks, Stop(run.step, run.reason))
  yield from _told(run, hooks, End(run.step, run.reason))
  yield from _told(run, hooks, Pause(run.step))


def _told(run: Run, hooks: Sequence[Hook], event: Event) -> Iterator[Event]:
  yield event
  for hook in hooks:
    for further in hook.on(run, event):
      yield from _told(run, hooks, further)
