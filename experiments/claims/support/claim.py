"""The parts of a claim: runs of the ordinary executors, comparisons with the paper, gates."""

import multiprocessing
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from research.core.base import Params
from research.core.spec import Call, parse
from research.core.task import Task, TrainState
from research.training import metrics, sources
from research.training.assemble import assemble, check
from research.training.config import Config
from research.training.hooks.hook import Event, Hook, Rounds
from research.training.loop import Run, events
from research.training.plan import Sent

Row = dict[str, Any]
RELATIONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


class Beside(NamedTuple):
  """One of our numbers beside the paper's, if the paper has one."""

  what: str
  ours: float
  paper: float | None = None


class Gate(NamedTuple):
  """A condition that must hold. It fails for NaN."""

  what: str
  value: float
  relation: str  # a key of RELATIONS
  bound: float
  anywhere: bool = False  # applies also to data sets that the claim was not tuned on

  @property
  def holds(self) -> bool:
    """Whether the value satisfies the relation to the bound."""
    return bool(RELATIONS[self.relation](self.value, self.bound))


class Line(NamedTuple):
  """A curve of a panel; `marker` marks its points."""

  label: str
  x: Sequence[float] | np.ndarray
  y: Sequence[float] | np.ndarray
  marker: str = ""


class Panel(NamedTuple):
  """One pair of axes of the figure."""

  title: str
  x: str
  y: str
  lines: list[Line]
  x_scale: str = "linear"
  y_scale: str = "linear"
  levels: Mapping[str, float] = {}  # horizontal lines, such as the paper's number


class Findings(NamedTuple):
  """The results of a claim's experiments."""

  besides: list[Beside]
  gates: list[Gate]
  panels: list[Panel]
  note: str = ""  # what a reader must know to interpret the numbers


class Found(NamedTuple):
  """The results of one run."""

  config: Config
  rows: list[Row]  # "step", mean training "loss" since the previous row, and measured metrics
  params: Params  # numpy: the deployed model
  bytes_per_step: float  # that one worker's algorithm sends
  seconds: float

  def column(self, name: str) -> np.ndarray:
    """A metric over the rows."""
    return np.array([row[name] for row in self.rows], np.float64)

  def last(self, name: str) -> float:
    """A metric at the end; NaN if the run diverged earlier."""
    return float(self.rows[-1].get(name, np.nan))

  @property
  def finite(self) -> bool:
    """Whether the run has not diverged."""
    return bool(np.isfinite(self.last("loss")))

  def first(self, name: str, reached: Callable[[float], bool]) -> float:
    """The first measured step at which a metric fulfils a condition; infinity if none does."""
    return next((float(row["step"]) for row in self.rows if reached(row[name])), np.inf)


# (deployed params, full state) -> numbers that are added to a row
Watch = Callable[[Params, TrainState], Mapping[str, Any]]


class Lab:
  """Runs a claim's experiments and records them.

  Args:
    settings: the claim's numbers at this scale.
    seeds: the number of seeds.
    dataset: task spec of the data, or "" if the claim makes its own.
    tell: takes a line of progress.
  """

  def __init__(
    self, settings: Mapping[str, Any], seeds: int, dataset: str, tell: Callable[[str], None]
  ):
    self.settings, self.seeds, self.dataset, self.tell = settings, range(seeds), dataset, tell
    self.runs: list[dict[str, Any]] = []
    self.grids: list[dict[str, Any]] = []

  def __getitem__(self, name: str) -> Any:
    """A setting of the claim."""
    return self.settings[name]

  def data(self, **more: Any) -> str:
    """The spec of --dataset with further arguments, unless it has them itself."""
    call = parse(self.dataset)
    return str(call.replace(**{name: v for name, v in more.items() if name not in call.kwargs}))

  def task(self, **flags: Any) -> Task:
    """The task of a run from its flags; --dataset is the default."""
    return sources.task_of(Config(task=self.dataset).replace(**_texts(flags)))

  def run(
    self,
    *,
    on: Sequence[str] = ("test",),
    gradient: bool = False,
    watch: Watch | None = None,
    until: Callable[[Row], bool] = lambda row: False,
    **flags: Any,
  ) -> Found:
    """Runs the flags of `experiments/run.py`, and measures at every --eval_every.

    A row has the task's metrics by name over the test examples (`on` "test"), or over the training
    examples as "train_NAME" (`on` "train"); with `gradient` also the norm of the full gradient, as
    "gradient_norm". A run ends at the first row for which `until` holds, or when its loss is no
    longer finite.

    Args:
      on: which examples to measure on: "test", "train".
      gradient: measures the norm of the full gradient.
      watch: further metrics of params and state.
      until: ends the run when true for a row.
      **flags: flags of the run; a spec may be a `Call`, whose text becomes the flag.

    Raises:
      UsageError: for invalid flags.
    """
    default: dict[str, Any] = {"task": self.dataset, "eval_every": 0, "steps_per_dispatch": 1000}
    config = Config(**(default | _texts(flags)))
    problem = assemble(config, check(config))
    started = time.perf_counter()
    run = Run(config, problem)
    measures = Measures(run, _measure(run, on, gradient, watch), until)
    for _ in events(run, [measures]):
      pass
    rows, params = measures.rows, jax.device_get(run.params())
    seconds = time.perf_counter() - started
    sent = Sent(problem.plan, problem.executor.layout, problem.steps)
    found = Found(config, rows, params, sent.until(problem.steps) / problem.steps, seconds)
    last = {k: v for k, v in rows[-1].items() if np.ndim(v) == 0}
    told = {**_told(config), **last, "bytes_per_step": found.bytes_per_step}
    self.runs.append({**told, "seconds": round(seconds, 1)})
    self.tell(f"{seconds:6.1f} s  {_short(config)}: {_numbers(last)}")
    return found

  def tune(
    self, what: str, values: Iterable[float], score: Callable[[float], float]
  ) -> tuple[float, dict[float, float]]:
    """The value of a grid with the lowest score, and all scores; ties go to the first."""
    scores = {value: float(score(value)) for value in values}
    ranked = {v: s if np.isfinite(s) else np.inf for v, s in scores.items()}
    best = min(ranked, key=lambda v: ranked[v])
    shown = {str(v): s if np.isfinite(s) else None for v, s in scores.items()}
    self.grids.append({"what": what, "scores": shown, "best": best})
    return best, scores


