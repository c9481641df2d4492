"""Times the training loop in alternation with hand-written loops of the same algorithms.

    python experiments/bench.py --repeats=7 --out=results/bench

Each case runs `train.loop.train` with the case's flags, and the minimal JAX loop of `by_hand.py` or
`by_hand_transformer.py`. Both loops omit evaluations and checkpoints, and fetch the losses once per
dispatch. After a warm-up, the two loops run alternately; the reported figure is the median of the
pairwise ratios of steps per second.

The suite also measures the cost of compressors (`costs.py`), of rounds (`rounds.py`) and of steps
relative to the sum of their parts (`parts.py`), how long a checkpoint blocks training, the memory
of 10,000 simulated workers, and the time to the first logged step. Other suites run on simulated
hosts (`hosts.py`, `speed.py`, `overlap.py`, `faults.py`, `network.py`, `prediction.py`), which are
Linux network namespaces and need root, or on a parameter server (`servers.py`). `--cases` selects
methods of `speed.py` or cases of the server; the earlier results of other methods or cases in OUT
are kept. --suite=applications measures search, finance, medicine and recommendation, and compares
the results with results of peer libraries (`applications/suite.py`). --suite=peers measures the
same algorithms in TensorFlow and in Spark (`peers.py`). --suite=internet trains thousands of
simulated workers over the internet (`internet.py`). --suite=sites computes what 70 billion
parameters on 1,000 sites would need (`sites.py`). --suite=prediction compares predicted step times
with measured ones; cells that OUT contains are not measured again.

The command writes result.json and table.md. Workers on one machine use the cores better with one
device per core: set `JAX_NUM_CPU_DEVICES=2` for fed_avg, local_phase and parts.
"""

import importlib.util
import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments.applications import suite as applications
from experiments.benchmarks import (
  choices,
  costs,
  faults,
  hosts,
  internet,
  main_job,
  network,
  overlap,
  pairs,
  parts,
  peers,
  prediction,
  rounds,
  servers,
  sites,
  speed,
)
from experiments.benchmarks.turns import shown
from experiments.reports import sites as sites_report
from launch import netlab
from research.command.errors import fail, one_line_errors
from research.command.flags import launch
from research.command.start import results_folder
from research.core import checks, paths
from research.core.text import quoted
from research.training.config import flag

FLAGS = flags.FLAGS


BETWEEN_HOSTS = ["wire", "hosts", "faults", "overlap", "network", "prediction", "advice"]
SUITES = ["loop", *BETWEEN_HOSTS, "server", "applications", "peers", "internet", "sites"]
OTHERS = (
  "compress",
  "power_sgd",
  "local_phase",
  "diagnostics",
  "population",
  "parts",
  "checkpoints",
  "memory",
  "start",
)


def of_faults() -> tuple[dict[str, Any], list[str]]:
  """Measures the effect of random kills on a run."""
  found = faults.faults(FLAGS.hosts, FLAGS.kills, FLAGS.kill_every, FLAGS.steps)
  return {"faults": found}, faults.faults_table(found)


def of_wire() -> tuple[dict[str, Any], list[str]]:
  """Measures the bytes sent between two hosts and between four hosts."""
  wire = hosts.wire((2, 4))
  return {"wire": wire}, hosts.wire_table(wire)


def of_overlap() -> tuple[dict[str, Any], list[str]]:
  """Measures exchanges that overlap with computation, and compares them with PyTorch's."""
  has_torch = importlib.util.find_spec("torch") is not None
  return overlap.measure(FLAGS.cases, FLAGS.repeats, has_torch)


def of_network() -> tuple[dict[str, Any], list[str]]:
  """Compares the predicted times of traffic patterns with flows between hosts."""
  rows = network.network(FLAGS.repeats)
  return {"network": rows}, network.network_table(rows)


