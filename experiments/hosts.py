"""Runs between hosts of one machine: bytes as predicted and as the kernel counts them, and speed.

The suites wire and hosts of bench.py. Hosts are network namespaces (launch/netlab.py).
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from research.comm import counters
from research.train.config import Config

ROOT = Path(__file__).parents[1]
# 1.86 million parameters.
MODEL = {"task": "mnist()", "model": "mlp(hidden=[1024, 1024])"}
METHODS = {
  "dense": "data_parallel(sgd(0.1), mean())",
  "bfloat16 sum": "data_parallel(sgd(0.1), sum_mean(bf16()))",
  "two_phase(int8)": "data_parallel(sgd(0.1), error_feedback(two_phase(int8())))",
  "gather top_k(1%)": "data_parallel(sgd(0.1), error_feedback(gather_mean(top_k(0.01))))",
  "power_sgd(4)": "data_parallel(sgd(0.1), error_feedback(power_sgd(4)))",
  "local_sgd(8)": "local_sgd(sgd(0.1), mean(), period=8)",
  "ring gossip": "d_psgd(sgd(0.1), gossip(ring()))",
}
DISPATCH = 16  # steps


def flags_of(config: dict[str, Any]) -> list[str]:
  return [f"--{name}={value}" for name, value in config.items()]


def netlab(hosts: int, launcher: Sequence[str], line: Sequence[str], *before: str) -> list[str]:
  """The command line that runs another one on so many hosts; `line` begins with a file of ours."""
  program, *arguments = line
  command = [*before, "python", str(ROOT / "experiments" / program), *arguments]
  lab = [sys.executable, str(ROOT / "launch" / "netlab.py"), f"--hosts={hosts}", *launcher]
  return [*lab, "--", *command]


def run(line: Sequence[str]) -> str:
  """What a command line prints.

  Raises:
    RuntimeError: if it failed.
  """
  ended = subprocess.run(line, capture_output=True, text=True)
  if ended.returncode:
    lines = (ended.stdout + ended.stderr).splitlines()[-20:]
    raise RuntimeError("\n".join([f"exit code {ended.returncode}:", *lines]))
  return ended.stdout


# ---- bytes


def wire(counts: Sequence[int]) -> list[dict[str, Any]]:
  """Bytes that a host sends per step: as traced, as compiled for a CPU, as the kernel counts."""
  return [_bytes(hosts, name) for hosts, name in itertools.product(counts, METHODS)]


def _bytes(hosts: int, name: str) -> dict[str, Any]:
  steps = 3 * DISPATCH
  config: dict[str, Any] = MODEL | {
    "method": METHODS[name],
    "executor": "spmd",
    "mesh": f"data:{hosts}",
    "batch_size": 64 * hosts,
    "steps": steps,
    "steps_per_dispatch": DISPATCH,
    "check_every": 0,
    "checkpoint_every": 0,
  }
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    line = ["run.py", *flags_of(config | {"out": out})]
    run(netlab(hosts, [f"--logs={folder}/logs"], line))
    found = json.loads((out / "summary.json").read_text())["wire"]
  kernel = [host["tx_payload_bytes"] for host in found["kernel_bytes_per_step_per_host"]]
  traced = sum(found["bytes_per_step_per_worker"].values())
  traced += sum(found["metrics_bytes_per_step_per_worker"].values())
  expected, widened = compiled(Config(**config))
  return {
    "hosts": hosts,
    "method": name,
    "spec": METHODS[name],
    "traced": traced,
    "compiled": expected,
    "widened": widened,
    "kernel": kernel,
    "deviations": [count / expected - 1 for count in kernel],
  }


def compiled(config: Config) -> tuple[float, str]:
  """Bytes per step and worker of the program compiled for a CPU, and what that widens."""
  import jax

  from research.comm import compiled, wire
  from research.parallel import workers
  from research.train import assemble

  problem = assemble.assemble(config, assemble.check(config))
  rounds = config.steps_per_dispatch // problem.job.method.period
  state = problem.executor.init(jax.random.key(0))
  data = problem.executor.place(problem.examples, problem.sizes, jax.random.key(1))
  program = problem.executor.run.lower(state, data, rounds=rounds).compile()
  transfers = compiled.traffic(program, state.round.sharding.mesh)
  sent = sum(wire.by_axis(transfers, config.steps_per_dispatch).values())
  layout = workers.infer_layout(problem.job)
  asked = {x.dtype for x in workers.traffic(problem.job, layout, rounds).transfers}
  widened = asked - {x.dtype for x in transfers}
  return sent, f"{', '.join(sorted(widened))} travels as float32" if widened else ""


def wire_table(rows: list[dict[str, Any]]) -> list[str]:
  """The kernel's count beside the prediction, in Markdown."""
  lines = [
    "| method | hosts | bytes per step and host, as traced | as compiled for a CPU | as the kernel "
    "counts, without headers | deviation | |"
  ]
  lines.append("|---|---|---|---|---|---|---|")
  for row in rows:
    counted = sum(row["kernel"]) / len(row["kernel"])
    worst = max(row["deviations"], key=abs)
    numbers = f"{row['traced']:,.0f} | {row['compiled']:,.0f} | {counted:,.0f} | {worst:+.2%}"
    lines.append(f"| {row['method']} | {row['hosts']} | {numbers} | {row['widened']} |")
  return lines


