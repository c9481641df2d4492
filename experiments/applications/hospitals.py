"""Trains on hospitals' data: pooled, federated, noisy, alone; `bench.py` runs this application."""

from typing import Any

import numpy as np

from experiments.applications.measured import Rows, row, run
from research.core.spec import Call, calls

SPLITS = 5  # number of splits into training and test patients; results are means over the splits


def medicine(figure: Any) -> Rows:
  """Measures training for five hospitals: pooled, federated, private, masked, and each alone."""
  rows, axes = [], figure.subplots(1, 2)
  cases = (("breast_cancer", "auc"), ("diabetes", "rmse"))
  for axis, (task, metric) in zip(axes, cases, strict=True):
    for place, shift in enumerate(("label", "features")):
      method = lambda aggregator: calls.fed_avg(calls.sgd(0.1), aggregator, period=5)
      plain = method(calls.mean())
      often = {"steps": 5000, "partition": "sorted()"}
      noisy = lambda noise: calls.noisy(calls.mean(), clip=0.5, noise=noise)
      kinds: dict[str, tuple[dict[str, int], Call, str]] = {
        "pooled": ({}, plain, "data:1"),
        "federated": ({}, plain, "data:5"),
        "secure sum": ({}, method(calls.secure_sum(clip=10.0)), "data:5"),
        "noise": ({}, method(noisy(0.3)), "data:5"),
        "much noise": ({}, method(noisy(20.0)), "data:5"),
      }
      for n in range(1, 6):
        kinds[f"alone {n}"] = ({"hospitals": 5, "only": n}, plain, "data:1")
      pooled = np.nan
      for name, (more, how, mesh) in kinds.items():
        found = [
          run(getattr(calls, task)(shift, **more, split=split), how, mesh=mesh, **often)[0]
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
