"""Compares two Spark executors with two of our devices, and TensorFlow's regression with ours.

This is part of bench.py's suite peers. Both sides read their data from files. Logistic regressions
and factorizations end at a value that both sides reach; a longer run of each side determines the
necessary number of iterations beforehand.
"""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.hosts import ROOT, flags_of, tell
from experiments.benchmarks.peers_rows import Ended, Row, measured
from research.core.spec import calls

L2 = 1e-4
CLOSE = 1e-6  # tolerance relative to the minimum
MOST = 300  # maximum number of our iterations to this tolerance; Spark may need twice as many
ROWS, FEATURES, ENTRIES = 1_000_000, 100_000, 20  # synthetic data; entries per row
EDGES, NODES, ITERATIONS = 10_000_000, 1_000_000, 10
BATCHES = 2000  # number of batches of the linear regression
MEMORY = {"sparse": 2560, "pagerank": 3072}  # MiB for each JVM; 1024 for the other cases
DEVICES = {"JAX_NUM_CPU_DEVICES": "2"}
STEADY: dict[str, Any] = {"mesh": "data:2", "executor": "spmd", "eval_every": 0, "check_every": 0}
BFGS = "data_parallel(lbfgs(1.0, linesearch=None), mean())"
SCRIPTS = ROOT / "experiments"


def ours(**given: Any) -> Ended:
  """Trains on two devices in a separate process."""
  given = {"model": None, "leaf": None, "out": None, "log_every": 1} | STEADY | given
  line = [sys.executable, str(SCRIPTS / "benchmarks/alone.py"), json.dumps(given, allow_nan=False)]
  return measured(line, DEVICES)


def spark(python: str, case: str, **given: Any) -> Ended:
  """Runs a program of peers_spark.py."""
  given = {"memory": MEMORY.get(case, 1024)} | given
  return measured(
    [python, str(SCRIPTS / "baselines/peers_spark.py"), json.dumps(given, allow_nan=False)], {}
  )


def in_turn(
  programs: dict[str, Callable[[], Ended]], repeats: int, what: str
) -> dict[str, list[Ended]]:
  """Runs programs in turn, and reverses the order in every other turn."""
  found: dict[str, list[Ended]] = {name: [] for name in programs}
  for turn in range(repeats):
    for name in list(programs)[:: 1 if turn % 2 else -1]:
      ended = programs[name]()
      found[name].append(ended)
      inner = ended.printed.get("seconds", 0.0)
      figures = f"{ended.seconds:.1f} s, of which {inner:.2f} computing, {ended.peak_mib:,.0f} MiB"
      tell(f"{what}, {name}: {figures}; load {os.getloadavg()[0]:.1f}")
  return found


def rows_of(what: str, question: str, found: dict[str, list[Ended]], **extra: Any) -> Iterator[Row]:
  """Yields rows for the computing seconds, and for the seconds and memory of the full programs."""
  peer = next((name for name in found if name != "ours"), "Spark")
  others = found.get(peer)
  cells: list[tuple[str, str, Callable[[Ended], float]]] = [
    (f"{what}: computing", "s", lambda x: x.printed["seconds"]),
    (f"{what}: the whole program, with start and reading", "s", lambda x: x.seconds),
    (f"{what}: memory of all processes", "MiB", lambda x: x.peak_mib),
  ]
  for case, unit, of in cells:
    theirs = [of(one) for one in others] if others else None
    yield Row(question, case, unit, [of(one) for one in found["ours"]], peer, theirs, extra)


# ---- logistic regression


