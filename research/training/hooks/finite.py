"""Ends a run whose loss, state or evaluation is no longer finite."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class NonFinite(Exception):
  """Reports that the loss or the state of a run is no longer finite."""


def check_rounds(first: int, last: int, metrics: Mapping[str, Any], kept: str) -> None:
  """Raises an error if a loss or a state of a dispatch is not finite.

  Args:
    first: number of local steps before the dispatch.
    last: number of local steps at the end of the dispatch.
    metrics: the metrics on the host: "loss" [last - first] and "finite".
    kept: a description of the checkpoint that the run leaves, for the message.

  Raises:
    NonFinite: if a value is not finite; the message names the first five steps with such values.
  """
  bad = first + 1 + np.flatnonzero(~np.isfinite(metrics["loss"]))
  if bad.size:
    shown = ", ".join(map(str, bad[:5])) + (f" and {bad.size - 5} more" if bad.size > 5 else "")
    raise NonFinite(f"the loss is not finite at step {shown}; {kept}")
  if not metrics["finite"]:
    steps = f"{first + 1} to {last}"
    raise NonFinite(f"the state became non-finite in one of the steps {steps}; {kept}")


def wrong(row: Mapping[str, Any], label: Callable[[str], str]) -> list[str]:
  """Returns the names of the metrics of an evaluation that are not finite.

  Args:
    row: "train_loss", "eval" by metric, and, if computed, "gradient_norm".
    label: maps the name of a metric to its label.
  """
  named = {label(name): value for name, value in row["eval"].items()}
  named |= {"training loss": row["train_loss"]}
  named |= {"gradient norm": row["gradient_norm"]} if "gradient_norm" in row else {}
  return [name for name, value in named.items() if not math.isfinite(value)]
