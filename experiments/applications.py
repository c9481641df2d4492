"""Measures the applications beside their peers: search, finance, medicine, recommending.

    python experiments/applications.py --cases=search,finance,medicine,recommend \
        --out=results/applications

Writes OUT/CASE/result.json (rows with commit and hardware), table.md and figure.png. Needs the data
files and, for the comparisons that have one, `pip install -e ".[applications]"`.
"""

# pyright: reportMissingImports=false
# LightGBM is in the extra `applications` alone.
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import numpy as np
from absl import app, flags, logging

from research.train.config import Config

FLAGS = flags.FLAGS

Rows = list[dict[str, Any]]
POWER = "data_parallel(sgd(1.0), {})"
STEADY: dict[str, Any] = {"check_every": 0, "checkpoint_every": 0, "eval_every": 0}


def run(task: str, method: str, **flags_: Any) -> tuple[dict[str, Any], Rows]:
  """The summary of a run, and its rows."""
  from research.train import loop, report

  with tempfile.TemporaryDirectory() as folder:
    given: dict[str, Any] = STEADY | {"batch_size": "all", "out": f"{folder}/run"} | flags_
    summary, where = loop.train(Config(task=task, method=method, **given))
    return summary, report.read_rows(where / "metrics.jsonl")


def row(what: str, value: float, peer: str = "", of_peer: float | None = None, **more: Any) -> dict:
  """A row of the result: what was measured, and what that is held against."""
  found = {"what": what, "value": float(value), "beside": peer, "peer": of_peer, **more}
  print(found, file=sys.stderr, flush=True)
  return found


def pagerank(axes: Any) -> Rows:
  """wiki-Vote to 1e-14, exactly and compressed; a graph of 10^7 edges against SciPy's product."""
  from scipy import sparse

  from research.tasks import graphs

  rows, wiki = [], {"task": "pagerank()", "x64": True, "mesh": "data:8", "eval_every": 1}
  wiki["partition"] = "sorted()"
  dense = 0.0
  for aggregator in ("mean()", *(f"{m}(two_phase(int8()))" for m in ("error_feedback", "ef21"))):
    steps = 45 if aggregator == "mean()" else 120
    summary, found = run(method=POWER.format(aggregator), steps=steps, **wiki)
    curve = [(x["step"], x["eval"]["residual"]) for x in found if "eval" in x]
    sent = sum(summary["wire"]["bytes_per_step_per_worker"].values())
    dense = dense or sent
    axes[0].semilogy(*zip(*curve, strict=True), label=f"{aggregator}, {sent:,.0f} bytes")
    limits = (1e-6, 1e-10, 1e-14) if aggregator == "mean()" else (1e-6,)
    for limit in limits:
      first = next((step + 1 for step, value in curve if value <= limit), np.nan)
      what = f"wiki-Vote, {aggregator}: iterations to a change of {limit:g}"
      rows.append(row(what, first, share_of_dense_bytes=sent / dense, least=curve[-1][1]))
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
    "pagerank('power_law')", POWER.format("mean()"), steps=60, steps_per_dispatch=20, **flags_
  )
  each = 1 / summary["steps_per_second"]
  peer = float(np.median(times))
  what = "10^7 edges: seconds per iteration, two devices"
  return [*rows, row(what, each, "scipy.sparse product, one core", peer)]