def logistic(case: str, python: str, repeats: int) -> Iterator[Row]:
  """Measures logistic regression without intercept, to the same value of the objective."""
  from research.tasks import files
  from research.tasks.convex import libsvm

  if case == "sparse":
    place = files.cache() / "peers" / f"sparse-{ROWS}-{FEATURES}-{ENTRIES}.svm"
    if not place.exists():
      made_up(place)
  else:
    place = files.find(f"libsvm/{case}", "", libsvm.URL + case, libsvm.SHA256[case])
  x, y = _read(place)
  best = minimum(x, y)
  task = str(calls.libsvm(str(place), l2=L2))
  close: dict[str, float] = {}

  def checked(name: str, run: Callable[..., Ended], steps: int) -> Ended:
    with tempfile.TemporaryDirectory() as folder:
      ended = run(steps, f"{folder}/w.npy")
      w = np.load(f"{folder}/w.npy").ravel().astype(np.float64)
    close[name] = objective(w, x, y)[0] / best - 1
    return ended

  fit = lambda steps, out: ours(
    task=task, model="logistic(bias=False)", method=BFGS, steps=steps, leaf="kernel", out=out
  )
  peer = lambda steps, out, tolerance=0.0: spark(
    python, case, program="logistic", file=str(place), features=x.shape[1], l2=L2, steps=steps,
    out=out, tolerance=tolerance,
  )  # fmt: skip
  least = {"ours": _least(checked("ours", fit, MOST).printed["losses"], best)}
  programs = {"ours": lambda: checked("ours", fit, least["ours"])}
  if python:
    until = functools.partial(peer, tolerance=1e-9)
    longer = checked("Spark", until, 2 * least["ours"]).printed["losses"]
    least["Spark"] = _least(longer, best)
    programs["Spark"] = lambda: checked("Spark", peer, least["Spark"])
  found = in_turn(programs, repeats, f"logistic regression, {case}")
  if max(close.values()) > CLOSE:
    raise RuntimeError(f"{case}: not within {CLOSE} of the minimum: {close}")
  question = "What does logistic regression cost?"
  title = f"{case}, {x.shape[0]:,} x {x.shape[1]:,}"
  yield from rows_of(title, question, found, iterations=least, minimum=best, close=close)


def _least(losses: list[float], best: float) -> int:
  """Returns the number of iterations until the objective is within CLOSE of the minimum."""
  enough = best * (1 + 0.9 * CLOSE)  # allows for rounding errors of float32 losses
  steps = next((i for i, value in enumerate(losses) if value <= enough), None)
  if steps is None:
    raise RuntimeError(f"{min(losses)} after {len(losses)} iterations is not near {best}")
  return steps


def made_up(place: Path) -> None:
  """Writes ROWS rows with noisy labels; a row has a one in each of ENTRIES geometric bands."""
  from research.tasks import files

  rng = np.random.default_rng(0)
  weights = rng.standard_normal(FEATURES)
  tokens = np.array([f"{i + 1}:1" for i in range(FEATURES)], object)
  tell(f"writing {place}")
  with files.whole(place) as partial, partial.open("w") as file:
    for _ in range(0, ROWS, 10_000):
      # the frequency of feature i decreases as 1 / (i + 100)
      uniform = (np.arange(ENTRIES) + rng.random((10_000, ENTRIES))) / ENTRIES
      columns = (100 * ((FEATURES + 100) / 100) ** uniform - 100).astype(int)
      own = np.arange(ENTRIES)
      columns = np.minimum(columns + own, FEATURES - ENTRIES + own)  # distinct, ascending
      logits = weights[columns].sum(1) / 2
      labels = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
      lines = [" ".join(row) for row in tokens[columns]]
      signs = np.where(labels, "+1 ", "-1 ")
      file.write("".join(f"{s}{line}\n" for s, line in zip(signs, lines, strict=True)))


def _read(place: Path) -> tuple[Any, np.ndarray]:
  """Reads the rows in CSR format and the labels in {-1, 1}, both in float64."""
  from sklearn.datasets import load_svmlight_file

  x, y = load_svmlight_file(str(place), zero_based=False)  # pyright: ignore[reportArgumentType]
  return x, np.where(y > 0, 1.0, -1.0)


def objective(w: np.ndarray, x: Any, y: np.ndarray) -> tuple[float, np.ndarray]:
  """Computes the mean logistic loss plus the penalty, and the gradient, in float64."""
  margins = y * (x @ w)
  loss = np.mean(np.logaddexp(0, -margins)) + L2 / 2 * w @ w
  slope = -y / (1 + np.exp(np.minimum(margins, 700.0))) / len(y)
  return float(loss), x.T @ slope + L2 * w


