"""The leaderboard: draws, ranks, predicted hours, and a run in small that is resumed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import leaderboard
from experiments.benchmarks.contestants import CONTESTANTS, contestant
from experiments.reports import ranking
from research.core import registry
from research.training.config import UsageError

PLACE = ranking.Place("tiny", "v5p", 4, 2**16, 0.5)


@pytest.mark.parametrize("one", CONTESTANTS, ids=lambda one: one.name)
def test_every_contestant_can_be_built_from_values_in_its_ranges(one):
  values = one.drawn(3)
  assert values == one.drawn(3) != one.drawn(4)
  for name, (least, greatest) in one.ranges.items():
    assert least <= values[name] <= greatest
  spec = one.built(values, 512)
  assert "{" not in spec
  registry.build("method", spec)


def row(
  name: str, loss: float, sent: float, spec: str = "data_parallel(sgd(0.1), mean())"
) -> dict[str, Any]:
  """A row of 100 steps of 8 workers with 1,000 parameters, which send `sent` bytes per step."""
  summary = {
    "eval": {"loss": loss},
    "wire": {"total_bytes_per_worker": 100 * sent, "dense_bytes_per_step_per_worker": 7000.0},
    "steps": 100,
    "workers": 8,
  }
  trials = [{"values": {"rate": 0.1}, "train_loss": 1.0}, {"values": {}, "train_loss": None}]
  return {"name": name, "data": "iid", "spec": spec, "ranges": {}, "trials": trials} | {
    "fresh": [summary, {**summary, "eval": {"loss": loss + 0.2}}]
  }


def test_bytes_and_hours_of_a_row_are_known():
  (found,) = ranking.ranked([row("mean", 1.0, 7000.0)], PLACE)["rows"]
  assert found["loss"] == pytest.approx(1.1)
  assert found["bytes_per_parameter_and_step"] == pytest.approx(7.0)
  size = ranking.parameters("tiny")
  computing = 6 * size * 2**16 / (4 * 459e12 * 0.5)
  assert PLACE.computing == pytest.approx(computing)
  seconds = computing + 8 * 7 * size / 1e9
  assert found["hours"]["1gbit"] == pytest.approx(100 * seconds / 3600)


def test_an_exchange_that_overlaps_costs_what_is_exposed():
  late = "late(local_sgd(sgd(0.1), mean(), period=4), 4)"
  (found,) = ranking.ranked([row("late", 1.0, 1e-9, late)], PLACE)["rows"]
  assert found["hours"]["100mbit"] == pytest.approx(100 * PLACE.computing / 3600)


def test_the_best_loss_is_first_and_a_diverged_method_last():
  lost = row("lost", 0.1, 1.0)
  lost["fresh"][1] = None
  found = ranking.ranked([lost, row("b", 2.0, 1.0), row("a", 1.0, 7000.0)], PLACE)
  assert [r["name"] for r in found["rows"]] == ["a", "b", "lost"]
  assert found["rows"][-1]["loss"] is None
  text = ranking.markdown(found)
  assert "1 of 2 diverged" in text
  assert "rate 0.1" in text


def test_the_front_holds_what_nobody_beats_in_both():
  rows = [{"loss": loss, "x": x} for loss, x in ((3, 1), (2, 2), (2.5, 3), (1, 4), (1, 5))]
  assert [r["x"] for r in ranking.front(rows, lambda r: r["x"])] == [1, 2, 4]


def test_a_place_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="chip='v9' is unknown"):
    PLACE._replace(chip="v9").check()
  with pytest.raises(ValueError, match="utilization"):
    PLACE._replace(utilization=math.nan).check()


def test_the_abbreviations_of_a_spec_are_filled_in():
  one = contestant("x", "diloco(ADAMW, OUTER, mean(), period=H)", {"rate": (1.0, 1.0)})
  assert one.built({"rate": 0.5, "outer": 0.25}, 100) == (
    "diloco(adamw(warmup_cosine_decay_schedule(0.0, 0.5, 10, 100)), "
    "sgd(0.25, momentum=0.6, nesterov=True), mean(), period=16)"
  )


COMMAND = Path(__file__).parents[2] / "experiments" / "leaderboard.py"
SMALL = ("--contestants=AdamW", "--trials=1", "--seeds=1", "--steps=16", "--batch_size=8")


def run_command(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, str(COMMAND), *arguments], capture_output=True, text=True)


def test_an_unknown_contestant_is_refused():
  with pytest.raises(UsageError, match=r"^--contestants='AdemW': .*did you mean 'AdamW'\?"):
    leaderboard.chosen("AdamW;AdemW")


def test_an_unknown_kind_of_data_is_a_line():
  ended = run_command("--data=iid,rolls")
  assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
  assert "'rolls'" in ended.stderr
  assert "did you mean 'roles'?" in ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(
  not (Path(os.environ.get("RESEARCH_DATA_DIR", "")) / "tinyshakespeare").is_dir(),
  reason="$RESEARCH_DATA_DIR has no tinyshakespeare",
)
def test_the_same_command_continues_a_leaderboard(tmp_path):
  """Complete runs are read and not run again; the figures are the same."""
  model = "--model=transformer(layers=1, width=16, heads=2, kv_heads=2, hidden=16)"
  folders = (f"--out={tmp_path / 'out'}", f"--compilation_cache={tmp_path / 'compiled'}")
  flags = (*SMALL, model, *folders)
  first = run_command(*flags)
  assert first.returncode == 0, first.stderr
  found = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
  assert [row["data"] for row in found["rows"]] == ["iid", "roles"]
  assert all(row["loss"] < math.log(65) for row in found["rows"])
  assert (tmp_path / "out" / "leaderboard.png").exists()
  assert (tmp_path / "out" / "steps.png").exists()
  (iid, _) = found["rows"]
  metrics = tmp_path / "out" / "iid" / "adamw" / "seed-101" / "metrics.jsonl"
  written = [json.loads(line) for line in metrics.read_text().splitlines()]
  assert iid["curve"] == [[row["step"], row["loss"]] for row in written if "loss" in row]
  times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/*/metrics.jsonl")}
  assert len(times) == 4
  assert run_command(*flags).returncode == 0
  assert times == {path: path.stat().st_mtime_ns for path in times}
  assert json.loads((tmp_path / "out" / "leaderboard.json").read_text())["rows"] == found["rows"]
