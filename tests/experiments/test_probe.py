"""The probe: the file of one machine, and flags that are rejected before anything is measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from research.analysis import network

COMMAND = Path(__file__).parents[2] / "experiments" / "probe.py"
SMALL = ("--task=digits()", "--model=linear()", "--batch_size=8")


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, str(COMMAND), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_one_machine_has_computation_and_kernels_and_no_link(tmp_path):
  place = tmp_path / "net.json"
  ended = run(*SMALL, "--kernels=int8(); majority_vote()", f"--out={place}")
  assert ended.returncode == 0, ended.stderr
  assert str(place) in ended.stdout
  found = network.parse(str(place))
  assert found.computing > 0
  assert found.workers == 1
  assert {"int8()", "majority_vote()"} < {*found.kernels}
  assert all(one.encode > 0 for one in found.kernels.values())
  on_link = network.parse(f"{place},100mbit,20ms")
  assert (on_link.upload, on_link.latency) == (1e8, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("argument", "words"),
  [("--kernels=int9()", "int9"), ("--out=net.txt", "net.json"), ("--rate=fast", "100mbit")],
)
def test_an_invalid_flag_is_a_line(argument, words, tmp_path):
  ended = run(*SMALL, f"--out={tmp_path / 'net.json'}", argument)
  assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
  assert words in ended.stderr
  assert not [*tmp_path.iterdir()]