def minimum(x: Any, y: np.ndarray) -> float:
  """Computes the minimum of the objective by SciPy's L-BFGS in float64."""
  from scipy import optimize

  options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 30}
  of = functools.partial(objective, x=x, y=y)
  return float(
    optimize.minimize(of, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options).fun
  )


# ---- recommendation and ranking


def als(python: str, repeats: int) -> Iterator[Row]:
  """Measures alternating least squares on fold u1 of MovieLens 100K, to an RMSE that both reach."""
  from research.tasks.recommend import movielens

  parts = movielens.load("u1")
  with tempfile.TemporaryDirectory() as folder:
    places = [f"{folder}/{name}.tsv" for name in ("train", "test")]
    for place, part in zip(places, parts, strict=True):
      np.savetxt(place, np.column_stack(part), fmt="%d", delimiter="\t")
    method = "data_parallel(sgd(1.0), mean())"
    task = "movielens_als('u1')"
    fit = lambda sweeps, often=0: ours(
      task=task, method=method, steps=2 * sweeps, eval_every=often, partition="iid()"
    )
    peer = lambda *sweeps: spark(
      python, "als", program="als", train=places[0], test=places[1], steps=sweeps
    )
    curve = [row["rmse"] for row in fit(10, 2).printed["evals"]][-10:]
    theirs = peer(*range(1, 11)).printed["rmse"] if python else []
    goal = max(min(curve), min(theirs, default=0.0)) + 5e-4
    first = lambda values: 1 + next(i for i, value in enumerate(values) if value <= goal)
    sweeps = {"ours": first(curve)} | ({"Spark": first(theirs)} if python else {})
    tell(f"to an RMSE of {goal:.4f}: {sweeps} sweeps; ours {curve}, Spark {theirs}")
    programs = {"ours": lambda: fit(sweeps["ours"])}
    if python:
      programs["Spark"] = lambda: peer(sweeps["Spark"])
    found = in_turn(programs, repeats, "alternating least squares")
  question = "What does alternating least squares cost?"
  what = f"MovieLens 100K, u1, to an RMSE of {goal:.4f}"
  yield from rows_of(what, question, found, sweeps=sweeps, rmse={"ours": curve, "Spark": theirs})


def pagerank(python: str, repeats: int) -> Iterator[Row]:
  """Measures PageRank iterations on a power-law graph, and the distance to the exact ranks."""
  from research.tasks import files

  place = files.cache() / "peers" / f"edges-{EDGES}-{NODES}.txt"
  if not place.exists():
    graph_file(place)
  with tempfile.TemporaryDirectory() as folder:
    mine, theirs = f"{folder}/rank.npy", f"{folder}/ranks"
    counter = iter(range(2 * repeats))
    programs = {
      "ours": lambda: ours(
        task=str(calls.pagerank(str(place))), method="data_parallel(sgd(1.0), mean())",
        steps=ITERATIONS, steps_per_dispatch=ITERATIONS, log_every=ITERATIONS,
        partition="sorted()", leaf="rank", out=mine,
      )
    }  # fmt: skip
    if python:
      programs["Spark"] = lambda: spark(
        python, "pagerank", program="pagerank", file=str(place), alpha=0.85, steps=ITERATIONS,
        out=f"{theirs}{next(counter)}",
      )  # fmt: skip
    found = in_turn(programs, repeats, "PageRank")
    exact, nodes = ranks(place)
    away = {"ours": float(np.abs(np.load(mine) - exact).sum())}
    if python:
      away["Spark"] = float(np.abs(spark_ranks(Path(f"{theirs}0"), nodes) - exact).sum())
  tell(f"PageRank: L1 distance to the exact ranks {away}")
  question = f"What do {ITERATIONS} iterations of PageRank cost?"
  yield from rows_of(f"{EDGES:,} edges, {NODES:,} nodes", question, found, distance=away)


