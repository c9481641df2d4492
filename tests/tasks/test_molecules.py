"""Molecules: parsing, missing labels, scaffolds, errors, laboratories."""

import gzip
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Running, distance

from research.core import registry
from research.tasks.molecules import chemistry, molecule_metrics, molecules
from research.tasks.molecules.scaffold_split import scaffold_split
from research.tasks.partition import by_scaffold

pytest.importorskip("rdkit", reason="needs RDKit, of the extra 'applications'")

RINGS = ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CCOC1", "c1ccsc1", "C1CCNC1", "c1ccc2ccccc2c1")
CHAINS = ("C", "CC", "O", "CCN", "ClCC", "OC(=O)", "N#C")
# Each ring with each chain: 49 molecules of seven scaffolds.
SMILES = [chain + ring for ring in RINGS for chain in CHAINS]
SMALL = {"model": registry.build("model", "graph_network(8, layers=2)")}
KEY = jax.random.key(0)


def drawn(task):
  """Parameters of the right shapes, drawn by numpy, which compiles nothing."""
  shapes = jax.eval_shape(task.init, KEY)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def labels(missing: float = 0.3) -> np.ndarray:
  """Two targets of 0 and 1, of which some are missing (NaN)."""
  rng = np.random.default_rng(0)
  found = rng.integers(0, 2, (len(SMILES), 2)).astype(float)
  found[rng.random(found.shape) < missing] = np.nan
  return found


def written(path, values, smiles=SMILES, head="smiles,a,b"):
  cell = lambda value: "" if np.isnan(value) else f"{value:g}"
  rows = [",".join([s, *map(cell, row)]) for s, row in zip(smiles, values, strict=True)]
  text = "\n".join([head, *rows]) + "\n"
  path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
  return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
  return written(tmp_path_factory.mktemp("molecules") / "table.csv.gz", labels())


def test_smiles_that_do_not_parse_are_left_out_and_named(tmp_path, caplog):
  wrong = ["C1CC", "", "c1cccc1", "not", "C(C", "Xx", "C=1"]
  values = np.vstack([labels(), np.zeros((len(wrong), 2))])
  path = written(tmp_path / "t.csv", values, [*SMILES, *wrong])
  with caplog.at_level(logging.WARNING):
    found, rows = molecules.load(path, ["a", "b"])
  assert found.table.smiles == SMILES
  assert sorted(np.concatenate(list(rows.values()))) == list(range(len(SMILES)))
  (line,) = caplog.messages
  first = ", ".join(f"{text!r} in line {51 + i}" for i, text in enumerate(wrong[:5]))
  assert f"7 of 56 SMILES do not parse and are left out; the first: {first}" in line
  assert "'Xx'" not in line


def test_fingerprints_and_graphs_of_known_molecules():
  """Ethanol: C, C, O in a chain; toluene and benzene have one scaffold, hexane has none."""
  ethanol, toluene, benzene, hexane = chemistry.parsed(["CCO", "Cc1ccccc1", "c1ccccc1", "CCCCCC"])
  graph = chemistry.graphs([ethanol])
  atoms = np.unpackbits(graph["atoms"], axis=-1)[0]
  elements = [chemistry.ELEMENTS[row[: len(chemistry.ELEMENTS)].argmax()] for row in atoms]
  assert elements == ["C", "C", "O"]
  real = graph["bonds"].any(-1)[0]
  assert real.sum(1).tolist() == [1, 2, 1]
  ends = [sorted(graph["neighbours"][0, a][real[a]].tolist()) for a in range(3)]
  assert ends == [[1], [0, 2], [1]]
  assert chemistry.scaffolds([toluene, benzene, hexane]) == ["c1ccccc1", "c1ccccc1", ""]
  counts = chemistry.fingerprints([benzene, toluene], radius=0, bits=64)
  assert sorted(counts[0][counts[0] > 0]) == [6]
  assert counts[1].sum() == 7


