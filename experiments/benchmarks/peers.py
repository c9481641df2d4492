"""Compares TensorFlow and Spark with this library, as bench.py's suite peers.

The peers' programs are written as users of TensorFlow and Spark write them. On two hosts, the suite
measures TensorFlow's two strategies for several machines. On one machine, the suite compares two
Spark executors with two of our devices, and runs the linear regression of introductions to
TensorFlow.
"""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.benchmarks import peers_on_data, peers_on_hosts
from experiments.benchmarks.hosts import tell
from experiments.benchmarks.peers_rows import Row, as_dict, table

Measure = Callable[[str, int], Iterator[Row]]
# maps each case to the package that the peer needs, and to the measurement
CASES: dict[str, tuple[str, Measure]] = {
  "hosts": ("tensorflow", peers_on_hosts.measure),
  "target": ("tensorflow", peers_on_hosts.target),
  "listing": ("tensorflow", peers_on_data.listing),
  **{
    name: ("pyspark", functools.partial(peers_on_data.logistic, name))
    for name in ("a9a", "w8a", "sparse")
  },
  "als": ("pyspark", peers_on_data.als),
  "pagerank": ("pyspark", peers_on_data.pagerank),
}
EXTRAS = {"tensorflow": "tensorflow", "pyspark": "spark"}
_CORE = "the first host's worker shares its core with the server, the driver and Ray: 130 ms for a "
_CORE += "gradient of 42"
_SHARE = "more of our updates come from the second host"
_LOSS = "equal, but for the mean of the loss"
# maps "QUESTION: CASE" to a sentence that explains why the peer is better
REASONS = {
  f"{peers_on_hosts.TIME}: 1gbit, server, mean()": _CORE,
  f"{peers_on_hosts.TIME}: 1gbit, server, gather_mean(int8())": _CORE,
  f"{peers_on_hosts.BYTES}: 1gbit, server, mean()": _SHARE,
  f"{peers_on_hosts.BYTES}: 1gbit, server, gather_mean(int8())": _SHARE,
  f"{peers_on_hosts.BYTES}: 1gbit, mean()": _LOSS,
  f"{peers_on_hosts.BYTES}: 100mbit, mean()": _LOSS,
}


def has(python: str) -> tuple[dict[str, str], list[str]]:
  """Returns the peers that an interpreter can import, with versions, and the missing packages.

  Args:
    python: the path of the interpreter.

  Raises:
    ValueError: if the interpreter cannot be run.
  """
  code = (
    "import importlib.metadata as m, importlib.util as u, json, sys\n"
    "print(json.dumps({n: m.version(n) for n in sys.argv[1:] if u.find_spec(n)}))"
  )
  try:
    ended = subprocess.run(
      [python, "-c", code, *EXTRAS], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError) as error:
    raise ValueError(f"cannot run Python there ({error})") from None
  found = json.loads(ended.stdout)
  missing = [
    f'{name} is not installed for {python}: pip install -e ".[{extra}]"'
    for name, extra in EXTRAS.items()
    if name not in found
  ]
  if "pyspark" in found and not shutil.which("java"):
    del found["pyspark"]
    missing.append("Spark needs Java, and `java` is not on the path")
  return found, missing


def tables(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
  """Formats the tables of all cases, and of the seconds to the target, computed from the rows."""
  derived = [as_dict(row) for row in peers_on_hosts.seconds(rows["hosts"], rows["target"])]
  of_seconds = [{k: v for k, v in row.items() if k != "load"} for row in derived]
  return table([*[row for name in CASES for row in rows[name]], *of_seconds], REASONS)


def measure(
  cases: Sequence[str], python: str, repeats: int, before: dict[str, Any], commit: str
) -> tuple[dict[str, Any], list[str]]:
  """Measures cases, and merges the new rows with earlier rows of other cases.

  Args:
    cases: the names of cases in CASES.
    python: the path of an interpreter that can import the peers.
    repeats: the number of runs of each program.
    before: an earlier result, or {} without one.
    commit: the commit of this code.

  Returns:
    The result, and the lines of the tables.
  """
  found, missing = has(python)
  for line in missing:
    tell(f"not run: {line}")
  rows = {name: before.get("rows", {}).get(name, []) for name in CASES}
  commits = dict(before.get("commits", {}))
  for name in cases:
    package, of = CASES[name]
    rows[name] = [as_dict(row) for row in of(python if package in found else "", repeats)]
    commits[name] = commit
  result = {"peers": before.get("peers", {}) | found, "rows": rows, "commits": commits}
  return result, [*tables(rows), *[f"\nNot run: {line}." for line in missing]]
