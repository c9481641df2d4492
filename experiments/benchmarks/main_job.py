"""Measures what a save blocks, the memory of many simulated workers, and the start of a run."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments import run
from experiments.benchmarks import pairs
from research.training.config import Config


def checkpoints(repeats: int) -> list[float]:
  """Measures the milliseconds for which a save blocks a run on digits, with one save per second."""
  import jax

  from research.parallel import resize
  from research.training import assemble
  from research.training.checkpoint.checkpoint import Checkpoints
  from research.training.hooks.hook import Rounds
  from research.training.loop import Run, events

  config = Config(**pairs.CASES["digits"].flags).replace(steps=2**30)
  problem = assemble.assemble(config, assemble.check(config))
  run, blocked = Run(config, problem), []
  with tempfile.TemporaryDirectory() as folder:
    placed = resize.placed(problem.job, problem.executor.layout.state, run.state)
    store = Checkpoints(Path(folder), run.state, placed)
    until = time.perf_counter() + 1
    for event in events(run):
      jax.block_until_ready(run.metrics)
      if not isinstance(event, Rounds) or time.perf_counter() < until:
        continue
      start = time.perf_counter()
      store.save(run.step, run.state, 0.0)
      blocked.append(1000 * (time.perf_counter() - start))
      until = time.perf_counter() + 1
      if len(blocked) > repeats:
        break
    store.wait()
    store.close()
  return blocked[1:]


def start(repeats: int) -> list[float]:
  """Measures the seconds to the first logged step of the main job, with a warm cache."""
  seconds = []
  for _ in range(repeats + 1):
    with tempfile.TemporaryDirectory() as folder:
      begun = time.perf_counter()
      process = command(f"--out={folder}/run")
      while "step" not in (process.stderr.readline() if process.stderr else ""):
        if process.poll():
          raise RuntimeError(f"the main job ended with {process.returncode}")
      seconds.append(time.perf_counter() - begun)
      process.communicate()
  return seconds[1:]


def memory() -> float:
  """Measures the peak GiB of 10,000 simulated workers on least squares with 100 features."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  with tempfile.TemporaryDirectory() as folder:
    process = command(
      "--task=least_squares(samples=100000, features=100)",
      "--mesh=data:10000",
      "--batch_size=10000",
      f"--out={folder}/run",
    )
    process.communicate()
  if process.returncode:
    raise RuntimeError(f"the run of 10,000 workers ended with {process.returncode}")
  return max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 2**20


def command(*words: str) -> subprocess.Popen[str]:
  """Starts run.py in a separate process."""
  program = [sys.executable, str(Path(run.__file__)), *words]
  return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