def with_devices(count: int, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function of a module in a new process that has `count` CPU devices."""
  apart = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(1, apart, initializer=_imitate_devices, initargs=(count,)) as process:
    return process.submit(function, *args).result()


def _imitate_devices(count: int) -> None:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)


class Measures(Hook):
  """Records the rows of a claim's run: every `eval_every` steps, at its end, and on divergence."""

  def __init__(self, run: Run, measure: Callable[[], Row], until: Callable[[Row], bool]):
    self.every, self.rows = run.config.eval_every, []
    self._measure, self._until, self._losses = measure, until, []

  def on(self, run: Run, event: Event) -> Iterable[Event]:
    if not isinstance(event, Rounds):
      return ()
    self._losses.append(np.asarray(event.metrics["loss"], np.float64))
    finite = bool(np.isfinite(self._losses[-1]).all())
    if run.step == run.problem.steps or not finite or run.due(event, self.every):
      loss, self._losses = float(np.concatenate(self._losses).mean()), []
      self.rows.append({"step": run.step, "loss": loss, **self._measure()})
    if not finite or (self.rows and self._until(self.rows[-1])):
      run.stop("reached" if finite else "diverged")
    return ()


def _measure(run: Run, on: Sequence[str], gradient: bool, watch: Watch | None) -> Callable[[], Row]:
  problem = run.problem
  test = problem.test if "test" in on else None
  placed = {"": problem.executor.place(*test, run.data_key)} if test else {}
  if "train" in on or gradient or not test:
    placed["train_"] = run.data.placed
  mesh = next(iter(placed.values())).sizes.sharding.mesh
  evaluate = metrics.evaluator(problem.job.task, mesh)

  def measure() -> Row:
    params = run.params()
    row: Row = dict(watch(params, run.state)) if watch else {}
    for prefix, data in placed.items():
      found = evaluate(params, data, gradient=gradient and prefix == "train_")
      named = {k: float(v) for k, v in jax.device_get(found).items()}
      norm = {"gradient_norm": named.pop("gradient_norm")} if "gradient_norm" in named else {}
      row |= {f"{prefix}{name}": value for name, value in named.items()} | norm
    return row

  return measure


def _texts(flags: Mapping[str, Any]) -> dict[str, Any]:
  return {name: str(v) if isinstance(v, Call) else v for name, v in flags.items()}


def _told(config: Config) -> dict[str, Any]:
  """The flags that differ from their defaults, and the run's names."""
  default = Config.defaults()
  given = {k: v for k, v in config.as_dict().items() if v != default[k]}
  return config.named() | given


def _short(config: Config) -> str:
  return f"{config.task} {config.method} {config.mesh} seed {config.seed}"


def _numbers(row: Mapping[str, Any]) -> str:
  return ", ".join(f"{k} {v:.5g}" for k, v in row.items() if isinstance(v, int | float))