def search(figure: Any) -> Rows:
  """PageRank, learning to rank beside LightGBM, BM25."""
  axes = figure.subplots(1, 2)
  rows = pagerank(axes)
  axes[0].set(title="PageRank of wiki-Vote", xlabel="iteration", ylabel="L1 of the residual")
  axes[0].legend(fontsize=7)
  peer, bars = lightgbm(), {}
  rate = "data_parallel(adamw(cosine_decay_schedule(1e-3, 400), weight_decay=0.1), mean())"
  for loss, model in (
    ("lambdarank", "mlp([64])"),
    ("listnet", "mlp([64])"),
    ("pairwise", "mlp([64])"),
    ("lambdarank", "linear()"),
  ):
    found = [
      run(f"rank('{loss}')", rate, model=model, steps=400, batch_size=40, seed=seed)[0]["eval"]
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
  tune = "data_parallel(adam(0.05), mean())"
  before = run("bm25()", "data_parallel(sgd(1e-30), mean())", mesh="data:2", steps=1)[0]["eval"]
  tuned = run("bm25()", tune, mesh="data:2", steps=200)[0]["eval"]
  rows.append(row("Cranfield, BM25 tuned: MAP", tuned["map"], "defaults", before["map"], **tuned))
  both = run("cranfield()", tune, mesh="data:2", steps=100)[0]["eval"]
  what = "Cranfield, LambdaRank on BM25, title, prior, length: MAP"
  return [*rows, row(what, both["map"], "BM25 by default", before["map"], **both)]


def lightgbm() -> float | None:
  """NDCG@10 of LightGBM's ranker with the settings of its example."""
  try:
    import lightgbm as peer
  except ImportError:
    return None
  from research.tasks import ranking

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


def finance(figure: Any) -> Rows:
  """The frontier as published; CVaR against a linear program, and of 10^7 scenarios."""
  import resource

  import jax
  from scipy import optimize

  from research.tasks import cvar, frontier

  rows, axes = [], figure.subplots(1, 1)
  steps = {"data_parallel(sgd(1.0, momentum=0.9, nesterov=True), mean())": 400}
  steps["consensus_admm(1.0, mean(), penalty=0.1, period=10)"] = 3000
  for name in ("port1", "port2", "port3"):
    for method, count in steps.items():
      flags_ = {"mesh": "data:8", "x64": True, "steps": count}
      found, _ = run(f"frontier('{name}', points=20)", method, **flags_)
      what = f"{name}, {method.partition('(')[0]}: largest relative gap of a variance"
      rows.append(row(what, found["eval"]["gap"], "wanted", 1e-5, seconds=found["seconds"]))
    market = frontier.load(name)
    axes.plot(market.variances, market.returns, label=f"{name}, as published")
    with jax.enable_x64(True):
      task = frontier.frontier(name, points=20)
      w = _solved(task, 400)["weights"]
    axes.plot(np.sum(w @ market.covariance * w, 1), w @ market.means, "k.", ms=4)
  axes.set(xlabel="variance", ylabel="expected return", title="Frontiers; dots: ours")
  axes.legend()
  descent = "data_parallel(sgd(cosine_decay_schedule(0.003, {}), momentum=0.9), mean())"
  task = "cvar(scenarios=2000)"
  found, _ = run(task, descent.format(2000), mesh="data:8", steps=2000)
  days = cvar.load()
  x = days[np.random.default_rng(0).integers(len(days), size=2000)].astype(np.float32)
  n = x.shape[1]
  cost = np.concatenate([np.zeros(n), [1], np.full(2000, 1 / (2000 * 0.05))])
  above = np.hstack([-100 * x, -np.ones((2000, 1)), -np.eye(2000)])
  total = np.concatenate([np.ones(n), np.zeros(2001)])[None]
  bounds = [(0, None)] * n + [(None, None)] + [(0, None)] * 2000
  best = optimize.linprog(cost, above, np.zeros(2000), total, [1], bounds, method="highs").fun
  rows.append(row("CVaR of 2000 scenarios, percent", found["train_loss"], "HiGHS", best))
  start = time.perf_counter()
  large = {"mesh": "data:2", "batch_size": 20_000, "partition": "sorted()", "executor": "spmd"}
  found, _ = run("cvar(scenarios=10000000)", descent.format(1500), steps=1500, **large)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  seconds = time.perf_counter() - start
  what = "CVaR of 10^7 scenarios of 20 assets: seconds, all included"
  return [*rows, row(what, seconds, "wanted", 60, loss=found["train_loss"], peak_gib=peak)]


def _solved(task: Any, steps: int) -> Any:
  """Parameters of a task by projected momentum on all examples, in one worker."""
  import jax
  import optax

  from research.methods.projected import projected

  optimizer = projected(optax.sgd(1.0, momentum=0.9, nesterov=True), task.project)

  def step(held: Any, _: Any) -> tuple[Any, None]:
    params, state = held
    grads = jax.grad(task.loss)(params, task.train, jax.random.key(0))
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  params = task.init(jax.random.key(0))
  solve = jax.jit(lambda held: jax.lax.scan(step, held, None, steps)[0][0])
  return jax.device_get(solve((params, optimizer.init(params))))


def medicine(figure: Any) -> Rows:
  """Five hospitals: pooled, federated, private, masked, and each alone."""
  rows, axes = [], figure.subplots(1, 2)
  cases = (("breast_cancer", "auc"), ("diabetes", "rmse"))
  for axis, (task, metric) in zip(axes, cases, strict=True):
    for place, shift in enumerate(("label", "features")):
      spec = lambda more="", task=task, shift=shift: f"{task}('{shift}'{more})"
      method = lambda a="mean()": f"fed_avg(sgd(0.1), {a}, period=5)"
      often = {"steps": 5000, "partition": "sorted()"}
      kinds: dict[str, tuple[str, str, str]] = {
        "pooled": (spec(), method(), "data:1"),
        "federated": (spec(), method(), "data:5"),
        "secure sum": (spec(), method("secure_sum(clip=10.0)"), "data:5"),
        "noise": (spec(), method("noisy(mean(), clip=0.5, noise=0.3)"), "data:5"),
      }
      for n in range(1, 6):
        kinds[f"alone {n}"] = (spec(f", hospitals=5, only={n}"), method(), "data:1")
      pooled = np.nan
      for name, (where, how, mesh) in kinds.items():
        found, _ = run(where, how, mesh=mesh, **often)
        value = found["eval"][metric]
        pooled = value if name == "pooled" else pooled
        more = {"epsilon": found["epsilon"]} if "epsilon" in found else {}
        if "accuracy" in found["eval"]:
          exact = found["eval"]["accuracy"]
          rows.append(row(f"{task}, {shift} shift, {name}: accuracy", exact))
        what = f"{task}, {shift} shift, {name}: {metric}"
        rows.append(row(what, value, "pooled", pooled, **more))
        color = "gray" if name.startswith("alone") else None
        axis.barh(f"{shift}: {name}", value, color=color or f"C{place}")
    axis.set(title=f"{task}: {metric}", xlim=(0.5, 1) if metric == "auc" else (40, 120))
    axis.tick_params(labelsize=7)
  return rows


def recommend(figure: Any) -> Rows:
  """MovieLens 100K: folds, alternating least squares, users' own factors, the cold start."""
  rows, axes = [], figure.subplots(1, 2)
  adam = "data_parallel(adam(cosine_decay_schedule(0.01, 2000)), mean())"
  cases: dict[str, tuple[str, str, dict[str, Any]]] = {
    "factorization": ("movielens('{}')", adam, {"steps": 2000, "batch_size": 1600}),
    "least squares": ("movielens_als('{}', l2=0.12)", POWER.format("mean()"), {"steps": 30}),
    "users' own": (
      "movielens_federated('{}')",
      "data_parallel(adam(cosine_decay_schedule(0.03, 300)), mean())",
      {"steps": 300},
    ),
  }
  for name, (task, method, flags_) in cases.items():
    folds = [run(task.format(f), method, mesh="data:2", **flags_)[0] for f in ("u1", "u2", "u3")]
    means = {k: float(np.mean([f["eval"][k] for f in folds])) for k in folds[0]["eval"]}
    seconds = float(np.mean([f["seconds"] for f in folds]))
    what = f"{name}: mean RMSE over u1, u2, u3"
    rows.append(row(what, means["rmse"], "wanted", 0.925, seconds=seconds, **means))
    axes[0].barh(name, means["rmse"])
  axes[0].set(title="RMSE, mean of u1-u3", xlim=(0.85, 1))
  one, eight = (
    run("movielens_als()", POWER.format("mean()"), mesh=f"data:{n}", steps=20)[0]["eval"]["rmse"]
    for n in (1, 8)
  )
  rows.append(row("least squares, 8 workers: RMSE", eight, "1 worker", one))
  base = float("nan")
  for kind in ("factors", "features", "both"):
    task = f"movielens('cold_items', model_of='{kind}', l2=0.06)"
    found = run(task, adam, mesh="data:2", steps=2000, batch_size=1600)[0]["eval"]
    base = found["rmse"] if kind == "factors" else base
    rows.append(row(f"items never rated, {kind}: RMSE", found["rmse"], "factors", base, **found))
    axes[1].barh(kind, found["rmse"])
  axes[1].set(title="RMSE on items that nobody rated", xlim=(0.9, 1.2))
  return rows


CASES: dict[str, Callable[[Any], Rows]] = {
  "search": search,
  "finance": finance,
  "medicine": medicine,
  "recommend": recommend,
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
