"""Compares TensorFlow's strategies with ours on two hosts of one core each, for `peers.py`.

The programs train a perceptron of 1.86 million parameters on MNIST by SGD, with 64 images per host
and step and a learning rate of 0.1. A step of the asynchronous programs is an update from one
worker's 64 images, with half this learning rate.
"""

import itertools
import json
import os
import secrets
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import hosts, speed
from experiments.benchmarks.hosts import flags_of, netlab, tell
from experiments.benchmarks.peers_rows import Row

RATES = {"1gbit": 96, "100mbit": 40}  # number of steps at each rate
DISPATCH = 8
MOST = 4000  # maximum number of steps to the target
PROGRAM = "baselines/peers_tensorflow.py"
Found = tuple[float, float]  # milliseconds and bytes per step


class Ours(NamedTuple):
  """One of our configurations, and the TensorFlow strategy that serves as its baseline."""

  spec: str
  peer: str  # name of a program in peers_tensorflow.py


EXECUTIONS = {
  "mean()": Ours("data_parallel(sgd(0.1), mean())", "mirrored"),
  "two_phase(bf16)": Ours("data_parallel(sgd(0.1), two_phase(bf16()))", "mirrored"),
  "two_phase(int8)": Ours(hosts.METHODS["two_phase(int8)"], "mirrored"),
  "server, mean()": Ours("asgd(sgd(0.05), mean())", "server"),
  "server, gather_mean(int8())": Ours(
    "asgd(sgd(0.05), error_feedback(gather_mean(int8())))", "server"
  ),
}
PEERS = {"mirrored": "MultiWorkerMirroredStrategy", "server": "ParameterServerStrategy"}


TIME = "How long does a step take between two hosts?"
BYTES = "How many bytes does a step send, over both hosts?"
STEPS = f"How many steps does training to {speed.TARGET:.0%} of MNIST's test images take?"
WHOLE = f"How long does training to {speed.TARGET:.0%} of MNIST's test images take?"


def measure(python: str, repeats: int) -> Iterator[Row]:
  """Measures the time and bytes of a step; `python` is an interpreter with TensorFlow, or ''."""
  with tempfile.TemporaryDirectory() as folder:
    data = images(Path(folder)) if python else Path()
    found = {rate: _turns(python, data, rate, repeats) for rate in RATES}
  for number, (question, unit) in enumerate(((TIME, "ms"), (BYTES, "bytes"))):
    for rate, name in itertools.product(RATES, EXECUTIONS):
      peer = PEERS[EXECUTIONS[name].peer]
      turns = {of: [turn[number] for turn in of_all] for of, of_all in found[rate].items()}
      yield Row(question, f"{rate}, {name}", unit, turns[name], peer, turns.get(peer))


def target(python: str, repeats: int) -> Iterator[Row]:
  """Counts the steps to the target, separately from `measure`, because evaluations are slow."""
  del repeats
  theirs: dict[str, list[float]] = {}
  with tempfile.TemporaryDirectory() as folder:
    data = images(Path(folder)) if python else Path()
    for kind, peer in PEERS.items() if python else ():
      theirs[peer] = [of_peer(python, kind, data, "", MOST, speed.TARGET)["steps"]]
      tell(f"to {speed.TARGET:.0%}, {peer}: {theirs[peer][0]} steps")
  for name, one in EXECUTIONS.items():
    peer = PEERS[one.peer]
    yield Row(STEPS, name, "steps", [_steps(one)], peer, theirs.get(peer))


def seconds(times: Sequence[dict[str, Any]], counts: Sequence[dict[str, Any]]) -> Iterator[Row]:
  """Multiplies the steps to the target by the median time of a step, given the rows of both."""
  steps = {row["case"]: row for row in counts}
  for row in times:
    name = row["case"].partition(", ")[2]
    if row["question"] == TIME and name in steps:
      count = steps[name]
      both = "peer_median" in row and "peer_median" in count
      theirs = [row["peer_median"] * count["peer_median"] / 1000] if both else None
      mine = [row["median"] * count["median"] / 1000]
      yield Row(WHOLE, row["case"], "s", mine, row["peer"], theirs)