def graph_file(place: Path) -> None:
  """Writes EDGES distinct edges of a power-law graph."""
  from research.tasks import files
  from research.tasks.search import graphs

  tell(f"writing {place}")
  graph = graphs.power_law(EDGES * 13 // 10, NODES)
  keys = np.unique(graph.target.astype(np.int64) * NODES + graph.source)
  keys = np.random.default_rng(1).permutation(keys)[:EDGES]
  if len(keys) < EDGES:
    raise RuntimeError(f"only {len(keys)} distinct edges")
  with files.whole(place) as partial, partial.open("w") as file:
    for part in np.array_split(keys, 100):
      file.write("".join(f"{s} {t}\n" for t, s in zip(*np.divmod(part, NODES), strict=True)))


def ranks(place: Path) -> tuple[np.ndarray, np.ndarray]:
  """Computes the exact ranks in float64; also returns the names of the nodes."""
  from scipy import sparse

  from research.tasks.search import graphs

  graph = graphs.load(str(place), "")
  links = np.bincount(graph.source, minlength=graph.nodes)
  values = 1 / links[graph.source]
  matrix = sparse.csr_array((values, (graph.target, graph.source)), (graph.nodes, graph.nodes))
  x = np.full(graph.nodes, 1 / graph.nodes)
  for _ in range(150):
    x = 0.85 * (matrix @ x + x[links == 0].sum() / graph.nodes) + 0.15 / graph.nodes
  return x, graph.names


def spark_ranks(folder: Path, names: np.ndarray) -> np.ndarray:
  """Reads Spark's ranks in the order of `names`, scaled to a sum of one."""
  lines = [
    row.strip("()").split(",") for p in folder.glob("part-*") for row in p.open().read().split()
  ]
  found = np.array(lines, float)
  values = found[np.argsort(found[:, 0]), 1]
  assert len(values) == len(names)
  return values / values.sum()


# ---- linear regression


def listing(python: str, repeats: int) -> Iterator[Row]:
  """Measures linear regression in batches of 32; both sides compute the loss of every batch."""
  from research.core import registry

  spec = calls.least_squares(samples=1000, features=10, noise=0.1)
  with tempfile.TemporaryDirectory() as folder:
    data = f"{folder}/lines.npz"
    np.savez(data, **registry.build("task", spec).train)
    line = [python, str(SCRIPTS / "baselines/peers_tensorflow.py"), "regression", data]
    line += [str(BATCHES), "1"]
    programs = {"ours": lambda: _command(str(spec))}
    if python:
      programs["TensorFlow"] = lambda: measured(line, {})
    found = in_turn(programs, repeats, "the listing")
  question = "What does a linear regression cost that shows the loss of every batch?"
  cells: list[tuple[str, str, Callable[[Ended], float]]] = [
    ("one batch", "ms", lambda x: float(np.mean(x.printed["milliseconds"]))),
    ("the whole program", "s", lambda x: x.seconds),
    ("memory of all processes", "MiB", lambda x: x.peak_mib),
  ]
  for case, unit, of in cells:
    theirs = [of(one) for one in found["TensorFlow"]] if python else None
    mine = [of(one) for one in found["ours"]]
    yield Row(question, f"{BATCHES:,} batches of 32: {case}", unit, mine, "TensorFlow", theirs)


def _command(spec: str) -> Ended:
  """Runs our command, which writes a row of metrics with the loss for every batch."""
  with tempfile.TemporaryDirectory() as folder:
    flags = STEADY | {"task": spec, "model": "linear(bias=True)", "batch_size": 32}
    flags |= {"method": "data_parallel(sgd(0.1), mean())", "steps": BATCHES, "log_every": 1}
    flags |= {"out": f"{folder}/run"}
    ended = measured([sys.executable, str(SCRIPTS / "run.py"), *flags_of(flags)], DEVICES)
    rows = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
  seconds = [row["seconds"] for row in map(json.loads, rows) if "loss" in row]
  assert len(seconds) == BATCHES
  skipped = 200  # two dispatches
  each = 1000 * (seconds[-1] - seconds[skipped]) / (BATCHES - skipped - 1)
  return ended._replace(printed={"milliseconds": [each]})
