"""Times several methods on several links, as one process of a job; see `prediction.py`.

    python experiments/benchmarks/on_links.py JSON

Process 0 prints a line `link NAME` before each link, and continues when it reads a line: by then,
the links between the hosts have this rate. It prints a line `cell JSON` per method and link, with
the milliseconds per local step of every dispatch. All methods are compiled once, before the first
link.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from research.comm import join
from research.training.config import Config

SECONDS = 2.0  # for one method on one link, after the first dispatch
DISPATCHES = (2, 30)  # smallest and largest number per method and link


def job(config: Config) -> Callable[[], float]:
  """Compiles a run; returns a function that runs a dispatch and returns its seconds."""
  import jax

  from research.training import assemble
  from research.training.loop import Run

  run = Run(config, assemble.assemble(config, assemble.check(config)))
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

  logging.set_verbosity(logging.ERROR)
  jax.config.update("jax_compilation_cache_dir", asked["cache"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  join.initialize()
  first = jax.process_index() == 0

  def say(line: str) -> None:
    if first:
      print(line, flush=True)

  dispatches = {}
  for spec in asked["methods"]:
    dispatches[spec] = job(Config(**asked["config"], method=spec))
    say(f"compiled {spec}")
  for link in asked["links"]:
    say(f"link {link}")
    if first:
      sys.stdin.readline()
    multihost_utils.sync_global_devices(link)
    for spec, dispatch in dispatches.items():
      dispatch()  # the link's buckets are then in their steady state
      seconds = [dispatch()]
      longest = multihost_utils.process_allgather(np.float32(seconds[0])).max()
      count = int(np.clip(SECONDS / longest, *DISPATCHES))
      seconds += [dispatch() for _ in range(count - 1)]
      steps = asked["config"]["steps_per_dispatch"]
      cell = {"link": link, "method": spec, "milliseconds": [1000 * s / steps for s in seconds]}
      say(f"cell {json.dumps(cell)}")


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
