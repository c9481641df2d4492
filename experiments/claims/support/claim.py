"""Defines the parts of a claim: runs with the ordinary executors, comparisons, and gates."""

import multiprocessing
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

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
  """One of our numbers, and the paper's number if there is one."""

  what: str
  ours: float
  paper: float | None = None


class Gate(NamedTuple):
  """A condition that must hold; the condition fails for a value of NaN."""

  what: str
  value: float
  relation: str  # a key of RELATIONS
  bound: float
  anywhere: bool = False  # whether the gate also applies to data sets other than the tuned one

  @property
  def holds(self) -> bool:
    """Whether the value satisfies the relation to the bound."""
    return bool(RELATIONS[self.relation](self.value, self.bound))


class Line(NamedTuple):
  """A curve in a panel; `marker` is the symbol of its points."""

  label: str
  x: Sequence[float] | np.ndarray
  y: Sequence[float] | np.ndarray
  marker: str = ""


class Panel(NamedTuple):
  """One panel of the figure, with its own axes."""

  title: str
  x: str
  y: str
  lines: list[Line]
  x_scale: str = "linear"
  y_scale: str = "linear"
  levels: Mapping[str, float] = {}  # labelled horizontal lines, such as the paper's number


class Findings(NamedTuple):
  """The results of a claim's experiments."""

  besides: list[Beside]
  gates: list[Gate]
  panels: list[Panel]
  note: str = ""  # information that a reader needs to interpret the numbers


class Found(NamedTuple):
  """The results of one run."""

  config: Config
  rows: list[Row]  # "step", mean training "loss" since the previous row, and other metrics
  params: Params  # numpy arrays of the deployed model
  bytes_per_step: float  # bytes that the algorithm of one worker sends per step
  seconds: float

  def column(self, name: str) -> np.ndarray:
    """Returns the values of a metric over the rows."""
    return np.array([row[name] for row in self.rows], np.float64)

  def last(self, name: str) -> float:
    """Returns the final value of a metric; NaN if the run diverged before the end."""
    return float(self.rows[-1].get(name, np.nan))

  @property
  def finite(self) -> bool:
    """Whether the run did not diverge."""
    return bool(np.isfinite(self.last("loss")))

  def first(self, name: str, reached: Callable[[float], bool]) -> float:
    """Returns the first measured step at which a metric meets a condition, or infinity."""
    return next((float(row["step"]) for row in self.rows if reached(row[name])), np.inf)


# A function that maps the deployed params and the full state to numbers for a row.
Watch = Callable[[Params, TrainState], Mapping[str, Any]]


class Lab:
  """Runs a claim's experiments and records them; runs on the same data share the task and its
  compiled evaluation.

  Args:
    settings: the claim's settings at this scale.
    seeds: the number of seeds.
    dataset: the task spec of the data, or "" if the claim creates its own data.
    tell: a function that is called with a line about the progress of each run.
  """

  def __init__(
    self, settings: Mapping[str, Any], seeds: int, dataset: str, tell: Callable[[str], None]
  ):
    self.settings, self.seeds, self.dataset, self.tell = settings, range(seeds), dataset, tell
    self.runs: list[dict[str, Any]] = []
    self.grids: list[dict[str, Any]] = []
    self._tasks: dict[tuple[str, ...], Task] = {}
    self._evaluators: dict[Any, Callable[..., Any]] = {}

  def __getitem__(self, name: str) -> Any:
    """Returns a setting of the claim."""
    return self.settings[name]

  def data(self, **more: Any) -> str:
    """Returns the spec of --dataset; `more` gives defaults for arguments that the spec omits."""
    call = parse(self.dataset)
    return str(call.replace(**{name: v for name, v in more.items() if name not in call.kwargs}))

  def task(self, **flags: Any) -> Task:
    """Returns the task of a run, built from the run's flags; --dataset is the default task."""
    config = Config(task=self.dataset).replace(**_texts(flags))
    key = _of_task(config)
    if key not in self._tasks:
      self._tasks[key] = sources.task_of(config)
    return self._tasks[key]

  def _evaluator(self, run: Run, mesh: Mesh) -> Callable[..., Any]:
    """Returns the compiled evaluation of a run's task on a mesh."""
    key = _of_task(run.config), mesh
    if key not in self._evaluators:
      self._evaluators[key] = metrics.evaluator(run.job.task, mesh)
    return self._evaluators[key]

  def run(
    self,
    *,
    on: Sequence[str] = ("test",),
    gradient: bool = False,
    watch: Watch | None = None,
    until: Callable[[Row], bool] = lambda row: False,
    **flags: Any,
  ) -> Found:
    """Runs `experiments/run.py` with flags, and measures every --eval_every steps.

    A row contains the task's metrics over the test examples, by name, if `on` is "test", or over
    the training examples, as "train_NAME", if `on` is "train". With `gradient`, a row also contains
    the norm of the full gradient as "gradient_norm". A run ends at the first row for which `until`
    holds, or when the loss is no longer finite.

    Args:
      on: the examples on which to measure: "test" or "train".
      gradient: whether to measure the norm of the full gradient.
      watch: a function that returns further metrics of params and state.
      until: a function of a row; the run ends at the first row for which the result is True.
      **flags: flags of the run; a spec may be a `Call`, which is converted to text.

    Raises:
      UsageError: if a flag is invalid.
    """
    default: dict[str, Any] = {"task": self.dataset, "eval_every": 0, "steps_per_dispatch": 1000}
    config = Config(**(default | _texts(flags)))
    setting = check(config)
    problem = assemble(config, setting._replace(task=self.task(**(default | flags))))
    started = time.perf_counter()
    run = Run(config, problem)
    evaluator = partial(self._evaluator, run)
    measures = Measures(run, _measure(run, evaluator, on, gradient, watch), until)
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
    """Returns the first value of a grid with the lowest score, and the scores of all values."""
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
  """Records rows of a claim's run every `eval_every` steps, at the end, and on divergence."""

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


def _measure(
  run: Run,
  evaluator: Callable[[Mesh], Callable[..., Any]],
  on: Sequence[str],
  gradient: bool,
  watch: Watch | None,
) -> Callable[[], Row]:
  problem = run.problem
  test = problem.test if "test" in on else None
  placed = {"": problem.executor.place(*test, run.data_key)} if test else {}
  if "train" in on or gradient or not test:
    placed["train_"] = run.data.placed
  mesh = next(iter(placed.values())).sizes.sharding.mesh
  evaluate = evaluator(mesh)

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


def _of_task(config: Config) -> tuple[str, ...]:
  """Returns the flags that decide which task a run has."""
  return config.task, config.model, config.data_dir


def _texts(flags: Mapping[str, Any]) -> dict[str, Any]:
  return {name: str(v) if isinstance(v, Call) else v for name, v in flags.items()}


def _told(config: Config) -> dict[str, Any]:
  """Returns the flags that differ from their defaults, and the flags that name the run."""
  default = Config.defaults()
  given = {k: v for k, v in config.as_dict().items() if v != default[k]}
  return config.named() | given


def _short(config: Config) -> str:
  return f"{config.task} {config.method} {config.mesh} seed {config.seed}"


def _numbers(row: Mapping[str, Any]) -> str:
  return ", ".join(f"{k} {v:.5g}" for k, v in row.items() if isinstance(v, int | float))
