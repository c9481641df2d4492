"""The suite peers of bench.py: its table, its files, and peers that are not installed."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_svmlight_file

from experiments.benchmarks import peers, peers_on_data
from experiments.benchmarks.peers_rows import Row, as_dict, measured, memory, table
from research.tasks.search import graphs


def test_the_table_tells_which_cells_are_lost_and_why():
  rows = [
    Row("How long?", "first", "ms", [2.0, 1.0, 3.0], "Peer", [4.0, 5.0, 3.0]),
    Row("How long?", "lost", "ms", [4.0], "Peer", [2.0]),
    Row("How much?", "alone", "bytes", [12345.6], "Peer", None),
  ]
  lines = table([as_dict(row) for row in rows], {"How long?: lost": "a reason"})
  assert "load average" in lines.pop()
  assert not lines.pop()
  assert lines == [
    "**How long?**",
    "",
    "| case | ours | peer | | peer / ours | |",
    "|---|---|---|---|---|---|",
    "| first | 2 ms | Peer | 4 ms | 2.00 |  |",
    "| lost | 4 ms | Peer | 2 ms | 0.50 | a reason |",
    "",
    "**How much?**",
    "",
    "| case | ours | peer | | peer / ours | |",
    "|---|---|---|---|---|---|",
    "| alone | 12,346 bytes | Peer | not run |  |  |",
  ]


def test_the_recorded_table_is_that_of_the_recorded_rows():
  """Every lost cell has its reason, or says that the peer is first."""
  folder = Path(__file__).parents[2] / "results" / "peers"
  result = json.loads((folder / "result.json").read_text())
  assert result["environment"]["commit"]
  assert (folder / "table.md").read_text().startswith("\n".join(peers.tables(result["rows"])))
  assert {case for case, rows in result["rows"].items() if rows} <= {*result["commits"]}


def test_an_interpreter_without_the_peers_is_told():
  found, missing = peers.has(sys.executable)
  for name, extra in peers.EXTRAS.items():
    told = [line for line in missing if f'".[{extra}]"' in line or name == "pyspark"]
    assert bool(name in found) != bool(told)
  with pytest.raises(ValueError, match="cannot run Python there"):
    peers.has("/no/such/python")


def test_a_process_is_measured_with_its_children():
  child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
  inner = "import time; x = bytearray(60_000_000); time.sleep(.3); print('{\"a\": 1}')"
  ended = measured([sys.executable, "-c", child, inner], {}, every=0.02)
  assert ended.printed == {"a": 1}
  assert ended.peak_mib > 55
  assert memory(os.getpid()) > 10
  with pytest.raises(RuntimeError, match="exit code 3"):
    measured([sys.executable, "-c", "raise SystemExit(3)"], {})


def test_the_made_up_set_has_distinct_features_in_each_row(tmp_path, monkeypatch):
  monkeypatch.setattr(peers_on_data, "ROWS", 10_000)
  peers_on_data.made_up(tmp_path / "set.svm")
  x, y = load_svmlight_file(str(tmp_path / "set.svm"), n_features=peers_on_data.FEATURES)
  assert x.shape == (10_000, peers_on_data.FEATURES)
  assert set(x.data) == {1.0}
  assert (np.diff(x.indptr) == peers_on_data.ENTRIES).all()
  assert (np.diff(x.indices.reshape(-1, peers_on_data.ENTRIES)) > 0).all()
  assert 0.3 < (y > 0).mean() < 0.7


def test_the_objective_has_the_gradient_of_its_differences():
  rng = np.random.default_rng(0)
  x, y, w, v = rng.normal(size=(9, 4)), rng.choice([-1.0, 1.0], 9), *rng.normal(size=(2, 4))
  (_, gradient), small = peers_on_data.objective(w, x, y), 1e-6
  above, below = (peers_on_data.objective(w + s * v, x, y)[0] for s in (small, -small))
  assert (above - below) / (2 * small) == pytest.approx(gradient @ v, rel=1e-6)


def test_ranks_of_a_small_graph_sum_to_one_and_follow_links(tmp_path):
  (tmp_path / "edges").write_text("# a star\n1 0\n2 0\n3 0\n0 1\n")
  ranks, names = peers_on_data.ranks(tmp_path / "edges")
  assert ranks.sum() == pytest.approx(1)
  assert names[np.argmax(ranks)] == 0
  assert graphs.load(str(tmp_path / "edges"), "").nodes == 4
