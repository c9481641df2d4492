"""Compares film recommendation with peer libraries; `bench.py` runs this application."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.applications import film_peers
from experiments.applications.measured import Rows, power, row, run
from research.core.spec import Call, calls

FOLDS = ("u1", "u2", "u3")
RIDGE: dict[str, Any] = {"l2": 12.0, "power": 0.0, "bias": 0.2}  # chosen on part="validation"
Case = tuple[Callable[[str], Call], Call, dict[str, Any]]


def recommend(figure: Any) -> Rows:
  """Measures the prediction of stars, the ranking of liked films, and cold start on MovieLens."""
  predicted = stars()
  rows = [*predicted, *ranking(predicted[0]), *cold()]
  draw(figure, rows)
  return rows


def draw(figure: Any, rows: Rows) -> None:
  """Draws the errors and rankings of the rows; peers are gray.

  Args:
    figure: an empty figure.
    rows: the rows of a result.
  """
  panels = {
    "RMSE of predicted stars\n(lower is better)": ": mean RMSE over u1, u2, u3",
    "NDCG@10 of liked films\n(higher is better)": ": ndcg@10, mean over u1, u2, u3",
    "NDCG@10 of new films\n(higher is better)": ": ndcg@10, mean of 3 seeds",
  }
  for axes, (title, end) in zip(figure.subplots(1, 3), panels.items(), strict=True):
    bars: list[tuple[str, float, str]] = []
    for one in (one for one in rows if one["what"].endswith(end)):
      name = one["what"].removesuffix(end).removeprefix("items never rated, ")
      known = name in ("most popular films", "predicted stars")
      color = "silver" if known else "gray" if name.startswith("Cornac") else "tab:blue"
      bars.append((name.replace(", ", ",\n"), one["value"], color))
      if one["beside"].startswith("implicit's") and "," not in name:
        bars.append((f"{name} of implicit", one["peer"], "gray"))
    cornac_error = rows[0]["peer"] if "RMSE" in title else None
    if cornac_error:
      bars.append(("Cornac", cornac_error, "gray"))
    names, values, colors = zip(*reversed(bars), strict=True)
    axes.set(title=title)
    if "RMSE" in title:  # dots, since the axis does not begin at zero
      axes.scatter(values, names, c=colors, s=60)
      axes.grid(axis="x", alpha=0.3)
      axes.locator_params(axis="x", nbins=4)
    else:
      axes.barh(names, values, color=colors)


def stars() -> Rows:
  """Measures the RMSE of predicted stars, beside Cornac's factorization."""
  rows, mean = [], calls.mean()
  own = {key: value for key, value in RIDGE.items() if key != "l2"} | {"l2": 12.0, "own_l2": 12.0}
  cases: dict[str, Case] = {
    "factorization": (
      lambda fold: calls.movielens(fold, **RIDGE),
      adam(0.02, 1000),
      {"steps": 1000, "batch_size": 8000, "executor": "spmd"},
    ),
    "factorization, penalty per rating": (
      calls.movielens,
      adam(0.05, 300),
      {"steps": 300, "batch_size": 8000, "executor": "spmd"},
    ),
    "factorization, penalty per rating, SGD stopped early": (
      lambda fold: calls.movielens(fold, l2=0.08, scale=0.01),
      calls.data_parallel(calls.sgd(40.0), mean),
      {"steps": 1000, "batch_size": 8000, "executor": "spmd"},
    ),
    "least squares": (
      lambda fold: calls.movielens_als(fold, **RIDGE),
      power(mean),
      {"steps": 50},
    ),
    "users' own": (
      lambda fold: calls.movielens_federated(fold, **own),
      adam(0.03, 200),
      {"steps": 200},
    ),
  }
  error, fit = film_peers.cornac(FOLDS) or (None, None)
  for name, case in cases.items():
    found = folds(case)
    what = f"{name}: mean RMSE over u1, u2, u3"
    rows.append(row(what, found["rmse"], "Cornac's biased factorization", error, **found))
    what = f"{name}: seconds of training, a fold; two devices"
    rows.append(row(what, found["trained"], "Cornac's fit", fit, with_start=found["seconds"]))
  longer = film_peers.cornac(FOLDS, max_iter=400)
  if longer:
    what = "Cornac, 400 passes: mean RMSE over u1, u2, u3"
    rows.append(row(what, longer[0], "Cornac, 100 passes", error))
  one, eight = (
    run(calls.movielens_als(), power(mean), mesh=f"data:{n}", steps=20)[0]["eval"]["rmse"]
    for n in (1, 8)
  )
  rows.append(row("least squares, 8 workers: RMSE", eight, "1 worker", one))
  return rows


