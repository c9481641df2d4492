"""Tests what bench.py's suite sites computes of 70 billion parameters on 1,000 sites."""

import json

import pytest

from experiments.benchmarks import sites
from experiments.benchmarks.hosts import ROOT
from experiments.benchmarks.sites import RATES, WAITING, Step
from experiments.reports import sites as reports

PARAMETERS = 70_553_706_496  # of Llama 3 70B, whose embedding and head have 128,256 rows each
RESULT = json.loads((ROOT / "results" / "sites" / "result.json").read_text())
ROWS = {row["name"]: row for row in RESULT["sites"]}


class Linear:
  """A method that waits a + b / rate seconds per step of c seconds."""

  def __init__(self, a, b, c):
    self.a, self.b, self.c = a, b, c

  def step(self, network):
    waits = max(0.0, self.a + self.b / (network.upload / 1000))
    return Step(self.c + waits, waits / (self.c + waits), 1.0)


@pytest.mark.parametrize(("a", "b", "c"), [(0.1, 30.0, 2.0), (0.0, 7.0, 10.0), (-4.0, 90.0, 2.0)])
def test_the_link_that_is_needed(a, b, c):
  play = Linear(a, b, c)
  at = {rate: play.step(sites.network(rate, "ring")) for rate in RATES}
  needed = sites.needed(play, "ring", at)
  assert needed is not None
  assert needed == pytest.approx(b / (c * WAITING / (1 - WAITING) - a))
  assert play.step(sites.network(needed, "ring")).waiting == pytest.approx(WAITING)


def test_no_link_is_fast_enough_where_delays_alone_take_longer():
  play = Linear(1.0, 30.0, 2.0)
  at = {rate: play.step(sites.network(rate, "ring")) for rate in RATES}
  assert sites.needed(play, "ring", at) is None


def test_the_recorded_bytes_are_those_of_the_formulas():
  assert list(ROWS) == list(sites.METHODS)
  bytes_ = 4 * PARAMETERS
  ring = 2 * (sites.SITES - 1) / sites.SITES
  sent = {name: row["sent_per_step"] for name, row in ROWS.items()}
  assert sent["AdamW float32"] == pytest.approx(ring * bytes_, rel=1e-4)  # four devices send a norm
  assert sent["AdamW bfloat16"] == pytest.approx(ring * bytes_ / 2, rel=1e-3)
  assert sent["DiLoCo float32"] == pytest.approx(ring * bytes_ / 100, rel=1e-4)
  assert sent["gossip"] == pytest.approx(bytes_ / 100, rel=1e-4)
  assert sent["buffered asynchrony"] == pytest.approx(bytes_ / 100)


def test_the_compiled_program_has_the_state_and_the_bytes_of_the_traced_one():
  names = {"AdamW float32": sites.EVERY_STEP, "DiLoCo float32": sites.SELDOM}
  for name, folder in names.items():
    path = ROOT / "results" / "compile" / folder / "compile.json"
    compiled = json.loads(path.read_text())
    state = compiled["memory"]["of_arguments"]["state"]
    assert state == pytest.approx(ROWS[name]["state_per_chip"], rel=1e-4)
    crossing = [one for one in compiled["collectives"] if one["crosses_slices"]]
    sent = sites.CHIPS * sum(one["sent_bytes"] * one["times"] for one in crossing)
    of_ring = 4 * PARAMETERS / compiled["steps_per_round"]  # of two sites
    assert sent == pytest.approx(of_ring, rel=1e-3)


def test_the_work_of_absent_sites_is_done_later():
  row = {"seconds": 10.0, "waiting": 0.0, "present": 0.5}
  assert reports.days_of(row) == pytest.approx(2 * sites.STEPS * 10 / 86_400)


def test_the_table_is_that_of_the_result():
  table = (ROOT / "results" / "sites" / "table.md").read_text()
  assert table == "\n".join(reports.sites_table(RESULT["sites"])) + "\n"


def test_steps_per_exchange():
  """An exchange of 900 s beside steps of 3 s: 1,200 steps wait for a fifth of 4,500 s."""
  step = {"seconds": 12.0, "waiting": 0.75, "present": 1.0}
  row = {"steps_per_round": 100, "rates": {"1": step}}
  assert reports.steps_needed(row) == pytest.approx(1200)


def test_rows_of_other_methods_are_kept():
  earlier = [{"name": name, "days": 1} for name in ("AdamW float32", "gossip", "renamed")]
  found = sites.merged(earlier, [{"name": "gossip", "days": 2}, {"name": "SparseLoCo", "days": 3}])
  kept = [("AdamW float32", 1), ("SparseLoCo", 3), ("gossip", 2)]
  assert [(row["name"], row["days"]) for row in found] == kept
