"""Runs a task and formats a row of a result; all applications use these functions."""

import sys
import tempfile
from typing import Any

from research.command.errors import exit_if_stopped
from research.core.spec import Call, calls
from research.training.config import Config

Rows = list[dict[str, Any]]
STEADY: dict[str, Any] = {"check_every": 0, "checkpoint_every": 0, "eval_every": 0}


def power(aggregator: Call) -> Call:
  """Returns the method that iterates a map T: SGD with step size 1 and gradient x - T(x)."""
  return calls.data_parallel(calls.sgd(1.0), aggregator)


def run(task: Call, method: Call, **flags_: Any) -> tuple[dict[str, Any], Rows]:
  """Runs a task with a method; returns the summary and the rows."""
  from research.training import loop
  from research.training.reports import report

  with tempfile.TemporaryDirectory() as folder:
    given: dict[str, Any] = STEADY | {"batch_size": "all", "out": f"{folder}/run"} | flags_
    summary, where = loop.train(Config(task=str(task), method=str(method), **given))
    exit_if_stopped(summary, saved=False)
    return summary, report.read_rows(where / "metrics.jsonl")


def row(what: str, value: float, peer: str = "", of_peer: float | None = None, **more: Any) -> dict:
  """Returns a row of the result: a measured value, and a reference value."""
  found = {"what": what, "value": float(value), "beside": peer, "peer": of_peer, **more}
  print(found, file=sys.stderr, flush=True)
  return found
