"""Evaluates the deployed model every `eval_every` steps and at the end."""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from research.comm.mesh import worker_axes
from research.training import metrics
from research.training.hooks import finite
from research.training.hooks.finite import NonFinite
from research.training.hooks.hook import (
  COMPLETE,
  End,
  Evaluation,
  Event,
  Hook,
  Pause,
  Rewound,
  Rounds,
  Stop,
)
from research.training.reports import report

if TYPE_CHECKING:
  from research.training.run import BaseRun


class Evaluate(Hook):
  """Yields an Evaluation with "train_loss", "eval" and, if needed, "gradient_norm".

  The gradient of the full objective is computed if there is a tolerance or the task defines its own
  gradient. An interrupted run is saved before the evaluation, since the run may soon be killed.

  Attributes:
    row: the newest evaluation, with the entry "step".
    evaluated_on: "test", or "train" if the task has no test examples.
    measured_on: the data of each metric that the task measures itself.
  """

  def __init__(self, run: "BaseRun"):
    config, job = run.config, run.job
    self.every = config.eval_every
    self.row: dict[str, Any] = {}
    self._train, self._test = run.examples()
    self.evaluated_on = "test" if self._test else "train"
    shared = job.batch_size if len(job.axes) > len(worker_axes(job.axes)) else None
    self._evaluate = metrics.evaluator(job.task, self._train.sizes.sharding.mesh, shared or 1)
    self._measure, self._own_data = jax.jit(job.task.measure), job.task.measured_on
    self.measured_on: dict[str, str] = {}
    self._gradient = config.tolerance > 0 or job.task.grads is not None
    self.initial = self._initial(run)

  def label(self, name: str) -> str:
    """Returns a metric's name, preceded by the data that it was measured on: "test accuracy"."""
    return report.metric_label(name, self.evaluated_on, self.measured_on)

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if isinstance(event, Rewound) and self.row.get("step", 0) > event.step:
      self.row = {}
    if isinstance(event, Rounds):
      due = run.due(event, self.every)
    else:
      ends = isinstance(event, Stop) and event.reason in COMPLETE
      due = (ends or isinstance(event, End)) and self.row.get("step") != run.step
    return self._evaluated(run) if due else ()

  def _evaluated(self, run: "BaseRun") -> Iterator[Event]:
    row = self._measured(run)
    if bad := finite.wrong(row, self.label):
      yield Pause(run.step)  # non-finite losses of the steps give a clearer message
      raise NonFinite(f"the {', '.join(bad)} is not finite at step {run.step}; {run.kept()}")
    self.row = {"step": run.step, **row}
    yield Evaluation(run.step, row)

  def _measured(self, run: "BaseRun") -> dict[str, Any]:
    with run.aside():
      params = run.params()
      found = self._evaluate(params, self._train, gradient=self._gradient)
      train = {name: float(value) for name, value in jax.device_get(found).items()}
      test = jax.device_get(self._evaluate(params, self._test)) if self._test else train
      own = jax.device_get(self._measure(params))
    self.measured_on = dict.fromkeys(own, self._own_data)
    row: dict[str, Any] = {"train_loss": train["loss"]}
    if "gradient_norm" in train:
      row["gradient_norm"] = train["gradient_norm"]
    row["eval"] = {k: float(v) for k, v in {**test, **own}.items() if k != "gradient_norm"}
    return row

  def _initial(self, run: "BaseRun") -> dict[str, Any]:
    """Returns the finite metrics of the model before the first step, for the summary."""
    row = self._measured(run)
    loss = row["train_loss"]
    return {
      "initial_train_loss": loss if math.isfinite(loss) else None,
      "initial_eval": {name: x for name, x in row["eval"].items() if math.isfinite(x)},
    }


class Tolerance(Hook):
  """Stops a run as "converged" when the full gradient's norm falls below the tolerance."""

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    if isinstance(event, Evaluation) and run.reason in ("", "steps"):
      norm = event.row.get("gradient_norm")
      if norm is not None and norm < run.config.tolerance:
        run.stop("converged")
    return ()
