"""Times several methods on several links, as one process of a job; see `prediction.py`.

    python experiments/benchmarks/on_links.py JSON

Process 0 prints a line `link NAME` before each link, and continues when it reads a line: by then,
the links between the hosts have this rate. It prints a line `cell JSON` per method and link, with
the milliseconds per local step of every dispatch. All methods are compiled once, before the first
link.

A virtual machine computes at a pace that depends on its neighbors, and no counter of the kernel
shows it. So a step without exchanges is timed around each turn, and the turn is repeated while its
pace differs from that of the probe.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.benchmarks.constants import QUARTILE
from experiments.reports.work import PLAIN
from research.comm import join
from research.core.task import Task
from research.training import assemble
from research.training.config import Config

EXAMPLES = 4096  # of the task, so that every run starts quickly
TURNS = 3  # in which all methods are timed on a link
SECONDS = 0.7  # for one method in a turn
DISPATCHES = (1, 12)  # smallest and largest number per method and turn
QUIET = 0.1  # share of the cores' time that other programs may use
PACE = 0.05  # relative difference from the probe's seconds of computing
PLAIN_DISPATCHES = 4  # before a turn, and after it
TRIES = 5  # of a turn, if other programs use more or the pace differs more


class Turn(NamedTuple):
  """Measurements of one turn; all but the dispatches are equal in all processes."""

  seconds: list[float]  # of the dispatches
  others: float  # share of all cores' time that other programs used
  pace: float  # seconds of a step without exchanges, over those of the probe

  @property
  def disturbance(self) -> float:
    """How far the machine was from its state in the probe; at most 1 is accepted."""
    return max(self.others / QUIET, abs(self.pace - 1) / PACE)


def job(config: Config, task: Task, devices: Sequence[Any] | None = None) -> Callable[[], float]:
  """Compiles a run; returns a function that runs a dispatch and returns its seconds."""
  import jax

  from research.training.loop import Run

  setting = assemble.check(config, assemble.Given(task=task))
  run = Run(config, assemble.assemble(config, setting, devices))
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
      list of names; `computing`, the seconds of a step without exchanges in the probe; `cache`, a
      folder for compiled programs.
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
  pace = pacer(Config(**asked["config"], method=PLAIN), task, asked["computing"])
  for link in asked["links"]:
    say(f"link {link}")
    if first:
      sys.stdin.readline()
    multihost_utils.sync_global_devices(link)
    found: dict[str, list[Turn]] = {spec: [] for spec in dispatches}
    for _, (spec, dispatch) in itertools.product(range(TURNS), dispatches.items()):
      found[spec].append(undisturbed(dispatch, pace))
    for spec, turns in found.items():
      cell = {
        "link": link,
        "method": spec,
        "milliseconds": [1000 * s / steps for turn in turns for s in turn.seconds],
        "others": [turn.others for turn in turns],
        "paces": [turn.pace for turn in turns],
      }
      say(f"cell {json.dumps(cell, allow_nan=False)}")


def pacer(config: Config, task: Task, computing: float) -> Callable[[], list[float]]:
  """Returns a function that times steps without exchanges on this host, relative to the probe's.

  Args:
    config: the job of all hosts, with the method of the probe.
    task: the task.
    computing: the probe's seconds per step.
  """
  import jax

  alone = config.replace(mesh="data:1", batch_size=assemble.per_worker(config, jax.process_count()))
  dispatch = job(alone, task, jax.local_devices()[:1])
  steps = config.steps_per_dispatch
  return lambda: [dispatch() / steps / computing for _ in range(PLAIN_DISPATCHES)]


def undisturbed(dispatch: Callable[[], float], pace: Callable[[], list[float]]) -> Turn:
  """Times dispatches, and repeats them while the machine is not in the state of the probe."""
  tries: list[Turn] = []
  while len(tries) < TRIES and (not tries or tries[-1].disturbance > 1):
    tries.append(turn(dispatch, pace))
  return min(tries, key=lambda one: one.disturbance)


def turn(dispatch: Callable[[], float], pace: Callable[[], list[float]]) -> Turn:
  """Times dispatches of one method, and the pace before and after them."""
  from jax.experimental import multihost_utils

  everyone = lambda values: multihost_utils.process_allgather(np.array(values, np.float64))
  paces = pace()
  dispatch()  # the link's buckets are then in their steady state
  busy, own = machine_seconds(), time.process_time()
  begin = time.perf_counter()
  seconds = [dispatch()]
  count = int(np.clip(SECONDS / everyone([seconds[0]]).max(), *DISPATCHES))
  seconds += [dispatch() for _ in range(count - 1)]
  spent = (machine_seconds() - busy, time.process_time() - own, time.perf_counter() - begin)
  total = everyone(spent)
  share = (total[0, 0] - total[:, 1].sum()) / (total[0, 2] * (os.cpu_count() or 1))
  paces = everyone(paces + pace())
  return Turn(seconds, float(share), float(np.quantile(paces, QUARTILE)))


def machine_seconds() -> float:
  """Returns the seconds that all cores of the machine have been busy with programs."""
  ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]]
  return sum(ticks) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
