"""Times several methods on several links, as one process of a job; see `prediction.py`.

    python experiments/benchmarks/on_links.py JSON

Process 0 prints a line `link NAME` before each link, and continues when it reads a line: by then,
the links between the hosts have this rate. It prints a line `cell JSON` per method and link, with
the milliseconds per local step of every dispatch. All methods are compiled once, before the first
link.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from research.comm import join
from research.core.task import Task
from research.training.config import Config

EXAMPLES = 4096  # of the task, so that every run starts quickly
TURNS = 3  # in which all methods are timed on a link
SECONDS = 0.7  # for one method in a turn
DISPATCHES = (1, 12)  # smallest and largest number per method and turn
QUIET = 0.1  # share of the cores' time that other programs may use
TRIES = 3  # of a turn, if other programs use more


def job(config: Config, task: Task) -> Callable[[], float]:
  """Compiles a run; returns a function that runs a dispatch and returns its seconds."""
  import jax

  from research.training import assemble
  from research.training.loop import Run

  setting = assemble.check(config, assemble.Given(task=task))
  run = Run(config, assemble.assemble(config, setting))
  length = config.steps_per_dispatch

  def dispatch() -> float:
    begin = time.perf_counter()
    run.advance(run.step + length)
    jax.block_until_ready((run.state, run.metrics))
    return time.perf_counter() - begin

  dispatch()
  return dispatch


def main(asked: dict[str, Any]) -> None:
  """Times the methods in turn on every link.

  Args:
    asked: `config`, fields of Config without the method; `methods`, a list of specs; `links`, a
      list of names; `cache`, a folder for compiled programs.
  """
  import jax
  from jax.experimental import multihost_utils

  from research.training import sources

  logging.set_verbosity(logging.ERROR)
  jax.config.update("jax_compilation_cache_dir", asked["cache"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  join.initialize()
  first = jax.process_index() == 0

  def say(line: str) -> None:
    if first:
      print(line, flush=True)

  task = sources.task_of(Config(**asked["config"]))
  task = task._replace(train={name: x[:EXAMPLES] for name, x in task.train.items()}, test=None)
  dispatches = {}
  for spec in asked["methods"]:
    dispatches[spec] = job(Config(**asked["config"], method=spec), task)
    say(f"compiled {spec}")
  steps = asked["config"]["steps_per_dispatch"]
  for link in asked["links"]:
    say(f"link {link}")
    if first:
      sys.stdin.readline()
    multihost_utils.sync_global_devices(link)
    found: dict[str, list[float]] = {spec: [] for spec in dispatches}
    others: dict[str, list[float]] = {spec: [] for spec in dispatches}
    for _, (spec, dispatch) in itertools.product(range(TURNS), dispatches.items()):
      seconds, share = undisturbed(dispatch)
      found[spec] += [1000 * s / steps for s in seconds]
      others[spec].append(share)
    for spec in dispatches:
      cell = {"link": link, "method": spec, "milliseconds": found[spec], "others": others[spec]}
      say(f"cell {json.dumps(cell, allow_nan=False)}")


def undisturbed(dispatch: Callable[[], float]) -> tuple[list[float], float]:
  """Times dispatches, and repeats them while programs outside of the job are busy.

  Returns:
    The seconds of the dispatches, and the share of all cores' time that other programs used.
  """
  tries = []
  while len(tries) < TRIES and (not tries or tries[-1][1] > QUIET):
    tries.append(turn(dispatch))
  return min(tries, key=lambda one: one[1])


def turn(dispatch: Callable[[], float]) -> tuple[list[float], float]:
  """Times dispatches of one method; the results of all processes are equal in the second value."""
  from jax.experimental import multihost_utils

  everyone = lambda values: multihost_utils.process_allgather(np.array(values, np.float64))
  dispatch()  # the link's buckets are then in their steady state
  busy, own = machine_seconds(), time.process_time()
  begin = time.perf_counter()
  seconds = [dispatch()]
  count = int(np.clip(SECONDS / everyone([seconds[0]]).max(), *DISPATCHES))
  seconds += [dispatch() for _ in range(count - 1)]
  spent = (machine_seconds() - busy, time.process_time() - own, time.perf_counter() - begin)
  total = everyone(spent)
  share = (total[0, 0] - total[:, 1].sum()) / (total[0, 2] * (os.cpu_count() or 1))
  return seconds, float(share)


def machine_seconds() -> float:
  """Returns the seconds that all cores of the machine have been busy with programs."""
  ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]]
  return sum(ticks) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
