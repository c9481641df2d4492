"""Trains on molecules of several laboratories, and compares the results with other models.

`bench.py` runs this application. The other models are a random forest and chemprop. The program
runs chemprop through its own command, as chemprop's users do, if the command is on $PATH
(`pip install -e ".[chemprop]"`, possibly in a separate environment).
"""

import csv
import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.applications.measured import STEADY, Rows, row, run
from research.core.spec import Call, calls

LABORATORIES = 4
PEER_SEEDS = 2  # number of seeds for chemprop, whose 50 epochs take minutes
PICTURES = 8  # number of molecules to draw
PEERS = ("random forest", "chemprop")


class Case(NamedTuple):
  """A data set, with hyper-parameters chosen on the validation part of its scaffold split."""

  name: str
  metric: str
  model: str
  rate: float
  steps: int
  batch_size: int
  seeds: int  # of pooled training and of an exchange in every step


ESOL = Case("esol", "rmse", "graph_network(128, dropout=0.2)", 1e-3, 1200, 48, 5)
TOX21 = Case("tox21", "auc", "graph_network(64, dropout=0.2)", 2e-3, 600, 64, 3)
Scores = dict[str, tuple[float, float]]  # mean and standard deviation over seeds, by name


def solubility(figure: Any) -> Rows:
  """Compares laboratories, a random forest and chemprop on ESOL, and draws predictions."""
  figure.set_size_inches(10, 8)
  top, below = figure.subfigures(2, 1)
  peers = {"random forest": forest(ESOL)}
  if found := chemprop(ESOL):
    peers["chemprop"] = found
  rows, scores = compared(ESOL, peers)
  drawn(top.subplots(1, 1), ESOL, scores)
  pictures(below)
  return rows


def toxicity(figure: Any) -> Rows:
  """Compares laboratories with a random forest on Tox21."""
  rows, scores = compared(TOX21, {"random forest": forest(TOX21)})
  drawn(figure.subplots(1, 1), TOX21, scores)
  return rows


def compared(case: Case, peers: Scores) -> tuple[Rows, Scores]:
  """Trains pooled, federated, with secure sums or noise, and alone; returns rows and scores."""
  local = lambda aggregator: calls.fed_avg(calls.adam(case.rate), aggregator, period=4)
  server = lambda aggregator: calls.fed_opt(
    calls.sgd(1.0), adamw(case, case.steps), aggregator, period=1
  )
  noisy = lambda noise: server(calls.noisy(calls.mean(), clip=1.0, noise=noise))
  few = case.steps // LABORATORIES  # steps of one laboratory alone, for the same number of passes
  kinds: dict[str, tuple[Call, int, int]] = {  # method, laboratory or 0, seeds
    "pooled": (pooled(case), -1, case.seeds),
    "federated, exchange every step": (server(calls.mean()), 0, case.seeds),
    "federated, exchange every 4 steps": (local(calls.mean()), 0, 1),
    "secure sum, every step": (server(calls.secure_sum(clip=4.0, bits=24)), 0, 1),
    "noise": (noisy(0.1), 0, 1),
    "much noise": (noisy(5.0), 0, 1),
  }
  kinds |= {f"alone {n}": (pooled(case, few), n, 1) for n in range(1, LABORATORIES + 1)}
  rows: Rows = []
  scores: Scores = {}
  for name, (method, laboratory, seeds) in kinds.items():
    steps = few if laboratory > 0 else case.steps
    found = [trained(case, method, laboratory, steps, seed) for seed in range(seeds)]
    values = [summary["eval"][case.metric] for summary in found]
    scores[name] = mean, spread = float(np.mean(values)), float(np.std(values))
    spent = f", epsilon {found[0]['epsilon']:.3g}" if "epsilon" in found[0] else ""
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    what = f"{case.name}, {name}{spent}: {case.metric}{over}"
    more = {"deviation": spread, "values": values, "seconds": found[0]["seconds"]}
    if name == "pooled":
      for peer in [*peers] or [""]:
        rows.append(row(what, mean, peer, peers.get(peer, (None,))[0], **more))
    else:
      rows.append(row(what, mean, "pooled", scores["pooled"][0], **more))
  return rows, scores | peers


def adamw(case: Case, steps: int) -> Call:
  """Returns AdamW with a learning rate that decays to zero along a cosine."""
  return calls.adamw(calls.cosine_decay_schedule(case.rate, steps), weight_decay=0.01)


def pooled(case: Case, steps: int = 0) -> Call:
  """Returns the method for pooled training and for a laboratory alone."""
  return calls.data_parallel(adamw(case, steps or case.steps), calls.mean())


def trained(case: Case, method: Call, laboratory: int, steps: int, seed: int) -> dict[str, Any]:
  """Trains one laboratory (1, 2, ...), or all: pooled (-1), federated (0). Returns the summary."""
  alone = {"laboratories": LABORATORIES, "only": laboratory} if laboratory > 0 else {}
  where = {"mesh": f"data:{LABORATORIES}", "partition": "by_scaffold()"}
  # laboratories run one after another, since only a single worker can skip its graphs' padding
  flags_ = {"steps": steps, "batch_size": case.batch_size, "local_phase": "map"}
  flags_ |= {"mesh": "data:1"} if laboratory else where
  task = calls.molecules(case.name, **alone)
  return run(task, method, model=case.model, seed=seed, **flags_)[0]


