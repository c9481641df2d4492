"""Measures exchanges that overlap with computation, between two hosts of one core each.

This is bench.py's suite overlap. Each method runs with `spmd` and `overlapped` in turn, on links of
several rates. The limit is the larger of two times: that of computing alone, and that of the
exchange alone; the overlapped run measures both times at its end, in the same processes.

DistributedDataParallel of PyTorch overlaps the exchange of gradients with the backward pass. It is
compared, in turn, with the methods that send as many bytes in every step, and with a late method
that compresses what it sends after several local steps, by the time to a test accuracy.
"""

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import speed
from experiments.benchmarks.hosts import MODEL, flags_of, netlab, run, tell

RATES = ("1gbit", "200mbit", "100mbit")
OUTER = "sgd(0.7, momentum=0.9, nesterov=True)"
INT8 = "error_feedback(two_phase(int8()))"
STREAMING = "streaming_diloco(sgd(0.05), {outer}, {how}, period=16, fragments=2, delay=8)"
METHODS = {
  "streaming_float32": STREAMING.format(outer=OUTER, how="mean()"),
  "streaming_int8": STREAMING.format(outer=OUTER, how=INT8),
  "eager_float32": f"eager_diloco(sgd(0.05), {OUTER}, mean(), period=8)",
  "eager_int8": f"eager_diloco(sgd(0.05), {OUTER}, {INT8}, period=8)",
}
MOST = {"float32": 1.10, "int8": 1.20}  # maximum time relative to the limit
STEPS, DISPATCH = 480, 80
PEERS = ("dense", "two_phase(bf16)")  # keys of `speed.PAIRS`
TARGET = "target"
LATE = (
  f"late(diloco(sgd(0.1), {OUTER}, error_feedback(gather_mean(block_top_k())), period=8), delay=8)"
)
SLOW = "100mbit"
SOONER = 60  # times as soon as PyTorch, at least
CASES = (*METHODS, *PEERS, TARGET)


def measure(
  cases: Sequence[str], repeats: int, has_torch: bool
) -> tuple[dict[str, Any], list[str]]:
  """Measures the selected cases.

  Args:
    cases: names of CASES.
    repeats: the number of turns.
    has_torch: whether PyTorch is installed; without it, it is left out, and so is the target.

  Returns:
    The contents of result.json, and the lines of table.md.
  """
  result: dict[str, Any] = {}
  lines: list[str] = []
  if methods := [name for name in cases if name in METHODS]:
    result["overlap"] = overlap(methods, repeats)
    lines += overlap_table(result["overlap"])
  if peers := [name for name in cases if name in PEERS]:
    pairs = itertools.product(RATES, peers)
    result["peers"] = [speed.pair(name, rate, repeats, has_torch) for rate, name in pairs]
    lines += ["", "The exchange in every step, next to PyTorch's:", ""]
    lines += speed.speed_table(result["peers"])
  if TARGET in cases and has_torch:
    result["target"] = to_target(repeats)
    lines += target_lines(result["target"])
  elif TARGET in cases:
    tell('the target is not measured: PyTorch is missing; pip install -e ".[peers]"')
  return result, lines


def overlap(methods: Sequence[str], repeats: int) -> list[dict[str, Any]]:
  """Measures the milliseconds per local step of both executors in turn, and the parts of a step."""
  found = []
  for rate, method in itertools.product(RATES, methods):
    turns: dict[str, list[dict[str, Any]]] = {"spmd": [], "overlapped": []}
    for turn in range(repeats):
      for executor in list(turns)[:: 1 if turn % 2 else -1]:
        turns[executor].append(_run(METHODS[method], executor, rate))
        took = turns[executor][-1]["step"]
        tell(f"{rate}, {method}, {executor}: {took:.1f} ms per step")
    found.append({"rate": rate, "method": method, "spec": METHODS[method], **turns})
  return found


