"""Trains in a separate process, as a peer's program does, and prints the training time.

    python experiments/benchmarks/alone.py '{"task": "libsvm(\\'a9a\\')", "steps": 100, ...}'

The argument is a JSON object: `task`, `model` and `method` are specs, `leaf` is the parameter to
  save, `out` is the file for this parameter, and all other entries are arguments of
  `research.train`. Compiled programs are cached, as in run.py. The program prints a JSON line: the
  seconds spent reading, compiling and training, the loss before every step, and the evaluations.
"""

import json
import sys
import time
from typing import Any


def main(given: dict[str, Any]) -> None:
  """Trains, and prints the times, the losses and the evaluations."""
  import jax
  import numpy as np

  import research
  from research.command.start import use_compilation_cache
  from research.core import registry
  from research.core.spec import parse

  use_compilation_cache("")
  spec, model, leaf, out = (given.pop(name) for name in ("task", "model", "leaf", "out"))
  start = time.perf_counter()
  built = {"model": registry.build("model", model)} if model else {}
  task = registry.build("task", parse(spec), data_dir="", **built)
  reading = time.perf_counter() - start
  start = time.perf_counter()
  result = research.train(task, given.pop("method"), batch_size="all", progress=False, **given)
  jax.block_until_ready(result.params)
  seconds = time.perf_counter() - start
  if out:
    np.save(out, jax.device_get(result.params)[leaf])
  found = {
    "reading": reading,
    "seconds": seconds,
    "compiling": result.summary["compile_seconds"],
    "losses": [row["loss"] for row in result.metrics if "loss" in row],
    "evals": [row["eval"] for row in result.metrics if "eval" in row],
  }
  print(json.dumps(found), flush=True)


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
