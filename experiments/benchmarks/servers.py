"""Benchmarks the parameter server: overhead, workers of unequal speed, and fault tolerance.

This is bench.py's suite server. Each run is a separate process of run.py with --executor=server.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import run
from experiments.benchmarks.faults import processes
from experiments.benchmarks.hosts import flags_of
from research.core.spec import calls

LARGE = {"task": "mnist()", "model": "mlp(hidden=[1024, 1024])"}  # 1.9 million parameters
MEGABYTE = {"task": "mnist()", "model": "mlp(hidden=[330])"}  # 1.05 MB
QUIET = {"executor": "server", "eval_every": 0, "checkpoint_every": 0, "log_every": 50}


def trained(config: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Runs a configuration; returns the summary and the rows of metrics.

  Raises:
    RuntimeError: if the run fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    ended = subprocess.run(command(config, out), capture_output=True, text=True)
    return read(out, ended.returncode, ended.stderr)


def command(config: dict[str, Any], out: Path) -> list[str]:
  """Returns the command line of run.py with a server."""
  return [sys.executable, run.__file__, *flags_of(QUIET | config | {"out": out})]


def read(out: Path, code: int, said: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Reads the summary and the rows of a finished run."""
  if code:
    raise RuntimeError(f"a run ended with exit code {code}: {said.splitlines()[-1:]}")
  rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  return json.loads((out / "summary.json").read_text()), rows


def overhead() -> list[dict[str, Any]]:
  """Measures the fraction of a step during which two workers compute no gradient."""
  found = []
  for link in (calls.mean(), calls.error_feedback(calls.gather_mean(calls.int8()))):
    config = {"workers": 2, "batch_size": 512, "steps": 400}
    config |= {"method": calls.asgd(calls.sgd(0.05), link)}
    summary, _ = trained(LARGE | config)
    workers = summary["server"]["workers"]
    of = lambda name, workers=workers: sum(row[name] for row in workers) / len(workers)
    milliseconds = {
      name: round(1000 * of(f"{name}_seconds"), 2) for name in ("computing", "encoding", "waiting")
    }
    lasted = of("seconds_per_push")
    found.append(
      {
        "link": str(link),
        **milliseconds,
        "step": round(1000 * lasted, 2),
        "overhead": round(1 - of("computing_seconds") / lasted, 4),
        "push_bytes": round(summary["wire"]["bytes_per_step_per_worker"]["push"]),
        "pull_bytes": round(summary["wire"]["bytes_per_step_per_worker"]["pull"]),
      }
    )
  return found


def scaling() -> list[dict[str, Any]]:
  """Measures pushes per second for several numbers of workers, and the latency of push and pull."""
  found = []
  for workers, overlap in ((1, False), (1, True), (2, True), (4, True)):
    config = {"workers": workers, "batch_size": 16 * workers, "steps": 1500 * workers}
    config |= {"overlap": overlap, "method": "asgd(sgd(0.02), mean())"}
    summary, _ = trained(MEGABYTE | config)
    server = summary["server"]
    waited = [row["waiting_seconds"] for row in server["workers"]]
    found.append(
      {
        "workers": workers,
        "overlap": overlap,
        "pushes_per_second": server["pushes_per_second"],
        "waiting_ms": round(1000 * sum(waited) / len(waited), 3),
        "idle": [row["idle"] for row in server["workers"]],
        "staleness": server["staleness"],
      }
    )
  return found


TARGET = 0.2  # training loss
SLOW = {"task": "mnist()", "model": "mlp(hidden=[256])", "workers": 2, "batch_size": 2048}
SLOW |= {"slowdown": "{0: 4}", "log_every": 10}
SLOWED = {
  "sync": {"method": "data_parallel(sgd(0.1, momentum=0.9), mean())", "steps": 200}
  | {"eval_every": 10},
  "async": {"method": "asgd(sgd(0.1, momentum=0.8), mean())", "steps": 400, "eval_every": 25},
  "elastic": {
    "method": "diloco(sgd(0.1, momentum=0.9), sgd(1.0), mean(), period=1000)",
    "rounds": 15,
    "steps": 1000,
    "eval_every": 1000,
    "log_every": 1000,
  },
}