def to_target(repeats: int) -> dict[str, Any]:
  """Measures the late method and PyTorch's exact average, in turn, and counts their steps."""
  torch = ["baselines/peers_torch.py", "dense", str(speed.RATES[SLOW]), str(speed.SPEED_DISPATCH)]
  ours: list[float] = []
  theirs: list[float] = []
  for _ in range(repeats):
    ours.append(_run(LATE, "overlapped", SLOW)["step"])
    theirs.append(statistics.median(speed.of_program(torch, SLOW)["milliseconds"]))
    tell(f"{SLOW}, late: {ours[-1]:.1f} ms per step; PyTorch: {theirs[-1]:.1f}")
  until = ["baselines/peers_torch.py", "dense"]
  until += [str(x) for x in (speed.MOST, speed.SPEED_DISPATCH, speed.TARGET)]
  found: dict[str, Any] = {
    "ours": {"milliseconds": ours, "steps": speed.steps_to_target(LATE)},
    "torch": {"milliseconds": theirs, "steps": speed.of_program(until, "")["steps"]},
  }
  for one in found.values():
    one["seconds"] = one["steps"] * statistics.median(one["milliseconds"]) / 1000
  return {"spec": LATE, **found, "sooner": found["torch"]["seconds"] / found["ours"]["seconds"]}


def target_lines(found: dict[str, Any]) -> list[str]:
  """Formats the time to the accuracy as lines of Markdown."""
  text = lambda one: (
    f"{one['steps']} steps of {statistics.median(one['milliseconds']):.1f} ms, "
    f"{one['seconds']:.1f} s"
  )
  return [
    "",
    f"To {speed.TARGET:.0%} of MNIST's test images at {SLOW}, training alone: "
    f"{text(found['ours'])} with `{found['spec']}`; {text(found['torch'])} with PyTorch and the "
    f"exact average. That is {found['sooner']:.0f} times sooner (goal: at least {SOONER}).",
  ]


def _run(spec: str, executor: str, rate: str) -> dict[str, Any]:
  """Runs one job; returns the milliseconds of a step and, for `overlapped`, of its parts."""
  devices = 2 if executor == "overlapped" else 1
  config: dict[str, Any] = MODEL | {
    "method": spec,
    "executor": executor,
    "mesh": "data:2",
    "batch_size": 128,
    "steps": STEPS,
    "steps_per_dispatch": DISPATCH,
    "log_every": DISPATCH,
    "eval_every": 0,
    "check_every": 0,
    "checkpoint_every": 0,
  }
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    lab = [f"--rate={rate}", "--cores_per_host=1", f"--devices_per_host={devices}"]
    run(netlab(2, [*lab, f"--logs={folder}/logs"], ["run.py", *flags_of(config | {"out": out})]))
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  at = [row["seconds"] for row in rows[1:-1]]  # without compilation and evaluation
  steps = [1000 * (b - a) / DISPATCH for a, b in itertools.pairwise(at)]
  parts = summary.get("overlap", {})
  kernel = summary["wire"].get("kernel_bytes_per_step_per_host", [])
  return {
    "step": statistics.median(steps),
    "compute": parts.get("compute_milliseconds"),
    "exchange": parts.get("exchange_milliseconds"),
    "sha256": summary["params_sha256"],
    "predicted_bytes": sum(summary["wire"]["bytes_per_step_per_worker"].values()),
    "kernel_bytes": [host["tx_payload_bytes"] for host in kernel],
  }


def overlap_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table with the medians of all turns and the ratio in each turn."""
  lines = [
    "| link | method | computing alone, ms per step | exchange alone | `spmd` | `overlapped` | "
    "`spmd` / limit | `overlapped` / limit | at most |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    limits = [max(one["compute"], one["exchange"]) for one in row["overlapped"]]
    median = lambda executor, name, row=row: statistics.median(x[name] for x in row[executor])
    ratio = lambda executor, row=row, limits=limits: statistics.median(
      one["step"] / limit for one, limit in zip(row[executor], limits, strict=True)
    )
    times = [median("overlapped", "compute"), median("overlapped", "exchange")]
    times += [median(name, "step") for name in ("spmd", "overlapped")]
    cells = [row["rate"], row["method"], *(f"{x:.1f}" for x in times)]
    cells += [f"{ratio('spmd'):.2f}", f"{ratio('overlapped'):.2f}"]
    cells.append(f"{next(most for name, most in MOST.items() if name in row['method']):.2f}")
    lines.append("| " + " | ".join(cells) + " |")
  return lines
