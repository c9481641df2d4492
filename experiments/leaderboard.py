"""Tunes and ranks methods on a language model, with the same number of trials for each method.

    RESEARCH_DATA_DIR=... python experiments/leaderboard.py --out=runs/leaderboard

Eight simulated workers train a small transformer on the characters of tinyshakespeare, once with
i.i.d. data and once with different roles on every worker. For every method, --trials runs draw the
method's parameters at random from its stated ranges (experiments/benchmarks/contestants.py). The
trial with the lowest training loss wins. It is repeated with --seeds fresh seeds, and the loss of
these runs on held-out text is reported. --contestants="Dion;DiLoCo" selects methods by name.

Every run has its own folder under --out, so the same command continues an interrupted leaderboard.
--data=iid measures one kind of data alone. The results are written to leaderboard.json,
leaderboard.md, leaderboard.png and steps.png (the loss against the steps) in --out. The hours
of training are predicted on three links, for --chips chips of type --chip per worker and the model
of --preset; see reports/ranking.py.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.benchmarks.contestants import CONTESTANTS, Contestant
from experiments.compare import split
from research.command.errors import exit_if_stopped, one_line_errors
from research.command.flags import define_compilation_cache, launch
from research.command.start import results_folder, use_compilation_cache
from research.core import checks
from research.core.checks import unknown
from research.training.config import Config, UsageError, flag

if TYPE_CHECKING:
  from experiments.reports.ranking import Place

FLAGS = flags.FLAGS
OUT = "runs/leaderboard"
MODEL = "transformer(layers=2, width=64, heads=4, kv_heads=4, hidden=184, deviation=0.1)"
DATA = {
  "iid": ("tinyshakespeare(context=64)", "iid()"),
  "roles": ("tinyshakespeare(context=64, by_role=True)", "sorted()"),
}
FRESH = 101  # the first seed that no trial has used


def chosen(text: str) -> list[Contestant]:
  """Returns the contestants that a list of names selects, or all of them if the list is empty.

  Raises:
    UsageError: if a name is unknown.
  """
  by_name = {one.name: one for one in CONTESTANTS}
  names = split(text) or [*by_name]
  for name in names:
    if name not in by_name:
      raise UsageError(f"--contestants='{name}': {unknown(name, by_name)}")
  return [by_name[name] for name in names]


def run(folder: Path, data: str, method: str, seed: int) -> dict[str, Any] | None:
  """Trains one run, or reads its results if it is complete.

  Returns:
    The run's summary, or None if the run diverged.
  """
  from research.training import loop

  task, partition = DATA[data]
  steps = FLAGS.steps
  config = Config(
    task=task,
    partition=partition,
    model=FLAGS.model,
    method=method,
    mesh="data:8",
    batch_size=FLAGS.batch_size,
    steps=steps,
    seed=seed,
    log_every=max(1, steps // 16),
    eval_every=steps,
    checkpoint_every=steps,
    out=str(folder),
  )
  print(f"{folder}: {method}", file=sys.stderr, flush=True)
  try:
    summary, _ = loop.train(config)
  except loop.NonFinite:
    return None
  exit_if_stopped(summary)
  return summary


def tuned(folder: Path, data: str, contestant: Contestant) -> dict[str, Any]:
  """Runs a contestant's trials, then the winner with fresh seeds.

  Returns:
    The row of the leaderboard: every trial's parameters and training loss, the winner's spec, and
    the summaries and the mean training loss by step of the fresh seeds.
  """
  trials = []
  for trial in range(FLAGS.trials):
    values = contestant.drawn(trial)
    summary = run(folder / f"trial-{trial}", data, contestant.built(values, FLAGS.steps), trial + 1)
    trials.append({"values": values, "train_loss": summary and summary["train_loss"]})
  loss = lambda trial: math.inf if trial["train_loss"] is None else trial["train_loss"]
  best = min(trials, key=loss)
  spec = contestant.built(best["values"], FLAGS.steps)
  seeds = {seed: folder / f"seed-{seed}" for seed in range(FRESH, FRESH + FLAGS.seeds)}
  fresh = [run(path, data, spec, seed) for seed, path in seeds.items()]
  return {
    "name": contestant.name,
    "data": data,
    "spec": spec,
    "ranges": contestant.ranges,
    "trials": trials,
    "fresh": fresh,
    "curve": [] if None in fresh else _curve([*seeds.values()]),
  }


def _curve(folders: list[Path]) -> list[tuple[int, float]]:
  """Returns the steps of the rows that all runs have written, and their mean training loss."""
  losses: dict[int, list[float]] = {}
  for folder in folders:
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
      if row.get("loss") is not None:
        losses.setdefault(row["step"], []).append(row["loss"])
  every = {step: found for step, found in losses.items() if len(found) == len(folders)}
  return [(step, statistics.mean(found)) for step, found in sorted(every.items())]


def _place() -> "Place":
  """Returns the model and the machines for which hours are predicted.

  Raises:
    UsageError: if a flag is invalid.
  """
  from experiments.reports.ranking import Place

  values: dict[str, Any] = {name: FLAGS[name].value for name in Place._fields}
  try:
    return Place(**values).check()
  except ValueError as error:
    raise UsageError(f"--{error}") from error


def main(argv: list[str]) -> None:
  """Runs the missing trials, and writes and prints the leaderboard."""
  del argv
  with one_line_errors():
    out = results_folder("out", FLAGS.out, OUT)
    use_compilation_cache(FLAGS.compilation_cache)
    from experiments.reports import ranking
    from research.training import folder as folders
    from research.training.reports import report

    contestants, place = chosen(FLAGS.contestants), _place()
    with flag("data", ",".join(FLAGS.data)):
      for name in FLAGS.data:
        checks.one_of("data", name, DATA)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for data in FLAGS.data:
      for contestant in contestants:
        name = "".join(c if c.isalnum() else "-" for c in contestant.name.lower())
        rows.append(tuned(out / data / name, data, contestant))
        found = ranking.ranked(rows, place)
        found["environment"] = folders.environment()
        report.write_json(out / "leaderboard.json", found)
    report.write_text(out / "leaderboard.md", ranking.markdown(found))
    ranking.draw(out / "leaderboard.png", found)
    ranking.draw_curves(out / "steps.png", found)
    print(ranking.markdown(found), flush=True)


if __name__ == "__main__":
  flags.DEFINE_string("out", "", f"Results folder; by default {OUT}.")
  flags.DEFINE_string("contestants", "", "Names of methods, separated by ';'; empty: all.")
  flags.DEFINE_list("data", [*DATA], "Kinds of data: iid, roles.")
  flags.DEFINE_string("model", MODEL, "Model of all runs.")
  flags.DEFINE_integer("trials", 5, "Runs with random parameters per method and data.", 1)
  flags.DEFINE_integer("seeds", 3, "Fresh seeds of the winner.", 1)
  flags.DEFINE_integer("steps", 512, "Local steps of a run.", 16)
  flags.DEFINE_integer("batch_size", 32, "Windows of 64 characters per step, of all workers.", 8)
  flags.DEFINE_string("preset", "8b", "Hours are predicted for this preset of transformer,")
  flags.DEFINE_string("chip", "v5p", "trained on this chip,")
  flags.DEFINE_integer("chips", 64, "with so many chips per worker,", 1)
  flags.DEFINE_integer("tokens", 2**20, "so many tokens per worker and step,", 1)
  flags.DEFINE_float("utilization", 0.5, "at this share of the chip's peak rate.")
  define_compilation_cache()
  launch(main, __doc__)