def main(argv: list[str]) -> None:
  """Runs the cases of a suite, prints the table and writes the result."""
  del argv
  logging.set_verbosity(logging.WARNING)
  loop = (*pairs.CASES, *OTHERS)
  cases = {
    "loop": loop,
    "server": servers.CASES,
    "hosts": tuple(speed.PAIRS),
    "overlap": overlap.CASES,
    "applications": tuple(applications.CASES),
    "peers": tuple(peers.CASES),
    "internet": tuple(internet.VALUES),
    "sites": tuple(sites.METHODS),
  }
  known = cases.get(FLAGS.suite, ())
  if not FLAGS["cases"].present:
    FLAGS.cases = list(known)
  unknown = [name for name in FLAGS.cases if name not in known]
  if unknown:
    reason = checks.unknown(unknown[0], known)
    fail(2, f"--suite={FLAGS.suite} --cases={quoted(unknown[0])}: {reason}")
  between = FLAGS.suite == "peers" and {"hosts", "target"} & {*FLAGS.cases}
  if between or FLAGS.suite in BETWEEN_HOSTS:
    netlab.refuse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends child processes too
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")  # to compile for as many hosts
  if FLAGS.suite == "applications":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
  with one_line_errors():
    from research.training import environment as variables
    from research.training import folder
    from research.training.reports import report

    variables.start_jax()
    if FLAGS.suite == "applications":
      folders = results_folder("out", FLAGS.out, "results/applications")
      for case in FLAGS.cases:
        applications.measure(case, folders / case)
      return
    out = results_folder("out", FLAGS.out) if FLAGS.out else None
    environment = folder.environment()
    suites = {"loop": of_loop, "faults": of_faults, "wire": of_wire, "overlap": of_overlap}
    suites["network"] = of_network
    suites["internet"] = lambda: of_internet(environment["commit"], out)
    suites["sites"] = lambda: of_sites(out)
    suites["prediction"] = lambda: prediction.measure(out)
    suites["advice"] = lambda: choices.measure(out)
    suites["server"] = lambda: of_server(environment["commit"])
    suites["hosts"] = lambda: of_speed(environment["commit"])
    suites["peers"] = lambda: of_peers(environment["commit"])
    # a case of these suites takes minutes, so its result is written as soon as the case ends
    is_long = FLAGS.suite in ("peers", "internet")
    groups = [[case] for case in FLAGS.cases] if is_long else [FLAGS.cases]
    for group in groups:
      FLAGS.cases = group
      result, lines = suites[FLAGS.suite]()
      result = {"environment": environment, **result}
      if out:
        out.mkdir(parents=True, exist_ok=True)
        report.write_json(out / "result.json", result)
        report.write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def of_internet(commit: str, out: Path | None) -> tuple[dict[str, Any], list[str]]:
  """Trains over the internet; merges the rows with earlier rows of other cases, and draws them."""
  found = internet.internet(FLAGS.cases)
  rows = internet.merged(before().get("internet", []), found, commit)
  if out:
    out.mkdir(parents=True, exist_ok=True)
    internet.draw(rows, out / "figure.png")
  return {"internet": rows}, internet.internet_table(rows)


def of_sites(out: Path | None) -> tuple[dict[str, Any], list[str]]:
  """Computes what methods need on 1,000 sites; merges and draws the rows with those of others."""
  rows = sites.merged(before().get("sites", []), sites.sites(FLAGS.cases))
  if out:
    out.mkdir(parents=True, exist_ok=True)
    sites_report.draw(rows, out / "figure.png")
  return {"sites": rows}, sites_report.sites_table(rows)


def before() -> dict[str, Any]:
  """Reads earlier results from the output folder."""
  stored = paths.local(FLAGS.out) / "result.json" if FLAGS.out else None
  return json.loads(stored.read_text()) if stored and stored.exists() else {}


def of_server(commit: str) -> tuple[dict[str, Any], list[str]]:
  """Measures cases of the server; merges the results with earlier results and their commits."""
  result = before()
  found = servers.measure(FLAGS.cases, FLAGS.kills, FLAGS.kill_every)
  result = result | found | {"commits": result.get("commits", {}) | dict.fromkeys(found, commit)}
  result.pop("environment", None)
  return result, servers.table(result)


def of_speed(commit: str) -> tuple[dict[str, Any], list[str]]:
  """Measures the selected methods, merges earlier rows; measures targets if all are selected."""
  has_torch = importlib.util.find_spec("torch") is not None
  result = before()
  result.pop("environment", None)
  rows = {(row["rate"], row["method"]): row for row in result.get("hosts", [])}
  for row in speed.speed(FLAGS.cases, FLAGS.repeats, has_torch):
    rows[row["rate"], row["method"]] = row | {"commit": commit}
  result["hosts"] = list(rows.values())
  if set(FLAGS.cases) == set(speed.PAIRS):
    result["target"] = speed.to_target(result["hosts"], has_torch)
    result["start_seconds"] = speed.start(FLAGS.repeats)
    result["commits"] = dict.fromkeys(("target", "start_seconds"), commit)
  lines = speed.speed_table(result["hosts"])
  if "target" in result:
    lines += speed.target_table(result["target"], result["start_seconds"])
  return result, lines