def slow() -> list[dict[str, Any]]:
  """Measures the seconds to a training loss of TARGET; one of two workers is four times slower."""
  found = []
  for mode, flags in SLOWED.items():
    summary, rows = trained(SLOW | {"server_mode": mode} | flags)
    began = summary["server"]["started_seconds"]
    losses = [(row["seconds"] - began, row["train_loss"]) for row in rows if "train_loss" in row]
    reached = next((seconds for seconds, loss in losses if loss <= TARGET), None)
    idle = [row["idle"] for row in summary["server"]["workers"]]
    updates = summary["server"]["updates"]
    row = {"mode": mode, "seconds": reached and round(reached, 2), "updates": updates}
    found.append(row | {"method": flags["method"], "idle": idle, "losses": losses})
  return found


def killed(kills: int, every: float) -> dict[str, Any]:
  """Kills random workers, and the server once; compares the run with an undisturbed run."""
  config = {"task": "mnist()", "model": "mlp(hidden=[200])", "workers": 2, "batch_size": 128}
  config |= {"method": "asgd(sgd(0.05), error_feedback(gather_mean(int8())))", "steps": 12000}
  config |= {"checkpoint_every": 500, "log_every": 100, "seed": 0}
  calm, _ = trained(config)
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    longer = config | {"restarts": 4 * kills}
    with (Path(folder) / "said").open("w+") as said:  # a file, since an unread pipe would block
      process = subprocess.Popen(command(longer, out), stdout=said, stderr=subprocess.STDOUT)
      begun = list(_kill(out, process, kills, every, random.Random(0)))
      process.wait()
      said.seek(0)
      summary, _ = read(out, process.returncode, said.read())
    if begun.count("worker") < kills or not begun.count("head"):
      raise RuntimeError(
        f"the run ended after {len(begun)} of {kills + 1} kills: give it more steps"
      )
    again = subprocess.run(
      [sys.executable, run.__file__, f"--replay={out}"], capture_output=True, text=True
    )
    replayed = json.loads((out / "replay.json").read_text())
    left = processes(str(out))
  return {
    "kills": begun.count("worker"),
    "server_kills": begun.count("head"),
    "deaths": summary["server"]["deaths"],
    "refused": summary["server"]["refused"],
    "accuracy": summary["eval"]["accuracy"],
    "calm_accuracy": calm["eval"]["accuracy"],
    "updates": summary["server"]["updates"],
    "pushes": summary["server"]["pushes"],
    "replayed": again.returncode == 0,
    "replay_distance": replayed["distance"],
    "processes_left": left,
    "seconds": summary["seconds"],
    "calm_seconds": calm["seconds"],
  }


def _kill(
  out: Path, process: Any, kills: int, every: float, chance: random.Random
) -> Iterator[str]:
  """Kills random live workers at intervals, and kills the head process after half of the kills."""
  while not (out / "metrics.jsonl").exists() or not _rows(out):
    if process.poll() is not None:
      return
    time.sleep(0.2)
  done, heads = 0, 0
  while done < kills and process.poll() is None:
    time.sleep(every * chance.uniform(0.5, 1.5))
    pids = json.loads((out / "processes.json").read_text())
    alive = [pid for pid in pids["workers"].values() if Path(f"/proc/{pid}").exists()]
    if heads == 0 and done >= kills // 2:
      os.kill(pids["head"], signal.SIGKILL)
      heads += 1
      yield "head"
    elif alive:
      os.kill(chance.choice(alive), signal.SIGKILL)
      done += 1
      yield "worker"


def _rows(out: Path) -> int:
  return len((out / "metrics.jsonl").read_text().splitlines())