def ranking(by_stars: dict[str, Any]) -> Rows:
  """Measures how the films that users like are ranked, beside the library `implicit`.

  Args:
    by_stars: the row of the factorization that predicts stars, with its ranking metrics.
  """
  rows: Rows = []
  cases: dict[str, Case] = {
    "BPR": (calls.movielens_bpr, adam(0.01, 3000), {"steps": 3000, "batch_size": 2000}),
    "iALS, users' own": (calls.movielens_implicit_federated, adam(0.01, 200), {"steps": 200}),
    "iALS": (calls.movielens_implicit, power(calls.mean()), {"steps": 30}),
  }
  popular = film_peers.popular(FOLDS)
  peers = {"iALS": film_peers.implicit_als(FOLDS), "BPR": film_peers.implicit_bpr(FOLDS)}
  for label, known in (("most popular films", popular), ("predicted stars", by_stars)):
    for name in ("ndcg@10", "recall@10"):
      rows.append(row(f"{label}: {name}, mean over u1, u2, u3", known[name]))
  for name, case in cases.items():
    found, beside = folds(case), peers.get(name.split(",")[0])
    for metric in ("ndcg@10", "recall@10"):
      what = f"{name}: {metric}, mean over u1, u2, u3"
      peer = f"implicit's {name.split(',')[0]}" if beside else ""
      rows.append(row(what, found[metric], peer, beside[metric] if beside else None, **found))
  one, eight = (
    run(calls.movielens_implicit(), power(calls.mean()), mesh=f"data:{n}", steps=20)[0]["eval"]
    for n in (1, 8)
  )
  rows.append(row("iALS, 8 workers: ndcg@10", eight["ndcg@10"], "1 worker", one["ndcg@10"]))
  return rows


def cold() -> Rows:
  """Measures how features help with films that nobody has rated."""
  rows: Rows = []
  base: dict[str, float] = {}
  for kind in ("factors", "features", "both"):
    task = calls.movielens("cold_items", model_of=kind, l2=0.15)
    flags_ = {"mesh": "data:2", "steps": 500, "batch_size": 6400}
    seeds = [run(task, adam(0.03, 500), seed=n, **flags_)[0]["eval"] for n in range(3)]
    means = {k: float(np.mean([f[k] for f in seeds])) for k in seeds[0]}
    base = base or means
    for name in ("rmse", "ndcg@10"):
      what = f"items never rated, {kind}: {name}, mean of 3 seeds"
      rows.append(row(what, means[name], "factors", base[name], **means))
  return rows


def folds(case: Case) -> dict[str, float]:
  """Returns a case's means over the folds: its metrics, and the seconds of training and in all."""
  task, method, flags_ = case
  found = [run(task(fold), method, mesh="data:2", **flags_)[0] for fold in FOLDS]
  means = {k: float(np.mean([f["eval"][k] for f in found])) for k in found[0]["eval"]}
  means["trained"] = float(np.mean([f["steps"] / f["steps_per_second"] for f in found]))
  return means | {"seconds": float(np.mean([f["seconds"] for f in found]))}


def adam(rate: float, steps: int) -> Call:
  """Returns data-parallel Adam with a cosine schedule."""
  return calls.data_parallel(calls.adam(calls.cosine_decay_schedule(rate, steps)), calls.mean())