def of_peers(commit: str) -> tuple[dict[str, Any], list[str]]:
  """Measures cases with TensorFlow and Spark, and keeps earlier rows of other cases."""
  with flag("peers_python", FLAGS.peers_python):
    peers.has(FLAGS.peers_python)
  return peers.measure(FLAGS.cases, FLAGS.peers_python, FLAGS.repeats, before(), commit)


def of_loop() -> tuple[dict[str, Any], list[str]]:
  """Measures the cases that run on one machine; returns the results and the tables."""
  found = [pairs.compare(name, FLAGS.repeats) for name in FLAGS.cases if name in pairs.CASES]
  result: dict[str, Any] = {"pairs": found}
  lines = pairs.pairs_table(found) if found else []
  if "compress" in FLAGS.cases:
    result["compress"] = costs.compress(FLAGS.repeats)
    lines += costs.compress_table(result["compress"])
  if "power_sgd" in FLAGS.cases:
    result["power_sgd"] = rounds.power_sgd(FLAGS.repeats)
    lines += rounds.power_sgd_table(result["power_sgd"])
    result["equal_matrices"] = rounds.equal_matrices(FLAGS.repeats)
    lines.append(rounds.equal_matrices_line(result["equal_matrices"]))
  if "local_phase" in FLAGS.cases:
    result["local_phase"] = rounds.local_phase(FLAGS.repeats)
    lines += rounds.local_phase_table(result["local_phase"])
  if "diagnostics" in FLAGS.cases:
    result["diagnostics"] = rounds.diagnostics(FLAGS.repeats)
    lines += rounds.diagnostics_table(result["diagnostics"])
  if "population" in FLAGS.cases:
    one = result["population"] = rounds.population(FLAGS.repeats)
    lines.append(
      f"\nA round of SCAFFOLD with 10 of 10,000 clients takes {one['ratio']:.2f} times as long "
      f"as one with 10 of 100 ({one['many_ms']:.2f} ms against {one['few_ms']:.2f}; ratios "
      f"{shown(one['ratios'])})."
    )
  if "parts" in FLAGS.cases:
    result["parts"] = parts.parts(FLAGS.repeats)
    lines += parts.parts_table(result["parts"])
  if "checkpoints" in FLAGS.cases:
    blocked = result["checkpoint_milliseconds"] = main_job.checkpoints(FLAGS.repeats)
    middle, top = statistics.median(blocked), max(blocked)
    lines.append(f"\nA save blocks for {middle:.1f} ms (median; at most {top:.1f} ms).")
  if "memory" in FLAGS.cases:
    result["memory_gib"] = main_job.memory()
    lines.append(f"\n10,000 simulated workers need {result['memory_gib']:.2f} GiB at most.")
  if "start" in FLAGS.cases:
    begun = result["start_seconds"] = main_job.start(FLAGS.repeats)
    middle, top = statistics.median(begun), max(begun)
    lines.append(f"\nFirst logged step after {middle:.1f} s (median; at most {top:.1f} s).")
  return result, lines


if __name__ == "__main__":
  text = "loop: hand-written loops; wire, hosts, overlap, faults: bytes, speed, hidden exchanges "
  text += "and kills between hosts; network: predicted and measured times of traffic patterns; "
  text += "prediction: predicted step times; advice: first choices; "
  text += "server: a parameter server; applications: peer libraries; peers: TensorFlow and Spark; "
  text += "internet: thousands of simulated workers; sites: 70 billion parameters, computed."
  flags.DEFINE_enum("suite", "loop", SUITES, text)
  flags.DEFINE_integer("hosts", 4, "Number of hosts in the suite faults.", 2)
  flags.DEFINE_integer("kills", 50, "Number of kills in the suites faults and server.", 1)
  flags.DEFINE_float("kill_every", 15.0, "Mean seconds between two kills.", 0.1)
  flags.DEFINE_integer("steps", 5000, "Number of steps in the suite faults.", 1)
  flags.DEFINE_list("cases", [*pairs.CASES, *OTHERS], "What to measure.")
  flags.DEFINE_integer("repeats", 7, "Number of measured turns of each pair.", 1)
  text = "Interpreter that has TensorFlow and PySpark, for the suite peers."
  flags.DEFINE_string("peers_python", sys.executable, text)
  flags.DEFINE_string("out", "", "Folder for results; empty: none, or results/applications.")
  launch(main, __doc__)
