"""Compares the predicted traffic between simulated hosts with the kernel's byte counters.

This is bench.py's suite wire, with helpers for the related suites. The hosts are network
namespaces (launch/netlab.py).
"""

import contextlib
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from research.training.config import Config

ROOT = Path(__file__).parents[2]
# 1.86 million parameters
MODEL = {"task": "mnist()", "model": "mlp(hidden=[1024, 1024])"}
METHODS = {
  "dense": "data_parallel(sgd(0.1), mean())",
  "bfloat16 sum": "data_parallel(sgd(0.1), sum_mean(bf16()))",
  "two_phase(int8)": "data_parallel(sgd(0.1), error_feedback(two_phase(int8())))",
  "two_phase(bf16)": "data_parallel(sgd(0.1), two_phase(bf16()))",
  "gather top_k(1%)": "data_parallel(sgd(0.1), error_feedback(gather_mean(top_k(0.01))))",
  "gather block_top_k": "data_parallel(sgd(0.1), error_feedback(gather_mean(block_top_k())))",
  "power_sgd(4)": "data_parallel(sgd(0.1), error_feedback(power_sgd(4)))",
  "local_sgd(8)": "local_sgd(sgd(0.1), mean(), period=8)",
  "ring gossip": "d_psgd(sgd(0.1), gossip(ring()))",
}
DISPATCH = 16  # steps per dispatch


def flags_of(config: dict[str, Any]) -> list[str]:
  return [f"--{name}={value}" for name, value in config.items()]


def netlab(hosts: int, launcher: Sequence[str], line: Sequence[str], *before: str) -> list[str]:
  """Returns the command that runs `line`, a program of experiments/ with flags, on hosts."""
  program, *arguments = line
  command = [*before, "python", str(ROOT / "experiments" / program), *arguments]
  lab = [sys.executable, str(ROOT / "launch" / "netlab.py"), f"--hosts={hosts}", *launcher]
  return [*lab, "--", *command]


def run(line: Sequence[str]) -> str:
  """Runs a command line, and returns the output.

  Raises:
    RuntimeError: if the command fails.
  """
  ended = subprocess.run(line, capture_output=True, text=True)
  if ended.returncode:
    lines = (ended.stdout + ended.stderr).splitlines()[-20:]
    raise RuntimeError("\n".join([f"exit code {ended.returncode}:", *lines]))
  return ended.stdout


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
  """Context manager that terminates a launcher if the enclosed code raises an exception."""
  try:
    yield
  except BaseException:
    process.terminate()
    process.communicate()
    raise


def tell(line: str) -> None:
  """Prints the progress of a long measurement."""
  print(line, file=sys.stderr, flush=True)


def wire(counts: Sequence[int]) -> list[dict[str, Any]]:
  """Counts a host's sent bytes per step, from the trace, the CPU program and the kernel."""
  return [_bytes(hosts, name) for hosts, name in itertools.product(counts, METHODS)]


@functools.cache
def counted(spec: str) -> list[float]:
  """Counts the bytes per step that each of two hosts sends, from the kernel, without headers."""
  return _counted(2, spec)[0]


def _bytes(hosts: int, name: str) -> dict[str, Any]:
  kernel, found, config = _counted(hosts, METHODS[name])
  traced = sum(found["bytes_per_step_per_worker"].values())
  traced += sum(found["metrics_bytes_per_step_per_worker"].values())
  expected, widened = compiled(Config(**config))
  tell(f"{hosts} hosts, {name}: {sum(kernel) / len(kernel):,.0f} bytes, predicted {expected:,.0f}")
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


def _counted(hosts: int, spec: str) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
  """Trains on hosts; returns each host's bytes, the traffic in the summary, and the flags."""
  steps = 3 * DISPATCH
  config: dict[str, Any] = MODEL | {
    "method": spec,
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
  return kernel, found, config


def compiled(config: Config) -> tuple[float, str]:
  """Returns the bytes per step and worker in the CPU program, and the dtypes that XLA widens."""
  import jax

  from research.analysis import compiled, wire
  from research.parallel import traffic
  from research.training import assemble

  problem = assemble.assemble(config, assemble.check(config))
  rounds = config.steps_per_dispatch // problem.job.method.local_steps
  state = problem.executor.init(jax.random.key(0))
  data = problem.executor.place(problem.examples, problem.sizes, jax.random.key(1))
  program = problem.executor.run.lower(state, data, rounds=rounds).compile()
  transfers = compiled.traffic(program, state.round.sharding.mesh)
  sent = sum(wire.by_axis(transfers, config.steps_per_dispatch).values())
  layout = problem.executor.layout
  asked = {x.dtype for x in traffic.of_method(problem.job, layout, rounds).transfers}
  widened = asked - {x.dtype for x in transfers}
  return sent, f"{', '.join(sorted(widened))} travels as float32" if widened else ""


def wire_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table of the kernel's counts next to the prediction."""
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
