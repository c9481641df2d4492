"""The programs that the suites hosts and overlap start between hosts, without starting them."""

import time
from pathlib import Path

import pytest

from experiments.benchmarks import overlap, speed


@pytest.fixture
def started(monkeypatch):
  """The command lines that would have been run; each prints a step of 2 ms, and 8 steps."""
  lines: list[list[str]] = []

  def run(line):
    lines.append(line)
    return '[0] {"milliseconds": [2.0], "steps": 8}\n'

  monkeypatch.setattr(speed, "run", run)
  monkeypatch.setattr(speed, "of_loop", lambda spec, rate: [1.0])
  monkeypatch.setattr(speed, "_ticks", lambda: [time.perf_counter_ns()] * 8)
  return lines


def test_the_programs_of_the_baselines_exist(started):
  for method in speed.PAIRS:
    speed.pair(method, "1gbit", 1, has_torch=True)
  programs = {Path(word) for line in started for word in line if word.endswith(".py")}
  assert {"by_hand_hosts.py", "peers_torch.py"} < {one.name for one in programs}
  assert all(one.exists() for one in programs)


def test_the_time_to_the_target_is_steps_times_their_time(started, monkeypatch):
  monkeypatch.setattr(overlap, "_run", lambda spec, executor, rate: {"step": 0.5})
  monkeypatch.setattr(speed, "steps_to_target", lambda spec: 4)
  found = overlap.to_target(3)
  assert found["ours"]["seconds"] == pytest.approx(4 * 0.5 / 1000)
  assert found["sooner"] == pytest.approx(8 * 2.0 / (4 * 0.5))
  assert all(Path(word).exists() for line in started for word in line if word.endswith(".py"))
  assert "8 times sooner (goal: at least 60)" in overlap.target_lines(found)[-1]
