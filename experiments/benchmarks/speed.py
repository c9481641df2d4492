"""Compares the speed of this library, hand-written JAX and PyTorch on two hosts of one core each.

This is bench.py's suite hosts.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.hosts import METHODS, MODEL, ROOT, ended, flags_of, netlab, run, tell
from research.comm import counters
from research.training.config import Config

# Link rates, with the number of steps at each rate; steps at 100 Mbit/s are slower.
RATES = {"": 160, "1gbit": 160, "200mbit": 96, "100mbit": 64}
SPEED_RATES = ("", "1gbit", "100mbit")
SPEED_DISPATCH = 8
PAIRS: dict[str, tuple[str, str | None, str | None]] = {  # ours, by hand, in PyTorch
  "dense": ("dense", "dense", "dense"),
  "two_phase(bf16)": ("two_phase(bf16)", None, "fp16"),  # PyTorch sums in float16
  "two_phase(int8)": ("two_phase(int8)", "int8", None),
  "gather top_k(1%)": ("gather top_k(1%)", "top_k", None),
  "power_sgd(4)": ("power_sgd(4)", "power_sgd", "power_sgd"),
  "local_sgd(8)": ("local_sgd(8)", "local", "local"),
}


def speed(methods: Sequence[str], repeats: int, has_torch: bool) -> list[dict[str, Any]]:
  """Measures the milliseconds per step of all programs in turn, on two hosts of one core each."""
  return [
    pair(method, rate, repeats, has_torch)
    for rate, method in itertools.product(SPEED_RATES, methods)
  ]


def pair(method: str, rate: str, repeats: int, has_torch: bool) -> dict[str, Any]:
  """Measures the milliseconds per step of a method's programs in turn.

  Args:
    method: a key of PAIRS.
    rate: a key of RATES.
    repeats: the number of turns.
    has_torch: whether PyTorch is installed.
  """
  ours, by_hand, torch = PAIRS[method]
  programs: dict[str, Callable[[], list[float]]] = {}
  programs["ours"] = lambda: of_loop(METHODS[ours], rate)
  if by_hand:
    line = ["baselines/by_hand_hosts.py", by_hand, str(RATES[rate]), str(SPEED_DISPATCH)]
    programs["by_hand"] = lambda: of_program(line, rate)["milliseconds"]
  if torch and has_torch:
    other = ["baselines/peers_torch.py", torch, str(RATES[rate]), str(SPEED_DISPATCH)]
    programs["torch"] = lambda: of_program(other, rate)["milliseconds"]
  found: dict[str, list[float]] = {name: [] for name in programs}
  stolen: dict[str, list[float]] = {name: [] for name in programs}
  for turn in range(repeats):
    for name in list(programs)[:: 1 if turn % 2 else -1]:
      before = _ticks()
      found[name].append(statistics.median(programs[name]()))
      ticks = [now - then for now, then in zip(_ticks(), before, strict=True)]
      stolen[name].append(round(ticks[7] / sum(ticks), 3))
      taken = f"{stolen[name][-1]:.1%} of the cores' time went to other machines"
      tell(f"{rate or 'not shaped'}, {method}, {name}: {found[name][-1]:.1f} ms; {taken}")
  named = {"method": method, "rate": rate or "not shaped"}
  return named | {"milliseconds": found, "stolen": stolen}


def _ticks() -> list[int]:
  """Reads the CPU ticks since boot from Linux; entry eight is the time stolen by the hypervisor."""
  return [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def shaped(rate: str, folder: str) -> list[str]:
  return [f"--rate={rate}", "--cores_per_host=1", f"--logs={folder}/logs"]


def of_loop(spec: str, rate: str, steps: int = 0) -> list[float]:
  """Measures milliseconds per step for each dispatch of the loop, except the first two."""
  config = _config(spec, steps or RATES[rate])
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    line = ["run.py", *flags_of(config | {"out": out})]
    run(netlab(2, shaped(rate, folder), line, "env", "-u", counters.PLACES))  # counting costs time
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  at = [row["seconds"] for row in rows[1:-1]]  # the evaluation precedes the last row
  return [1000 * (b - a) / SPEED_DISPATCH for a, b in itertools.pairwise(at)]


def _config(spec: str, steps: int) -> dict[str, Any]:
  config = MODEL | {"method": spec, "executor": "spmd", "mesh": "data:2", "batch_size": 128}
  config |= {"steps": steps, "steps_per_dispatch": SPEED_DISPATCH, "log_every": SPEED_DISPATCH}
  return config | {"eval_every": 0, "check_every": 0, "checkpoint_every": 0}


def of_program(line: Sequence[str], rate: str) -> dict[str, Any]:
  """Runs a program, and parses the printed JSON."""
  with tempfile.TemporaryDirectory() as folder:
    printed = run(netlab(2, shaped(rate, folder), line))
  (found,) = [line[4:] for line in printed.splitlines() if line.startswith('[0] {"milli')]
  return json.loads(found)


# ---- time to a target, and to the first step


TARGET = 0.95  # accuracy on MNIST's test images
MOST = 800  # number of steps within which every method reaches the target
SLOW = "100mbit"


def to_target(speeds: list[dict[str, Any]], has_torch: bool) -> list[dict[str, Any]]:
  """Computes the seconds to 95% accuracy on MNIST at 100 Mbit/s: steps times time per step.

  Steps are counted in multiples of eight, and evaluations are not timed. `speeds` are the rows of
  `speed`.
  """
  found = []
  for method in ("dense", "power_sgd(4)"):
    ours, _, torch = PAIRS[method]
    (row,) = [row for row in speeds if row["rate"] == SLOW and row["method"] == method]
    steps = {"ours": steps_to_target(METHODS[ours])}
    if torch and has_torch:
      line = ["baselines/peers_torch.py", torch, str(MOST), str(SPEED_DISPATCH), str(TARGET)]
      steps["torch"] = of_program(line, "")["steps"]
    for name, count in steps.items():
      milliseconds = statistics.median(row["milliseconds"][name])
      seconds = count * milliseconds / 1000
      found.append({"method": method, "program": name, "steps": count, "seconds": seconds})
      tell(f"to {TARGET:.0%}, {method}, {name}: {count} steps, {seconds:.1f} s")
  return found


def steps_to_target(spec: str) -> int:
  """Counts the steps until our loop reaches the accuracy; workers are devices of one process."""
  from research.training import assemble, metrics
  from research.training.hooks.hook import Rounds
  from research.training.loop import Run, events

  config = Config(**_config(spec, MOST))
  problem = assemble.assemble(config, assemble.check(config))
  assert problem.test is not None
  run = Run(config, problem)
  test = problem.executor.place(*problem.test, run.data_key)
  evaluate = metrics.evaluator(problem.job.task, run.data.placed.sizes.sharding.mesh)
  for event in events(run):
    if isinstance(event, Rounds) and evaluate(run.params(), test)["accuracy"] >= TARGET:
      return run.step
  raise RuntimeError(f"{spec} does not reach {TARGET} in {MOST} steps")


def start(repeats: int) -> list[float]:
  """Measures the seconds from launch to the first logged step of a job of two processes."""
  seconds = []
  for _ in range(repeats):
    with tempfile.TemporaryDirectory() as folder:
      config = _config(METHODS["dense"], SPEED_DISPATCH) | {"out": f"{folder}/run"}
      lab = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2"]
      program = [sys.executable, str(ROOT / "experiments" / "run.py"), *flags_of(config)]
      begun = time.perf_counter()
      line = [*lab, f"--logs={folder}/logs", "--", *program]
      nowhere = subprocess.DEVNULL
      rows = Path(folder) / "run" / "metrics.jsonl"
      with subprocess.Popen(line, stdout=nowhere, stderr=nowhere) as process, ended(process):
        while not (rows.exists() and rows.stat().st_size):
          if process.poll() is not None:
            raise RuntimeError(f"the job ended with {process.returncode}")
          time.sleep(0.02)
        seconds.append(time.perf_counter() - begun)
        process.wait()
  return seconds


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table of milliseconds per step, with the ratios to our times."""
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


def target_table(rows: list[dict[str, Any]], begun: list[float]) -> list[str]:
  """Formats the Markdown tables of the seconds to the target and to the first logged step."""
  lines = ["", f"To {TARGET:.0%} of MNIST's test images at {SLOW}, training alone:", ""]
  lines += ["| program | method | steps | seconds |", "|---|---|---|---|"]
  names = {"ours": "ours", "torch": "PyTorch"}
  for row in rows:
    cells = [names[row["program"]], row["method"], str(row["steps"]), f"{row['seconds']:.1f}"]
    lines.append("| " + " | ".join(cells) + " |")
  middle, top = statistics.median(begun), max(begun)
  lines.append(f"\nTwo processes log their first steps after {middle:.1f} s (at most {top:.1f} s).")
  return lines