def forest(case: Case) -> tuple[float, float]:
  """Returns the mean and deviation over seeds of random forests' scores on fingerprint bits.

  Each target has a separate forest, since some labels are missing. The forests use scikit-learn's
  default settings.
  """
  from sklearn import ensemble, metrics

  from research.tasks.molecules import molecules

  found, parts = molecules.load(case.name)
  x, y = np.minimum(found.x, 1), found.table.labels
  auc = case.metric == "auc"
  kind = ensemble.RandomForestClassifier if auc else ensemble.RandomForestRegressor
  scores = []
  for seed in range(case.seeds if not auc else 1):
    each = []
    for target in y.T:
      train, test = (rows[~np.isnan(target[rows])] for rows in (parts["train"], parts["test"]))
      model = kind(random_state=seed, n_jobs=2).fit(x[train], target[train])
      if auc:
        predicted = model.predict_proba(x[test])[:, 1]  # pyright: ignore
        each.append(metrics.roc_auc_score(target[test], predicted))
      else:
        each.append(np.sqrt(np.mean((model.predict(x[test]) - target[test]) ** 2)))
    scores.append(np.mean(each))
  return float(np.mean(scores)), float(np.std(scores))


def chemprop(case: Case) -> tuple[float, float] | None:
  """Returns the mean and deviation over seeds of chemprop's scores; None without chemprop.

  chemprop runs with its default settings, and keeps the model of the best epoch on the validation
  part.
  """
  from research.tasks.molecules import molecules

  program = shutil.which("chemprop")
  if program is None:
    return None
  found, parts = molecules.load(case.name)
  name_of = {"train": "train", "validation": "val", "test": "test"}
  split = {row: name_of[part] for part, rows in parts.items() for row in rows}
  with tempfile.TemporaryDirectory() as folder:
    table = Path(folder) / "table.csv"
    with table.open("w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(["smiles", "y", "split"])
      for number, smiles in enumerate(found.table.smiles):
        writer.writerow([smiles, found.table.labels[number, 0], split[number]])
    errors = []
    for seed in range(PEER_SEEDS):
      out = Path(folder) / str(seed)
      line = [program, "train", "--data-path", table, "--output-dir", out, "--task-type"]
      line += ["regression", "--smiles-columns", "smiles", "--target-columns", "y"]
      line += ["--splits-column", "split", "--pytorch-seed", str(seed), "--num-workers", "0"]
      environment = os.environ | {"PYTHONPATH": ""}
      subprocess.run(line, check=True, capture_output=True, env=environment)
      (written,) = out.rglob("test_predictions.csv")
      rows = list(csv.DictReader(io.StringIO(written.read_text())))
      predicted = np.array([float(one["y"]) for one in rows])
      errors.append(np.sqrt(np.mean((predicted - found.table.labels[parts["test"], 0]) ** 2)))
  return float(np.mean(errors)), float(np.std(errors))


def drawn(axis: Any, case: Case, scores: Scores) -> None:
  """Draws the scores as bars."""
  for name, (mean, spread) in scores.items():
    axis.barh(name, mean, xerr=spread, color="gray" if name in PEERS else "C0")
  means = [mean for mean, _ in scores.values()]
  axis.set(title=f"{case.name}: {case.metric} on new scaffolds", xlim=(0.9 * min(means), None))
  axis.invert_yaxis()


def pictures(figure: Any) -> None:
  """Draws test molecules with their measured and predicted solubility, from a pooled run."""
  from rdkit import Chem
  from rdkit.Chem import Draw

  from research.core import registry
  from research.tasks.molecules import molecule_metrics, molecules
  from research.training.api import train

  model = registry.build("model", ESOL.model)
  task = molecules.molecules(ESOL.name, model=model)
  flags_ = {"steps": ESOL.steps, "batch_size": ESOL.batch_size, "local_phase": "map"}
  result = train(task, str(pooled(ESOL)), mesh="data:1", progress=False, **STEADY, **flags_)
  found, parts = molecules.load(ESOL.name)
  y = found.table.labels[:, 0]
  assert task.test is not None
  outputs = molecule_metrics.predictions(model(1), task.test["x"])(result.params)
  predicted = np.asarray(outputs)[:, 0] * y[parts["train"]].std() + y[parts["train"]].mean()
  shown = np.argsort(y[parts["test"]])[:: len(predicted) // PICTURES][:PICTURES]
  for axis, number in zip(figure.subplots(2, PICTURES // 2).flat, shown, strict=True):
    row = parts["test"][number]
    axis.imshow(Draw.MolToImage(Chem.MolFromSmiles(found.table.smiles[row]), size=(400, 260)))
    axis.set_title(f"measured {y[row]:.2f}, predicted {predicted[number]:.2f}", fontsize=8)
    axis.set_axis_off()
