"""Compares film recommendation with a peer library; `bench.py` runs this application."""

# pyright: reportMissingImports=false
# Only the extra `applications` installs Cornac.
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.applications.measured import Rows, power, row, run
from research.core.spec import Call, calls

FOLDS = ("u1", "u2", "u3")


def recommend(figure: Any) -> Rows:
  """Measures several recommenders on MovieLens, including private user factors and cold start."""
  rows, axes = [], figure.subplots(1, 2)
  als, mean = calls.movielens_als, calls.mean()
  cases: dict[str, tuple[Callable[[str], Call], Call, dict[str, Any]]] = {
    "factorization": (
      calls.movielens,
      adam(0.05, 300),
      {"steps": 300, "batch_size": 8000, "executor": "spmd"},
    ),
    "least squares": (als, power(mean), {"steps": 30}),
    "users' own": (calls.movielens_federated, adam(0.03, 200), {"steps": 200}),
  }
  peer = cornac() or (None, None)
  for name, (task, method, flags_) in cases.items():
    folds = [run(task(f), method, mesh="data:2", **flags_)[0] for f in FOLDS]
    means = {k: float(np.mean([f["eval"][k] for f in folds])) for k in folds[0]["eval"]}
    what = f"{name}: mean RMSE over u1, u2, u3"
    rows.append(row(what, means["rmse"], "Cornac's biased factorization", peer[0], **means))
    trained = float(np.mean([f["steps"] / f["steps_per_second"] for f in folds]))
    whole = float(np.mean([f["seconds"] for f in folds]))
    what = f"{name}: seconds of training, a fold; two devices"
    rows.append(row(what, trained, "Cornac's fit", peer[1], with_start_and_measuring=whole))
    axes[0].barh(name, means["rmse"])
  if peer[0]:
    axes[0].barh("Cornac", peer[0], color="gray")
  axes[0].set(title="RMSE, mean of u1-u3", xlim=(0.85, 1))
  one, eight = (
    run(als(), power(mean), mesh=f"data:{n}", steps=20)[0]["eval"]["rmse"] for n in (1, 8)
  )
  rows.append(row("least squares, 8 workers: RMSE", eight, "1 worker", one))
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
    axes[1].barh(kind, means["ndcg@10"])
  axes[1].set(title="NDCG@10 of films that nobody rated")
  return rows


def adam(rate: float, steps: int) -> Call:
  """Returns data-parallel Adam with a cosine schedule."""
  return calls.data_parallel(calls.adam(calls.cosine_decay_schedule(rate, steps)), calls.mean())


def cornac() -> tuple[float, float] | None:
  """Measures the mean RMSE and the seconds per fit of Cornac's biased matrix factorization."""
  try:
    from cornac.data import Dataset
    from cornac.models import MF
  except ImportError:
    return None
  from research.tasks.recommend import movielens

  errors, seconds = [], []
  for fold in FOLDS:
    train, test = movielens.load(fold)
    columns = (column.tolist() for column in train)
    data = Dataset.build(list(zip(*columns, strict=True)))
    model = MF(k=10, max_iter=100, learning_rate=0.01, lambda_reg=0.1, use_bias=True, seed=0)
    start = time.perf_counter()
    model.fit(data)
    seconds.append(time.perf_counter() - start)
    # users and items without training ratings have no bias and no factors
    pad = lambda table: np.concatenate([table, np.zeros((1, *table.shape[1:]), table.dtype)])
    user = np.array([data.uid_map.get(u, -1) for u in test.user.tolist()])
    item = np.array([data.iid_map.get(i, -1) for i in test.item.tolist()])
    p, q = pad(model.u_factors)[user], pad(model.i_factors)[item]
    stars = model.global_mean + pad(model.u_biases)[user] + pad(model.i_biases)[item]
    stars = np.clip(stars + np.sum(p * q, 1), movielens.LEAST, movielens.MOST)
    errors.append(float(np.sqrt(np.mean((stars - test.stars) ** 2))))
  return float(np.mean(errors)), float(np.mean(seconds))
