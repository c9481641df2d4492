"""Measures the applications beside their peers: search, finance, medicine, recommending.

    python experiments/applications/measure.py --cases=search,finance,medicine,recommend \
        --out=results/applications

Writes OUT/CASE/result.json (rows with commit and hardware), table.md and figure.png. Needs the data
files and, for the comparisons that have one, `pip install -e ".[applications]"`.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

from absl import app, flags, logging

from experiments import run
from experiments.applications import films, hospitals, portfolios, search
from experiments.applications.measured import Rows
from research.core.text import quoted
from research.training import environment

FLAGS = flags.FLAGS

CASES: dict[str, Callable[[Any], Rows]] = {
  "search": search.search,
  "finance": portfolios.finance,
  "medicine": hospitals.medicine,
  "recommend": films.recommend,
}


def write(case: str, folder: Path) -> None:
  """Measures a case and writes what came out."""
  from matplotlib.figure import Figure

  from research.training import folder as folders
  from research.training.reports import figures, report

  figure = Figure(figsize=(10, 4), layout="constrained")
  rows = CASES[case](figure)
  folder.mkdir(parents=True, exist_ok=True)
  result = {"case": case, "rows": rows, "environment": folders.environment()}
  report.write_json(folder / "result.json", result)
  lines = ["| what | value | beside | |", "|---|---|---|---|"]
  for one in rows:
    peer = "" if one["peer"] is None else f"{one['peer']:.6g}"
    lines.append(f"| {one['what']} | {one['value']:.6g} | {one['beside']} | {peer} |")
  report.write_text(folder / "table.md", "\n".join(lines) + "\n")
  with figures.drawing(folder / "figure.png") as path:
    figures.save(figure, path, dpi=110)


def main(argv: list[str]) -> None:
  """Each case that is named, in its folder."""
  del argv
  logging.set_verbosity(logging.WARNING)
  for case in FLAGS.cases.split(","):
    if case not in CASES:
      near = difflib.get_close_matches(case, CASES, 1)
      hint = f"; did you mean '{near[0]}'?" if near else ";"
      run.fail(2, f"--cases={quoted(case)}: unknown{hint} legal: {', '.join(CASES)}")
  with run.one_line_errors():
    environment.start_jax()
    out = run.results_folder("out", FLAGS.out, "results/applications")
    for case in FLAGS.cases.split(","):
      write(case, out / case)


if __name__ == "__main__":
  flags.DEFINE_string("cases", ",".join(CASES), "What to measure.")
  flags.DEFINE_string("out", "results/applications", "Folder of the results.")
  app.run(main, flags_parser=run.parse_flags)