# ---- speed


# Rates of the links, and so many steps by each: those that take 100 Mbit/s are few and long.
RATES = {"": 160, "1gbit": 160, "100mbit": 64}
SPEED_DISPATCH = 8
PAIRS = {  # ours, and the same by hand and in PyTorch
  "dense": ("dense", "dense", "dense"),
  "fp16": (None, None, "fp16"),
  "two_phase(int8)": ("two_phase(int8)", "int8", None),
  "gather top_k(1%)": ("gather top_k(1%)", "top_k", None),
  "power_sgd(4)": ("power_sgd(4)", "power_sgd", "power_sgd"),
  "local_sgd(8)": ("local_sgd(8)", "local", "local"),
}


def speed(repeats: int, has_torch: bool) -> list[dict[str, Any]]:
  """Milliseconds per step between two hosts of one core each: ours, by hand, PyTorch's, in turn."""
  return [
    _speed(method, rate, repeats, has_torch) for rate, method in itertools.product(RATES, PAIRS)
  ]


def _speed(method: str, rate: str, repeats: int, has_torch: bool) -> dict[str, Any]:
  ours, by_hand, torch = PAIRS[method]
  programs: dict[str, Callable[[], list[float]]] = {}
  if ours:
    programs["ours"] = lambda: _of_loop(METHODS[ours], rate)
  if by_hand:
    programs["by_hand"] = lambda: _of_program("by_hand_hosts.py", by_hand, rate)
  if torch and has_torch:
    programs["torch"] = lambda: _of_program("peers_torch.py", torch, rate)
  found: dict[str, list[float]] = {name: [] for name in programs}
  for turn in range(repeats):
    for name in list(programs)[:: 1 if turn % 2 else -1]:
      found[name].append(statistics.median(programs[name]()))
  return {"method": method, "rate": rate or "not shaped", "milliseconds": found}


def _shaped(rate: str, folder: str) -> list[str]:
  return [f"--rate={rate}", "--cores_per_host=1", f"--logs={folder}/logs"]


def _of_loop(spec: str, rate: str) -> list[float]:
  """Milliseconds per step of each dispatch of the loop, but the first two."""
  config = MODEL | {"method": spec, "executor": "spmd", "mesh": "data:2", "batch_size": 128}
  config |= {"steps": RATES[rate], "steps_per_dispatch": SPEED_DISPATCH}
  config |= {"log_every": SPEED_DISPATCH, "eval_every": 0, "check_every": 0, "checkpoint_every": 0}
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    line = ["run.py", *flags_of(config | {"out": out})]
    run(netlab(2, _shaped(rate, folder), line, "env", "-u", counters.PLACES))  # they take time
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  at = [row["seconds"] for row in rows[1:-1]]  # evaluation comes before the last row
  return [1000 * (b - a) / SPEED_DISPATCH for a, b in itertools.pairwise(at)]


def _of_program(file: str, method: str, rate: str) -> list[float]:
  """The same of a program that prints them."""
  with tempfile.TemporaryDirectory() as folder:
    line = [file, method, str(RATES[rate]), str(SPEED_DISPATCH)]
    printed = run(netlab(2, _shaped(rate, folder), line))
  (found,) = [line[4:] for line in printed.splitlines() if line.startswith('[0] {"milli')]
  return json.loads(found)["milliseconds"]


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
  """Milliseconds per step, and ours in relation to the others, in Markdown."""
  lines = [
    "| link | method | ours, ms | by hand, ms | PyTorch, ms | by hand / ours | PyTorch / ours |"
  ]
  lines.append("|---|---|---|---|---|---|---|")
  for row in rows:
    median = {name: statistics.median(found) for name, found in row["milliseconds"].items()}
    ours, by_hand, torch = (median.get(name) for name in ("ours", "by_hand", "torch"))
    ratio = lambda other, ours=ours: f"{other / ours:.2f}" if other and ours else ""
    shown = [f"{found:.1f}" if found else "" for found in (ours, by_hand, torch)]
    cells = [row["rate"], row["method"], *shown, ratio(by_hand), ratio(torch)]
    lines.append("| " + " | ".join(cells) + " |")
  return lines