@pytest.mark.parametrize("regression", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loss_of_labels_that_are_missing_is_numpys(tmp_path, regression):
  """The mean over all labels that there are, and zero gradient from the others."""
  values = labels() + (0.25 if regression else 0)
  task = molecules.molecules(written(tmp_path / "t.csv", values), ["a", "b"], **SMALL)
  rows = molecules.load(str(tmp_path / "t.csv"), ["a", "b"])[1]["train"]
  params = drawn(task)
  predict = jax.jit(molecule_metrics.predictions(SMALL["model"](2), task.train["x"]))
  outputs = np.asarray(predict(params), float)
  y, known = values[rows], ~np.isnan(values[rows])
  if regression:
    scaled = (y - np.nanmean(y, 0)) / np.nanstd(y, 0)
    each = (outputs - scaled) ** 2 / 2
  else:
    each = np.log1p(np.exp(outputs)) - y * outputs
  of_labels = lambda y: task.loss(params, {**task.train, "y": y}, KEY)
  loss, slope = jax.jit(jax.value_and_grad(of_labels))(jnp.asarray(task.train["y"]))
  np.testing.assert_allclose(loss, each[known].mean(), rtol=1e-5)
  assert np.array_equal(np.asarray(slope) != 0, known)


def predicted(task, params):
  """The model's outputs for the test molecules."""
  return np.asarray(
    jax.jit(molecule_metrics.predictions(SMALL["model"](2), task.test["x"]))(params)
  )


@pytest.mark.slow
def test_metrics_are_means_over_targets_of_known_labels(tmp_path):
  from sklearn.metrics import roc_auc_score

  path, values = written(tmp_path / "t.csv", labels(0.2)), labels(0.2)
  task = molecules.molecules(path, ["a", "b"], **SMALL)
  rows = molecules.load(path, ["a", "b"])[1]["test"]
  params = drawn(task)
  assert task.test is not None
  outputs = predicted(task, params)
  known = ~np.isnan(values[rows])
  used = [t for t in range(2) if len(np.unique(values[rows][known[:, t], t])) == 2]
  wanted = [roc_auc_score(values[rows][known[:, t], t], outputs[known[:, t], t]) for t in used]
  assert jax.jit(task.measure)(params)["auc"] == pytest.approx(np.mean(wanted), abs=1e-6)
  task = molecules.molecules(written(tmp_path / "r.csv", 3 * values + 1), ["a", "b"], **SMALL)
  assert task.test is not None
  outputs = predicted(task, params)
  train = molecules.load(path, ["a", "b"])[1]["train"]
  units = 3 * values + 1
  center, spread = np.nanmean(units[train], 0), np.nanstd(units[train], 0)
  wanted = np.sqrt(np.nanmean((outputs * spread + center - units[rows]) ** 2, 0)).mean()
  assert jax.jit(task.measure)(params)["rmse"] == pytest.approx(wanted, rel=1e-5)


def test_no_scaffold_is_on_two_sides_or_in_two_laboratories(table):
  found, rows = molecules.load(table, ["a", "b"])
  of = {part: {found.scaffolds[row] for row in own} for part, own in rows.items()}
  assert not of["train"] & of["test"]
  assert not of["train"] & of["validation"]
  assert not of["validation"] & of["test"]
  assert [len(own) for own in rows.values()] == [35, 7, 7]
  task = molecules.molecules(table, ["a", "b"], **SMALL)
  parts = by_scaffold()(task.by, 3, 0)
  owners = [set(task.by[part]) for part in parts]
  assert sum(map(len, owners)) == len(set.union(*owners)) == 5
  alone = molecules.molecules(table, ["a", "b"], laboratories=3, only=2, **SMALL)
  atoms = task.train["x"]["atoms"]
  assert np.array_equal(alone.train["x"]["atoms"], atoms[parts[1]])


def test_frequent_scaffolds_are_in_training():
  scaffolds = ["a"] * 7 + ["b", "c", "d"]
  parts = {name: rows.tolist() for name, rows in scaffold_split(scaffolds).items()}
  assert parts == {"train": [0, 1, 2, 3, 4, 5, 6, 9], "validation": [8], "test": [7]}


@pytest.mark.parametrize(
  ("text", "options", "message"),
  [
    ("smiles,a\nC,1\n", {"targets": ["b"]}, r"no column 'b';.*t.csv has the columns smiles, a$"),
    ("SMILES,a\nC,1\n", {"targets": ["a"]}, r"no column 'smiles'.*has the columns SMILES, a$"),
    ("smiles,a\nC,1\n", {}, r"name the columns of labels in targets=\[...\]; .* smiles, a$"),
    ("smiles,a\nC,1\n", {"targets": "a"}, r"targets='a' is not a list .* targets=\['a'\]"),
    ("smiles,a\nC,1\nC\n", {"targets": ["a"]}, "line 3: has 1 cells, and the header 2"),
    ("smiles,a\nC,high\n", {"targets": ["a"]}, "line 2: a: 'high' is not a finite number"),
    ("smiles,a\n", {"targets": ["a"]}, "is not a table of molecules"),
    ("smiles,a\nnot,1\n", {"targets": ["a"]}, "none of the SMILES in column 'smiles' parse"),
    ("smiles,a\nC,1\n", {"targets": ["a"]}, "1 molecules leave none for"),
    ("smiles,a\nC,1\n", {"targets": ["a"], "part": "tests"}, "part='tests' is unknown; did you"),
    ("smiles,a\nC,1\n", {"targets": ["a"], "only": 3}, "only=3 is none of the laboratories"),
  ],
)
def test_errors_are_one_line(tmp_path, text, options, message):
  (tmp_path / "t.csv").write_text(text)
  with pytest.raises(ValueError, match=message) as caught:
    molecules.molecules(str(tmp_path / "t.csv"), **options, **SMALL)
  assert "\n" not in str(caught.value)


def test_a_name_that_is_no_file_is_refused():
  with pytest.raises(ValueError, match="'tox' is neither a file nor one of esol, tox21, hiv"):
    molecules.molecules("tox", **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["graph_network(8, layers=1, dropout=0.2)", "mlp([8])"])
def test_executions_agree(table, model):
  """Laboratories with different scaffolds, simulated and on devices."""
  task = molecules.molecules(table, ["a", "b"], model=registry.build("model", model))
  method = registry.build("method", "fed_avg(sgd(0.1), mean(), period=2)")
  parts = by_scaffold()(task.by, 2, 0)
  order = np.concatenate(parts)
  task = task._replace(train=jax.tree.map(lambda leaf: leaf[order], task.train))
  sizes = [len(part) for part in parts]
  found = [
    Running(method, executor, {"data": 2}, sizes, 6, task=task).rounds(2).params()
    for executor in ("simulate", "spmd")
  ]
  assert distance(*found) < 1e-5


@pytest.mark.slow
def test_a_property_of_atoms_is_learned(tmp_path):
  """The number of heavy atoms, from graphs."""
  counts = [m.GetNumAtoms() for m in chemistry.parsed(SMILES)]
  path = written(tmp_path / "t.csv", np.array(counts, float)[:, None], head="smiles,atoms")
  task = molecules.molecules(path, ["atoms"], model=registry.build("model", "graph_network(32)"))
  method = registry.build("method", "data_parallel(adam(0.003), mean())")
  run = Running(method, "simulate", {"data": 1}, [len(task.by)], 16, task=task)
  loss = jax.jit(lambda params: task.evaluate(params, task.train)["loss"])
  assert loss(run.rounds(200).params()) < 0.05 * loss(task.init(KEY))