def _turns(python: str, data: Path, rate: str, repeats: int) -> dict[str, list[Found]]:
  """Runs all programs in turn, and reverses the order in every other turn."""
  programs: dict[str, Callable[[], Found]] = {}
  for name, one in EXECUTIONS.items():
    measure = of_server if one.peer == "server" else of_loop
    programs[name] = lambda one=one, measure=measure: measure(one.spec, rate)
  for kind, peer in PEERS.items() if python else ():
    programs[peer] = lambda kind=kind: _of_strategy(python, kind, data, rate)
  found: dict[str, list[Found]] = {name: [] for name in programs}
  for turn in range(repeats):
    for name in list(programs)[:: 1 if turn % 2 else -1]:
      found[name].append(programs[name]())
      ms, sent = found[name][-1]
      tell(f"{rate}, {name}: {ms:.1f} ms, {sent:,.0f} bytes; load {os.getloadavg()[0]:.1f}")
  return found


def images(folder: Path) -> Path:
  """Writes MNIST for TensorFlow, with each image as a flat array of bytes."""
  import numpy as np

  from research.core import registry

  task = registry.build("task", "mnist()")
  flat = lambda x: x.reshape(len(x), -1)
  arrays = {"x": flat(task.train["x"]), "y": task.train["y"]}
  arrays |= {"test_x": flat(task.test["x"]), "test_y": task.test["y"]}
  np.savez(folder / "mnist.npz", **arrays)
  return folder / "mnist.npz"


def of_peer(
  python: str, program: str, data: Path, rate: str, steps: int, target: float | None = None
) -> dict[str, Any]:
  """Runs a program of peers_tensorflow.py on two hosts, and returns the printed results."""
  line = [
    PROGRAM,
    program,
    str(data),
    str(steps),
    str(DISPATCH),
    *([str(target)] if target else []),
  ]
  return _printed(line, rate, "milliseconds", python)


def _of_strategy(python: str, kind: str, data: Path, rate: str) -> Found:
  found = of_peer(python, kind, data, rate, RATES[rate])
  return statistics.median(found["milliseconds"]), found["bytes"]


def of_loop(spec: str, rate: str) -> Found:
  """Measures our loop's milliseconds per step and, in a separate run, both hosts' bytes."""
  milliseconds = statistics.median(speed.of_loop(spec, rate, RATES[rate]))
  return milliseconds, sum(hosts.counted(spec))


def of_server(spec: str, rate: str) -> Found:
  """Measures the milliseconds and bytes per update of our server, with a worker on each host."""
  config = hosts.MODEL | {"method": spec, "executor": "server", "workers": 2, "batch_size": 128}
  config |= {"steps": 2 * RATES[rate], "log_every": DISPATCH, "eval_every": 0}
  config |= {"checkpoint_every": 0}
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    line = ["benchmarks/on_ray.py", *flags_of(config | {"out": out})]
    sent = _printed(line, rate, "bytes")["bytes"]
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
  at = [(row["step"], row["seconds"]) for row in rows if "loss" in row]
  each = [1000 * (t - s) / (n - m) for (m, s), (n, t) in itertools.pairwise(at[1:]) if n > m]
  return statistics.median(each), sent


def _printed(line: list[str], rate: str, key: str, python: str = "") -> dict[str, Any]:
  """Runs a program on two hosts, with `python` if given; parses the first host's JSON output."""
  token = f"RAY_AUTH_TOKEN={secrets.token_hex(32)}"
  with tempfile.TemporaryDirectory() as folder:
    before = ["env", "RAY_AUTH_MODE=token", token, f"RAY_TMPDIR={folder}"]
    command = netlab(2, speed.shaped(rate, folder), line, *before)
    command = [python if python and word == "python" else word for word in command]
    printed = hosts.run(command)
  (found,) = [row[4:] for row in printed.splitlines() if row.startswith(f'[0] {{"{key}')]
  return json.loads(found)


def _steps(one: Ours) -> int:
  """Counts the steps until our configuration reaches the target."""
  if one.peer != "server":
    return speed.steps_to_target(one.spec)
  from experiments.benchmarks import servers

  config = hosts.MODEL | {"method": one.spec, "workers": 2, "batch_size": 128}
  _, rows = servers.trained(config | {"steps": MOST // 2, "eval_every": 40, "log_every": 40})
  reached = [row["step"] for row in rows if row.get("eval", {}).get("accuracy", 0) >= speed.TARGET]
  if not reached:
    raise RuntimeError(f"{one.spec} does not reach {speed.TARGET} in {MOST // 2} updates")
  tell(f"to {speed.TARGET:.0%}, {one.spec}: {reached[0]} updates")
  return reached[0]