def hogwild() -> list[dict[str, Any]]:
  """Measures the steps per second on w8a for several numbers of processes."""
  found = []
  for workers in (1, 2, 4):
    config = {"task": "libsvm('w8a', sparse=True)", "workers": workers, "steps": 60000}
    config |= {"batch_size": 16 * workers, "server_mode": "hogwild", "log_every": 2000}
    summary, _ = trained(config | {"method": "hogwild(0.5, mean(), bound=4)"})
    found.append(
      {
        "workers": workers,
        "steps_per_second": summary["steps_per_second"],
        "train_loss": summary["train_loss"],
        "accuracy": summary["eval"]["accuracy"],
      }
    )
  return found


CASES = ("overhead", "scaling", "slow", "killed", "hogwild")


def measure(cases: list[str], kills: int, every: float) -> dict[str, Any]:
  """Measures the selected cases."""
  makers: dict[str, Callable[[], Any]] = {
    "overhead": overhead,
    "scaling": scaling,
    "slow": slow,
    "hogwild": hogwild,
  }
  makers["killed"] = lambda: killed(kills, every)
  return {name: makers[name]() for name in CASES if name in cases}


def table(found: dict[str, Any]) -> list[str]:
  """Formats the Markdown tables of all measured cases."""
  lines: list[str] = []
  if rows := found.get("overhead"):
    lines += [
      "Two workers, fully asynchronous, MLP of 1.9 million parameters, 256 images each per step:\n",
      "| link | gradient, ms | encoding, ms | waiting, ms | step, ms | overhead | push, bytes |",
      "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
      times = " | ".join(
        f"{row[name]:.1f}" for name in ("computing", "encoding", "waiting", "step")
      )
      lines.append(f"| {row['link']} | {times} | {row['overhead']:.1%} | {row['push_bytes']:,} |")
  if rows := found.get("scaling"):
    lines += [
      "\nA model of 1.05 MB, sent whole both ways, 16 images per step:\n",
      "| workers | computes while a push is on the way | pushes/s | waiting, ms per push |",
      "|---|---|---|---|",
    ]
    for row in rows:
      overlap = "yes" if row["overlap"] else "no"
      rate, waiting = row["pushes_per_second"], row["waiting_ms"]
      lines.append(f"| {row['workers']} | {overlap} | {rate:.1f} | {waiting:.1f} |")
  if rows := found.get("slow"):
    first = rows[0]["seconds"]
    lines += [
      f"\nOne of two workers four times slower, MNIST, seconds to a training loss of {TARGET}:\n",
      "| mode | method | seconds | sooner than sync | idle, by worker |",
      "|---|---|---|---|---|",
    ]
    for row in rows:
      ratio = f"{first / row['seconds']:.1f}x" if first and row["seconds"] else "never"
      idle = ", ".join(f"{share:.0%}" for share in row["idle"])
      lines.append(f"| {row['mode']} | `{row['method']}` | {row['seconds']} | {ratio} | {idle} |")
  if row := found.get("killed"):
    lines += ["\nWorkers killed at random, and the server once:\n", "| | |", "|---|---|"]
    names = ("kills", "server_kills", "accuracy", "calm_accuracy", "updates", "pushes")
    names = (*names, "replay_distance", "processes_left", "seconds", "calm_seconds")
    lines += [f"| {name.replace('_', ' ')} | {row[name]:g} |" for name in names]
  if rows := found.get("hogwild"):
    lines += [
      "\nHogwild, logistic regression on w8a, 16 examples per step:\n",
      "| processes | steps/s | training loss after 60,000 steps | accuracy |",
      "|---|---|---|---|",
    ]
    for row in rows:
      figures = f"{row['steps_per_second']:,.0f} | {row['train_loss']:.4f} | {row['accuracy']:.4f}"
      lines.append(f"| {row['workers']} | {figures} |")
  return lines
