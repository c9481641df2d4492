"""TensorFlow's strategies beside ours between two hosts of one core each: a case of `peers.py`.

A perceptron of 1.86 million parameters on MNIST, 64 images per host and step, SGD at 0.1. A step of
the asynchronous programs is an update from one worker's 64 images, at half of the rate.
"""

import itertools
import json
import os
import secrets
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import hosts, speed
from experiments.benchmarks.hosts import flags_of, netlab, tell
from experiments.benchmarks.peers_rows import Row, Turns

RATES = {"1gbit": 96, "100mbit": 40}  # and steps
DISPATCH = 8
MOST = 4000  # steps to the target
PROGRAM = "baselines/peers_tensorflow.py"
Found = tuple[float, float]  # milliseconds and bytes per step


class Ours(NamedTuple):
  """One of our executions, beside one of TensorFlow's strategies."""

  spec: str
  peer: str  # program of peers_tensorflow.py


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


def measure(python: str, repeats: int) -> Iterator[Row]:
  """Measures all cases; `python` is the interpreter that has TensorFlow, or empty."""
  with tempfile.TemporaryDirectory() as folder:
    data = images(Path(folder)) if python else Path()
    steps = {name: _steps(one) for name, one in EXECUTIONS.items()}
    theirs: dict[str, int] = {}
    for name, peer in PEERS.items() if python else ():
      found = of_peer(python, name, data, "", MOST, speed.TARGET)
      theirs[peer] = found["steps"]
      tell(f"to {speed.TARGET:.0%}, {peer}: {found['steps']} steps")
    for rate in RATES:
      yield from _at(rate, _turns(python, data, rate, repeats), steps, theirs)


def _at(
  rate: str, found: dict[str, list[Found]], steps: dict[str, int], theirs: dict[str, int]
) -> Iterator[Row]:
  """The rows of a link, from each program's turns and its steps to the target."""
  column = lambda name, i: [turn[i] for turn in found[name]]
  whole = lambda name, count: [count * ms / 1000 for ms in column(name, 0)]
  for name, one in EXECUTIONS.items():
    peer = PEERS[one.peer]
    has = peer in found
    of_peer = lambda i, peer=peer, has=has: column(peer, i) if has else None
    cells: list[tuple[str, str, Turns, Turns | None]] = [
      ("How long does a step take between two hosts?", "ms", column(name, 0), of_peer(0)),
      ("How many bytes does a step send, over both hosts?", "bytes", column(name, 1), of_peer(1)),
    ]
    if has:
      peers_whole: Turns | None = whole(peer, theirs[peer])
    else:
      peers_whole = None
    question = f"How long is training to {speed.TARGET:.0%} of MNIST's test images?"
    cells.append((question, "s", whole(name, steps[name]), peers_whole))
    for question, unit, ours, other in cells:
      extra = {"steps": steps[name], "peer_steps": theirs.get(peer)} if unit == "s" else {}
      yield Row(question, f"{rate}, {name}", unit, ours, peer, other, extra=extra)


def _turns(python: str, data: Path, rate: str, repeats: int) -> dict[str, list[Found]]:
  """Runs all programs in turn, in reversed order every other turn."""
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
  """Writes MNIST for TensorFlow: flat images as bytes."""
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
  """What a program of peers_tensorflow.py prints, run on two hosts."""
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
  """Milliseconds per step of our loop, and bytes that both hosts send, counted in another run."""
  milliseconds = statistics.median(speed.of_loop(spec, rate, RATES[rate]))
  return milliseconds, sum(hosts.counted(spec))


def of_server(spec: str, rate: str) -> Found:
  """Milliseconds and bytes per update of our parameter server, a worker on each host."""
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
  """Runs a program on two hosts, with `python` if given; parses the JSON that its first prints."""
  token = f"RAY_AUTH_TOKEN={secrets.token_hex(32)}"
  with tempfile.TemporaryDirectory() as folder:
    before = ["env", "RAY_AUTH_MODE=token", token, f"RAY_TMPDIR={folder}"]
    command = netlab(2, speed.shaped(rate, folder), line, *before)
    command = [python if python and word == "python" else word for word in command]
    printed = hosts.run(command)
  (found,) = [row[4:] for row in printed.splitlines() if row.startswith(f'[0] {{"{key}')]
  return json.loads(found)


def _steps(one: Ours) -> int:
  """Steps until our execution reaches the target."""
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
