"""Compares PageRank, learning to rank and BM25 with peers; `bench.py` runs this application."""

# pyright: reportMissingImports=false
# Only the extra `applications` installs LightGBM.
import time
from typing import Any

import numpy as np

from experiments.applications.measured import Rows, power, row, run
from research.core.spec import calls


def pagerank(axes: Any) -> Rows:
  """Measures PageRank on wiki-Vote, and compares it with SciPy on a graph of 10^7 edges."""
  from scipy import sparse

  from research.tasks.search import graphs

  rows, wiki = [], {"task": calls.pagerank(), "x64": True, "mesh": "data:8", "eval_every": 1}
  wiki["partition"] = "sorted()"
  dense = 0.0
  exact, coded = calls.mean(), calls.two_phase(calls.int8())
  for aggregator in (exact, calls.error_feedback(coded), calls.ef21(coded)):
    steps = 45 if aggregator == exact else 120
    summary, found = run(method=power(aggregator), steps=steps, **wiki)
    curve = [(x["step"], x["eval"]["residual"]) for x in found if "eval" in x]
    sent = sum(summary["wire"]["bytes_per_step_per_worker"].values())
    dense = dense or sent
    axes[0].semilogy(*zip(*curve, strict=True), label=f"{aggregator}, {sent:,.0f} bytes")
    limits = (1e-6, 1e-10, 1e-14) if aggregator == exact else (1e-6,)
    for limit in limits:
      first = next((step + 1 for step, value in curve if value <= limit), None)
      least = min(value for _, value in curve)
      what = f"wiki-Vote, {aggregator}: iterations to a change of {limit:g}"
      if first is None:
        what, first = f"wiki-Vote, {aggregator}: least change in {steps} iterations", least
      rows.append(row(what, first, share_of_dense_bytes=sent / dense, least=least))
  graph = graphs.power_law(10_000_000, 1_000_000)
  ones, ends = np.ones(len(graph.source), np.float32), (graph.target, graph.source)
  matrix = sparse.csr_array((ones, ends), (graph.nodes, graph.nodes))
  x, times = np.full(graph.nodes, 1e-6, np.float32), []
  for _ in range(9):
    start = time.perf_counter()
    _ = matrix @ x
    times.append(time.perf_counter() - start)
  del matrix, ones, graph
  flags_ = {"mesh": "data:2", "executor": "spmd", "partition": "sorted()"}
  summary, _ = run(
    calls.pagerank("power_law"), power(exact), steps=60, steps_per_dispatch=20, **flags_
  )
  each = 1 / summary["steps_per_second"]
  peer = float(np.median(times))
  what = "10^7 edges: seconds per iteration, two devices"
  return [*rows, row(what, each, "scipy.sparse product, one core", peer)]


def search(figure: Any) -> Rows:
  """Measures PageRank, learning to rank compared with LightGBM, and BM25."""
  axes = figure.subplots(1, 2)
  rows = pagerank(axes)
  axes[0].set(title="PageRank of wiki-Vote", xlabel="iteration", ylabel="L1 of the residual")
  axes[0].legend(fontsize=7)
  peer, bars = lightgbm(), {}
  adamw = calls.adamw(calls.cosine_decay_schedule(1e-3, 400), weight_decay=0.1)
  method = calls.data_parallel(adamw, calls.mean())
  for loss, model in (
    ("lambdarank", "mlp([64])"),
    ("listnet", "mlp([64])"),
    ("pairwise", "mlp([64])"),
    ("lambdarank", "linear()"),
  ):
    found = [
      run(calls.rank(loss), method, model=model, steps=400, batch_size=40, seed=seed)[0]["eval"]
      for seed in range(3)
    ]
    means = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    name = f"{loss}, {model}"
    bars[name] = means["ndcg@10"]
    what = f"LightGBM's example, {name}: NDCG@10, mean of 3 seeds"
    rows.append(row(what, bars[name], "LightGBM lambdarank", peer, **means))
  bars |= {"LightGBM": peer} if peer else {}
  axes[1].barh(list(bars), list(bars.values()))
  axes[1].set(title="NDCG@10 on the test queries", xlim=(0.6, 0.8))
  tune, still = (calls.data_parallel(o, calls.mean()) for o in (calls.adam(0.05), calls.sgd(1e-30)))
  before = run(calls.bm25(), still, mesh="data:2", steps=1)[0]["eval"]
  tuned = run(calls.bm25(), tune, mesh="data:2", steps=200)[0]["eval"]
  rows.append(row("Cranfield, BM25 tuned: MAP", tuned["map"], "defaults", before["map"], **tuned))
  both = run(calls.cranfield(), tune, mesh="data:2", steps=100)[0]["eval"]
  what = "Cranfield, LambdaRank on BM25, title, prior, length: MAP"
  return [*rows, row(what, both["map"], "BM25 by default", before["map"], **both)]


def lightgbm() -> float | None:
  """Measures NDCG@10 of LightGBM's ranker, with the settings of LightGBM's own example."""
  try:
    import lightgbm as peer
  except ImportError:
    return None
  from research.tasks.search import ranking

  train, test = (ranking.load(part, "") for part in ("rank.train", "rank.test"))
  sets = [(p["x"][p["present"]], p["relevance"][p["present"]], p["present"].sum(1))
          for p in (train, test)]  # fmt: skip
  settings = {
    "objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "num_leaves": 31, "verbose": -1,
    "learning_rate": 0.1, "bagging_freq": 1, "bagging_fraction": 0.9, "min_data_in_leaf": 50,
    "min_sum_hessian_in_leaf": 5.0, "num_threads": 2,
  }  # fmt: skip
  data = peer.Dataset(sets[0][0], sets[0][1], group=sets[0][2])
  held = peer.Dataset(sets[1][0], sets[1][1], group=sets[1][2], reference=data)
  found: dict[str, Any] = {}
  record = peer.record_evaluation(found)
  peer.train(settings, data, 100, valid_sets=[held], callbacks=[record])
  return float(found["valid_0"]["ndcg@10"][-1])
