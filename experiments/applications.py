"""Measures the applications beside their peers: search, finance, medicine, recommending.

    python experiments/applications.py --cases=search,finance,medicine,recommend \
        --out=results/applications

Writes OUT/CASE/result.json (rows with commit and hardware), table.md and figure.png. Needs the data
files and, for the comparisons that have one, `pip install -e ".[applications]"`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import numpy as np
from absl import app, flags, logging

from experiments import films, portfolios, search
from experiments.measured import Rows, row, run

FLAGS = flags.FLAGS


SPLITS = 5  # into training and test patients, over which means are taken


def medicine(figure: Any) -> Rows:
  """Five hospitals: pooled, federated, private, masked, and each alone."""
  rows, axes = [], figure.subplots(1, 2)
  cases = (("breast_cancer", "auc"), ("diabetes", "rmse"))
  for axis, (task, metric) in zip(axes, cases, strict=True):
    for place, shift in enumerate(("label", "features")):
      method = lambda a="mean()": f"fed_avg(sgd(0.1), {a}, period=5)"
      often = {"steps": 5000, "partition": "sorted()"}
      kinds: dict[str, tuple[str, str, str]] = {
        "pooled": ("", method(), "data:1"),
        "federated": ("", method(), "data:5"),
        "secure sum": ("", method("secure_sum(clip=10.0)"), "data:5"),
        "noise": ("", method("noisy(mean(), clip=0.5, noise=0.3)"), "data:5"),
        "much noise": ("", method("noisy(mean(), clip=0.5, noise=20.0)"), "data:5"),
      }
      for n in range(1, 6):
        kinds[f"alone {n}"] = (f", hospitals=5, only={n}", method(), "data:1")
      pooled = np.nan
      for name, (more, how, mesh) in kinds.items():
        found = [
          run(f"{task}('{shift}'{more}, split={split})", how, mesh=mesh, **often)[0]
          for split in range(SPLITS)
        ]
        means = {k: float(np.mean([f["eval"][k] for f in found])) for k in found[0]["eval"]}
        spread = float(np.std([f["eval"][metric] for f in found]))
        value = means[metric]
        pooled = value if name == "pooled" else pooled
        spent = f", epsilon {found[0]['epsilon']:.3g}" if "epsilon" in found[0] else ""
        where = f"{task}, {shift} shift, {name}{spent}"
        if "accuracy" in means:
          rows.append(row(f"{where}: accuracy", means["accuracy"]))
        rows.append(row(f"{where}: {metric}", value, "pooled", pooled, deviation=spread))
        color = "gray" if name.startswith("alone") else None
        axis.barh(f"{shift}: {name}", value, xerr=spread, color=color or f"C{place}")
    axis.set(
      title=f"{task}: {metric}, {SPLITS} splits", xlim=(0.8, 1) if metric == "auc" else (40, 140)
    )
    axis.tick_params(labelsize=7)
  return rows


CASES: dict[str, Callable[[Any], Rows]] = {
  "search": search.search,
  "finance": portfolios.finance,
  "medicine": medicine,
  "recommend": films.recommend,
}


def write(case: str, folder: Path) -> None:
  """Measures a case and writes what came out."""
  import matplotlib as mpl

  mpl.use("Agg")
  from matplotlib.figure import Figure

  from research.train import folder as folders
  from research.train import report

  figure = Figure(figsize=(10, 4), layout="constrained")
  rows = CASES[case](figure)
  folder.mkdir(parents=True, exist_ok=True)
  result = {"case": case, "rows": rows, "environment": folders.environment()}
  report.write_json(folder / "result.json", result)
  lines = ["| what | value | beside | |", "|---|---|---|---|"]
  for one in rows:
    peer = "" if one["peer"] is None else f"{one['peer']:.6g}"
    lines.append(f"| {one['what']} | {one['value']:.6g} | {one['beside']} | {peer} |")
  (folder / "table.md").write_text("\n".join(lines) + "\n")
  figure.savefig(folder / "figure.png", dpi=110)


def main(argv: list[str]) -> None:
  """Each case that is named, in its folder."""
  del argv
  logging.set_verbosity(logging.WARNING)
  for case in FLAGS.cases.split(","):
    if case not in CASES:
      print(f"error: --cases='{case}' is none of {', '.join(CASES)}", file=sys.stderr)
      sys.exit(2)
  for case in FLAGS.cases.split(","):
    write(case, Path(FLAGS.out) / case)


if __name__ == "__main__":
  flags.DEFINE_string("cases", ",".join(CASES), "What to measure.")
  flags.DEFINE_string("out", "results/applications", "Folder of the results.")
  app.run(main)
