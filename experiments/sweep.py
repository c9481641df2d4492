"""Trains with a small grid of learning rates and seeds, and reports the best rate.

    python experiments/sweep.py --learning_rates=0.03,0.1,0.3 --seeds=0,1,2

The flags are those of run.py; each rate replaces `{learning_rate}` in --method. Every run has its
own folder under --out, so the same command resumes an interrupted sweep. The results are written to
sweep.json and sweep.md in --out. A run that diverges, or ends worse than its initial model, stays
in the table, but its rate cannot be named the best.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from absl import flags

from research.command.errors import exit_if_stopped, fail, one_line_errors
from research.command.flags import define_flags, launch
from research.command.start import results_folder, start
from research.core.text import whole_number
from research.training.config import Config

FLAGS = flags.FLAGS
METHOD = "data_parallel(sgd({learning_rate}, momentum=0.9), mean())"


def score(summary: dict[str, Any]) -> tuple[str, float]:
  """Returns a run's score: the accuracy, or else minus the loss; larger scores are better."""
  if "accuracy" in summary["eval"]:
    return f"{summary['evaluated_on']} accuracy", summary["eval"]["accuracy"]
  return "minus training loss", -summary["train_loss"]


def configs(config: Config, out: Path, rates: list[str], seeds: list[str]) -> list[list[Config]]:
  """Returns the runs by rate and seed; checks all runs and their folders before any run trains.

  Raises:
    UsageError: if a flag is invalid.
  """
  from research.training import assemble
  from research.training import folder as folders

  def one(rate: str, seed: str) -> Config:
    method = config.method.replace("{learning_rate}", rate)
    where = str(out / f"learning_rate={rate}-seed={seed}")
    found = config.replace(method=method, seed=seed_of(seed), out=where)
    assemble.check(found)
    folders.check(found)
    return found

  return [[one(rate, seed) for seed in seeds] for rate in rates]


def is_known(start: float | None) -> bool:
  """Returns whether the initial loss is known and finite."""
  return start is not None and math.isfinite(start)


def improved(summary: dict[str, Any]) -> bool:
  """Returns whether a run's training loss decreased and its accuracy did not decrease."""
  start, end = summary.get("initial_train_loss"), summary["train_loss"]
  before, after = (summary.get(name, {}).get("accuracy") for name in ("initial_eval", "eval"))
  worse = before is not None and after is not None and not after >= before
  return math.isfinite(end) and (not is_known(start) or end < start) and not worse


def grid(rates: list[str], runs: list[list[Config]]) -> list[dict[str, Any]]:
  """Trains every combination of learning rate and seed.

  Returns:
    One row per learning rate, with the score of each seed; None is the score of a diverged run. The
    entry `unimproved` lists the seeds whose runs ended worse than the initial model.
  """
  from research.training import loop

  rows = []
  for rate, of_seeds in zip(rates, runs, strict=True):
    scores: list[float | None] = []
    name, unimproved = "", []
    for config in of_seeds:
      told = f"learning rate {rate}, seed {config.seed}: {config.out}"
      print(told, file=sys.stderr, flush=True)
      try:
        summary, _ = loop.train(config)
      except loop.NonFinite as error:
        print(error, file=sys.stderr)
        scores.append(None)
        continue
      exit_if_stopped(summary)
      name, value = score(summary)
      scores.append(value)
      unimproved += [] if improved(summary) else [config.seed]
    row = {"learning_rate": float(rate), "by": name, "scores": scores, "unimproved": unimproved}
    rows.append(row)
  return rows


def seed_of(text: str) -> int:
  """Parses a seed in the same way as --seed.

  Raises:
    ValueError: if the text is not an integer in [0, 2^31).
  """
  number = whole_number(text)
  if number is None or number >= 2**31:
    raise ValueError(text)
  return number


def winner(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Returns the row with the best mean score among the rows in which every seed improved."""
  whole = [row for row in rows if None not in row["scores"] and not row["unimproved"]]
  return max(whole, key=lambda row: statistics.mean(row["scores"]), default=None)


def table(rows: list[dict[str, Any]]) -> str:
  """Formats a row per learning rate: mean and range over the seeds, and a mark if it is best."""
  best = winner(rows)
  name = next((row["by"] for row in rows if row["by"]), "score")
  lines = [f"| learning rate | {name}: mean | least | greatest | |", "|---|---|---|---|---|"]
  for row in rows:
    found = [value for value in row["scores"] if value is not None]
    count, lost = len(row["scores"]), len(row["scores"]) - len(found)
    figures = [f"{f(found):.5g}" if found else "" for f in (statistics.mean, min, max)]
    note = "winner" if row is best else f"{lost} of {count} diverged" if lost else ""
    if row["unimproved"] and not lost:
      note = f"{len(row['unimproved'])} of {count} did not improve"
    lines.append(f"| {row['learning_rate']:g} | {' | '.join(figures)} | {note} |")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Checks the grid, runs it and prints the table."""
  del argv
  rates, seeds = FLAGS.learning_rates, FLAGS.seeds
  if "{learning_rate}" not in FLAGS.method:
    fail(2, f"--method='{FLAGS.method}': write {{learning_rate}} where each rate goes")
  for name, values, legal in (("learning_rates", rates, float), ("seeds", seeds, seed_of)):
    if not values:
      fail(2, f"--{name}='': name at least one, with ',' between two")
    for value in values:
      try:
        legal(value)
      except ValueError:
        legal_set = "number" if legal is float else "whole number in [0, 2^31)"
        fail(2, f"--{name}={','.join(values)}: '{value}' is not a {legal_set}")
  with one_line_errors():
    out = results_folder("out", FLAGS.out, "runs/sweep")
    rows = grid(rates, configs(start(), out, rates, seeds))
    from research.training.reports import report

    report.write_json(out / "sweep.json", {"method": FLAGS.method, "seeds": seeds, "rows": rows})
    report.write_text(out / "sweep.md", table(rows) + "\n")
    print(table(rows), flush=True)


if __name__ == "__main__":
  define_flags()
  FLAGS.set_default("method", METHOD)
  flags.DEFINE_list("learning_rates", ["0.03", "0.1", "0.3"], "The rates to try.")
  flags.DEFINE_list("seeds", ["0"], "The seeds to try each rate with.")
  launch(main, __doc__)
