"""Builds the rows of bench.py's suite peers, and formats a table for each question."""

import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.hosts import ended

Turns = list[float]
CORES = os.cpu_count()


class Row(NamedTuple):
  """One of our measurements and the peer's measurement; smaller values are better."""

  question: str
  case: str
  unit: str
  ours: Turns  # our measurements in all turns
  peer: str
  theirs: Turns | None  # the peer's measurements; None: the peer was not run
  extra: dict[str, Any] | None = None


def as_dict(row: Row) -> dict[str, Any]:
  """Converts a row to JSON, with both medians and the ratio of the peer's median to ours."""
  load = round(os.getloadavg()[2], 1)  # load average over 15 minutes
  found = row._asdict() | {"median": statistics.median(row.ours), "load": load}
  if row.theirs:
    theirs = statistics.median(row.theirs)
    found |= {"peer_median": theirs, "ratio": theirs / found["median"]}
  return found


def table(rows: Sequence[dict[str, Any]], reasons: dict[str, str]) -> list[str]:
  """Formats a Markdown table for each question, with a reason where the peer is better.

  Args:
    rows: results of `as_dict`.
    reasons: maps "QUESTION: CASE" to a sentence.
  """
  lines: list[str] = []
  for question in dict.fromkeys(row["question"] for row in rows):
    lines += ["", f"**{question}**", "", "| case | ours | peer | | peer / ours | |"]
    lines.append("|---|---|---|---|---|---|")
    for row in (row for row in rows if row["question"] == question):
      ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
      lost = "ratio" in row and row["ratio"] < 1
      why = reasons.get(f"{question}: {row['case']}", "the peer is first") if lost else ""
      theirs = shown(row["peer_median"], row["unit"]) if "ratio" in row else "not run"
      cells = [row["case"], shown(row["median"], row["unit"]), row["peer"], theirs, ratio, why]
      lines.append("| " + " | ".join(cells) + " |")
  if loads := [row["load"] for row in rows if "load" in row]:
    span = " to ".join(f"{load:g}" for load in sorted({min(loads), max(loads)}))
    lines += ["", f"The machine's load average while this was measured: {span}, on {CORES} cores."]
  return lines[1:]


def shown(value: float, unit: str) -> str:
  """Formats a value with its unit."""
  if unit == "bytes" or value >= 1000:
    return f"{value:,.0f} {unit}"
  return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


class Ended(NamedTuple):
  """The output of a process, and the time and memory used by the process and its children."""

  printed: dict[str, Any]  # the JSON object in the last line of the output, if any
  seconds: float
  peak_mib: float


def measured(line: Sequence[str], environ: dict[str, str], every: float = 0.1) -> Ended:
  """Runs a command, and samples the memory of all processes of the command.

  Args:
    line: the words of the command.
    environ: variables to add to this process's environment.
    every: the seconds between two samples.

  Raises:
    RuntimeError: if the command fails.
  """
  start = time.perf_counter()
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  process = subprocess.Popen(line, env=os.environ | environ, **pipes)
  peak, over = [0.0], threading.Event()

  def watch() -> None:
    while not over.wait(every):
      peak[0] = max(peak[0], memory(process.pid))

  watching = threading.Thread(target=watch)
  watching.start()
  try:
    with ended(process):
      out, err = process.communicate()
  finally:
    over.set()
    watching.join()
  if process.returncode:
    raise RuntimeError("\n".join([f"exit code {process.returncode}:", *err.splitlines()[-20:]]))
  seconds, last = time.perf_counter() - start, out.splitlines()[-1:]
  printed = json.loads(last[0]) if last and last[0].startswith("{") else {}
  return Ended(printed, seconds, peak[0])


def memory(root: int) -> float:
  """Returns the MiB of a process and its descendants; shared pages count once (PSS)."""
  parents: dict[int, list[int]] = {}
  for place in Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = place.read_text().rpartition(")")[2].split()
    except OSError:  # the process has ended
      continue
    parents.setdefault(int(fields[1]), []).append(int(place.parent.name))
  total, left = 0, [root]
  while left:
    pid = left.pop()
    left += parents.get(pid, [])
    try:
      rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
      continue
    total += sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
  return total / 1024
