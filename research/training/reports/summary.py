"""Builds summary.json, which contains a run's configuration, results and costs."""

import hashlib
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.analysis import wire
from research.comm.mesh import worker_axes
from research.core.base import Params
from research.parallel import sharded, traffic
from research.training import reach
from research.training.hooks.hook import COMPLETE
from research.training.plan import Sent
from research.training.reports import report
from research.training.reports.facts import facts

if TYPE_CHECKING:
  from research.training.hooks.evaluate import Evaluate
  from research.training.hooks.network import Network
  from research.training.loop import Run
  from research.training.run import BaseRun


class Costs:
  """Computes the costs of a run that are known before it starts: bytes, time and privacy."""

  def __init__(self, run: "Run"):
    """Computes the costs of a run, and reports unknown costs."""
    problem, job = run.problem, run.problem.job
    layout = problem.executor.layout
    self._problem = problem
    self.sent = Sent(problem.plan, layout, problem.steps)
    self.facts = facts(run.config, job, layout)
    self.reaches = reach.reaches(layout.state_shapes, job.task.dimensions)
    if job.order is not None:
      report.note("a server's pushes and pulls are not collectives: their bytes are not counted")
    if self.facts.note:
      report.note(self.facts.note)
    for name, reached in self.reaches.items():
      report.note(reach.describe(name, reached))

  def row(self, step: int) -> dict[str, Any]:
    """Returns the costs at a step, as columns of a row of the metrics."""
    return {"bytes": round(self.sent.until(step)), **self.spent(step)}

  def spent(self, step: int) -> dict[str, Any]:
    """Returns the virtual time, the state of the network, and the epsilon at a step."""
    plan, virtual = self._problem.plan, self._problem.virtual
    found: dict[str, Any] = {}
    if virtual:
      found["virtual_seconds"] = round(virtual.at(plan.rounds(step)), 6)
      found |= virtual.columns(plan.rounds(step))
    if self.facts.epsilon:
      found["epsilon"] = self.facts.epsilon(math.ceil(plan.rounds(step)))
    return found


def of_any(run: "BaseRun", evaluate: "Evaluate") -> dict[str, Any]:
  """Returns the entries that every run has: the configuration, the end, and the measurements."""
  return {
    **run.config.named(),
    "steps": run.step,
    "stopped_because": run.reason,
    "seconds": round(run.timing.elapsed(), 3),
    "compile_seconds": round(run.timing.compiling, 3),
    **evaluate.initial,
    "train_loss": evaluate.row.get("train_loss"),
    "eval": evaluate.row.get("eval", {}),
    "evaluated_on": evaluate.evaluated_on,
    **({"measured_on": evaluate.measured_on} if evaluate.measured_on else {}),
  }


def summarized(
  run: "Run", evaluate: "Evaluate", costs: Costs, network: "Network"
) -> dict[str, Any]:
  """Returns the contents of summary.json.

  Args:
    run: the finished run.
    evaluate: the run's evaluations.
    costs: the run's costs.
    network: the network counters of the run's hosts.
  """
  job = run.job
  is_cut = len(job.axes) > len(worker_axes(job.axes))
  return {
    **of_any(run, evaluate),
    "workers": job.workers if job.order is None else len(job.sizes),
    "steps_per_second": round(run.timing.steps_per_second(), 3),
    "aggregated": "per shard" if is_cut else "whole leaves",
    **run.data.sampled,
    "wire": _wire(run, costs, network, run.plan.jobs[run.plan.stage(run.step)]),
    **{f"{name}_reaches": found.share for name, found in costs.reaches.items()},
    **costs.facts.found,
    **costs.spent(run.step),
    **_overlap(run),
    "params_sha256": params_sha256(run.params()),
  }


def _overlap(run: "Run") -> dict[str, Any]:
  """Returns how much of the exchange overlapped with the computation, if the executor overlaps."""
  if run.problem.executor.alone is None or run.reason not in COMPLETE:
    return {}
  compute, exchange = run.alone()
  step = 1 / run.timing.steps_per_second()
  hidden = min(1.0, max(0.0, (compute + exchange - step) / exchange))
  milliseconds = {"compute": compute, "exchange": exchange, "step": step}
  found = {f"{name}_milliseconds": round(1000 * x, 4) for name, x in milliseconds.items()}
  return {"overlap": {"hidden": round(hidden, 4), **found}}


def _wire(run: "Run", costs: Costs, network: "Network", last: Any) -> dict[str, Any]:
  """Returns the bytes by axis; `last` is the job of the last stage."""
  job = run.problem.job
  rounds = max(1, run.timing.largest // last.method.local_steps)
  shared = wire.by_axis(traffic.of_metrics(last, rounds), rounds * last.method.local_steps)
  steps = max(job.method.local_steps, run.step)
  transfers = costs.sent.transfers(steps)
  dense = wire.by_axis(traffic.of_dense(job))
  return {
    "bytes_per_step_per_worker": wire.by_axis(transfers, steps) if job.order is None else {},
    "metrics_bytes_per_step_per_worker": shared,
    "total_bytes_per_worker": costs.sent.until(run.step),
    "dense_bytes_per_step_per_worker": sum(dense.values()),
    "transfers": wire.table(transfers, steps),
    **network.summary(),
  }


def params_sha256(params: Params) -> str:
  """Returns the SHA-256 of the parameters' names, dtypes, shapes and bits, in tree order.

  Args:
    params: the parameters, possibly sharded.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
    whole = sharded.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))
    digest.update(np.ascontiguousarray(jax.device_get(whole(leaf))).tobytes())
  return digest.hexdigest()
