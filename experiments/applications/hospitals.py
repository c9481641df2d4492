"""Medicine over hospitals: pooled, federated, noisy and alone. An application of `bench.py`."""

from typing import Any

import numpy as np

from experiments.applications.measured import Rows, row, run

SPLITS = 5  # into training and test patients; results are means over them


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
