"""The advisor: closed forms, extremes, what it says, and where its numbers come from."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import choices, prediction
from experiments.reports import advice, evidence, options, work
from experiments.reports.advice import EXACT, Option
from research.analysis.cost import Load
from research.analysis.network import Network
from research.core import registry

ROOT = Path(__file__).parents[2]
SIZE = 4e6  # bytes of a model
WORKERS = 8
RING = 2 * (WORKERS - 1) / WORKERS


def option(name: str, sent: float, ratio: float | None = 1.0, **changes) -> Option:
  known = (ratio, ratio, ratio) if ratio is not None else (None, math.nan, math.nan)
  return Option(name, name, (), Load(sent, 14.0), 0.0, 12e6, 1, 0, *known)._replace(**changes)


DENSE = option(EXACT, RING * SIZE)
INT8 = option("int8", RING * SIZE / 4, encoding=1e-3, memory=16e6)
LOCAL = option("local", RING * SIZE / 4 / 32, 1.5, period=32)
PRIVATE = option("private", RING * SIZE, None, serves=("privacy",))
ALL = (DENSE, INT8, LOCAL, PRIVATE)


def ranked(link: str, priority: str = "time", given=ALL, computing: float = 0.01):
  network = Network().on(link) if link else Network()
  return advice.ranked(given, network, workers=WORKERS, computing=computing, priority=priority)


def test_an_unlimited_link_needs_no_compression():
  rows = ranked("")
  assert [row["name"] for row in rows] == [EXACT, "int8", "local", "private"]
  assert advice.verdict(rows).startswith("do not compress")
  assert rows[0]["step_seconds"] == 0.01
  assert "1.10 times the time: a step takes 1.10 times as long" in rows[1]["why"]
  assert "1.50 times the time: it needs 1.50 times the steps" in rows[2]["why"]


def test_a_slow_link_needs_local_steps_with_compression():
  rows = ranked("1mbit")
  assert [row["name"] for row in rows[:3]] == ["local", "int8", EXACT]
  seconds = 8 * RING * SIZE / 1e6
  assert rows[2]["step_seconds"] == pytest.approx(0.01 + seconds)
  assert rows[0]["seconds"] == pytest.approx(1.5 * (0.01 + seconds / 128))
  assert advice.verdict(rows).startswith("use local, ")
  assert rows[2]["why"].endswith("100% of a step is the link")


def test_the_crossing_point_is_where_the_times_are_equal():
  """0.01 + 8 s / r = 0.01 + e + 8 s / 4 r  at  r = 6 s / e."""
  rate = 6 * RING * SIZE / 1e-3
  first = lambda factor: ranked(f"{factor * rate:.0f}bit", given=(DENSE, INT8))[0]["name"]
  assert (first(0.99), first(1.01)) == ("int8", EXACT)


def test_priorities_rank_by_bytes_and_memory_and_exclude():
  assert ranked("", "bytes")[0]["name"] == "local"
  assert ranked("1mbit", "memory", given=(DENSE, INT8))[0]["name"] == EXACT
  rows = ranked("1mbit", "privacy")
  assert [row["excluded"] for row in rows] == [False, True, True, True]
  assert rows[0]["name"] == "private"
  assert rows[1]["why"] == advice.NEEDS["privacy"]
  assert advice.verdict(ranked("", "faulty")).startswith("no method here serves")


def test_a_server_is_as_fast_as_its_queue():
  server = option("server", SIZE, None, pushes=(SIZE / 4, SIZE))
  step = lambda link, workers: advice.step_of(server, Network().on(link), workers, 0.01).seconds
  assert step("100tbit", WORKERS) == pytest.approx(0.01, rel=1e-3)
  assert step("1mbit", WORKERS) == pytest.approx(WORKERS * 8 * SIZE / 1e6, rel=1e-3)
  assert step("10gbit", 1) == pytest.approx(0.01 + 8 * SIZE / 1e10)


def test_ranges_that_touch_are_said():
  near = INT8._replace(name="near", ratio=1.05, low=0.9, high=1.2)
  assert advice.verdict(ranked("100mbit", given=(DENSE, INT8, near))).endswith("runs: near")


def test_a_small_gain_is_not_worth_compression():
  close = INT8._replace(encoding=0.0)
  rate = lambda gain: 8 * RING * SIZE * (1 - (1 + gain) / 4) / (gain * 0.01)
  said = lambda gain: advice.verdict(ranked(f"{rate(gain):.0f}bit", given=(DENSE, close)))
  assert "no method is more than 5% faster" in said(0.04)
  assert said(0.06).startswith("use int8, 1.06 times as fast")


def test_other_priorities_give_other_reasons():
  said = lambda priority: advice.verdict(ranked("", priority, given=ALL[:3]), priority)
  assert said("bytes") == "use local: it sends the fewest bytes to the target"
  assert said("memory").startswith(f"use {EXACT}: it needs the least memory")


def test_a_server_receives_what_is_encoded_and_sends_the_model():
  method = registry.build("method", "asgd(sgd(0.1), gather_mean(bf16()))")
  shapes = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
  push, pull, memory = work.of_server(method, shapes)
  assert (push, pull) == (2 * 64 * 32, 4 * 64 * 32)
  assert memory >= pull


def test_a_method_of_one_s_own_is_ranked_without_a_number_of_steps(monkeypatch):
  monkeypatch.setattr(options, "CANDIDATES", ())
  shapes = options.shapes_of("4kB")
  (mine,) = options.options(shapes, 4, Network(), more=["sgp(sgd(0.1), ring())"])
  assert (mine.name, mine.ratio) == ("sgp(sgd(0.1), ring())", None)
  assert mine.load.sent >= 2 * 4 * sum(leaf.size for leaf in shapes.values())


def test_a_ratio_on_which_seeds_disagree_counts_as_one():
  assert evidence.Evidence(0.97, 0.93, 1.02, "").counted == 1.0
  assert evidence.Evidence(1.2, 1.1, 1.3, "").counted == 1.2


def test_the_rank_keeps_the_recorded_compression():
  one = next(one for one in options.CANDIDATES if one.name == "PowerSGD")
  shapes = options.shapes_of("67.108864MB")  # one square matrix
  spec = options.spec_of(one, shapes, 8)
  assert spec == one.spec.format(rank=round(options.SIDE / 2 / options.POWER_SGD))


@pytest.mark.parametrize("key", evidence.READERS)
def test_every_ratio_comes_from_a_result_that_is_there(key):
  found = evidence.READERS[key]()
  assert 0 < found.low <= found.ratio <= found.high < 10
  for source in found.source.split(", "):
    assert source == evidence.EXACT.source or (ROOT / source).is_dir()


def test_a_ratio_is_read_off_the_curves():
  line = lambda label, y: {"label": label, "x": [10.0, 20.0, 30.0], "y": y}
  lines = [line("exact", [4.0, 2.0, 1.0]), line("other", [5.0, 4.0, 3.0])]
  found = evidence.of_curves(lines, "exact", "other", "here")
  assert found.ratio == 30 / 15
  assert found.times(found) == (4, 4, 4, "here")
  with pytest.raises(ValueError, match="no line"):
    evidence.of_curves(lines, "exact", "missing", "here")


def test_shapes_of_models(tmp_path):
  count = lambda text: sum(leaf.size for leaf in options.shapes_of(text).values())
  assert count("500MB") == 125_000_000 // options.SIDE * options.SIDE  # whole rows
  assert count("4kB") == 31 * 31 + 31
  with pytest.raises(ValueError, match="holds no parameter"):
    options.shapes_of("0GB")
  header = json.dumps(
    {"__metadata__": {}, "w": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}}
  ).encode()
  (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
  assert count(str(tmp_path)) == 15
  with pytest.raises(ValueError, match="did you mean '150m'"):
    options.shapes_of("150mm")
  (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 5) + b"words")
  with pytest.raises(ValueError, match="not a file of safetensors"):
    options.shapes_of(str(tmp_path))


def run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, str(ROOT / "experiments" / "advise.py"), *arguments]
  return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--model=150mb", "did you mean '150m'?"),
    pytest.param("--network=fast", "'fast' is not a bandwidth", marks=pytest.mark.slow),
    pytest.param("--chip=v9", "--chip='v9'", marks=pytest.mark.slow),
    pytest.param("--utilization=2", "--utilization=2.0", marks=pytest.mark.slow),
  ],
)
def test_an_invalid_flag_is_a_line(argument, words):
  ended = run("--model=4kB", argument)
  assert ended.returncode == 2
  assert len(ended.stderr.splitlines()) == 1
  assert words in ended.stderr


@pytest.mark.slow
def test_the_command_ranks_traced_methods(tmp_path):
  place = tmp_path / "advice.json"
  common = ("--model=4MB", "--workers=4", "--compute_seconds=0.1")
  ended = run(*common, "--network=100tbit", f"--json={place}")
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.startswith("do not compress")
  found = json.loads(place.read_text())
  assert found["parameters"] == 1_000_000
  dense = next(row for row in found["rows"] if row["name"] == EXACT)
  assert dense["bytes_per_step"] == pytest.approx(1.5 * 4e6, rel=1e-3)
  assert len(found["options"]) == len(options.CANDIDATES)
  first = run(*common, "--network=1mbit").stdout.splitlines()[0]
  assert first.startswith(("use SparseLoCo", "use DiLoCo, 32, int8"))


# ---- the recorded results


def test_no_recorded_prediction_is_for_the_link_of_the_probe():
  found = json.loads((ROOT / "results" / "prediction" / "result.json").read_text())
  cells = found["prediction"]
  assert prediction.PROBED not in {cell["link"] for cell in cells}
  assert found == found | prediction.summary(cells)


def test_the_recorded_choices_are_those_of_the_advisor():
  found = json.loads((ROOT / "results" / "advice" / "result.json").read_text())
  cases = choices.recorded()
  assert [case["choice"] for case in found["advice"]] == [case["choice"] for case in cases]
  assert found == found | choices.summary(cases)
