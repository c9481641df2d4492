"""Benchmarks rounds: compares PowerSGD with dense steps, map with vmap, and population sizes.

The benchmarks run on the available devices. `experiments/bench.py` with
`--cases=power_sgd,local_phase,diagnostics,population` runs these benchmarks and writes the tables.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.turns import in_turn, milliseconds, ratios, seconds, shown

DENSE = "data_parallel(sgd(0.1), mean())"
LOW_RANK = "data_parallel(sgd(0.1), error_feedback(power_sgd(4)))"
HIDDEN, BATCH, STEPS = (1024, 1024), 256, 10
LAYERS, SIDE = 24, 512
LOCAL = "local_sgd(sgd(0.1), mean(), period=20)"
WIDTHS = ((), (64,), (200, 200), (512,), (512, 512), (1024,), (1024, 1024))
SCAFFOLD = "scaffold(0.1, mean(), epochs=1)"
MEASURED = (
  "data_parallel(sgd(0.1, momentum=0.9), mean())",
  "data_parallel(sgd(0.1), error_feedback(two_phase(int8())))",
  "local_sgd(sgd(0.1), mean(), period=10)",
)


def power_sgd(repeats: int) -> list[dict[str, Any]]:
  """Times, for each executor, a step with PowerSGD of rank 4 and error feedback, and a dense step.

  One worker trains an MLP of 1.9 million parameters, with `STEPS` steps per dispatch, on random
  images with the number and the shape of MNIST's images.
  """
  from research.parallel.simulate import simulate
  from research.parallel.spmd import spmd

  task = _images()
  rows = []
  for executor in (simulate, spmd):
    of = lambda method, executor=executor: _rounds(
      executor, task, {"method": method}, workers=1, batch=BATCH, rounds=STEPS
    )
    dense, low_rank = in_turn([of(DENSE), of(LOW_RANK)], repeats)
    found = ratios(low_rank, dense)
    rows.append(
      {
        "executor": executor.__name__,
        "dense_ms": milliseconds(dense),
        "power_sgd_ms": milliseconds(low_rank),
        "ratio": statistics.median(found),
        "ratios": [round(r, 3) for r in found],
      }
    )
  return rows


def equal_matrices(repeats: int) -> dict[str, Any]:
  """Times PowerSGD of rank 4 on 24 matrices of 512 x 512, together and one after the other.

  Together, one batched QR decomposes the factors of all matrices. One after the other, each matrix
  is a tree of its own. One worker; compilation is timed separately.
  """
  import jax
  from jax.sharding import PartitionSpec

  from research.comm import mesh
  from research.core import registry

  aggregator = registry.build("aggregator", "power_sgd(4)")
  keys = jax.random.split(jax.random.key(0), LAYERS)
  matrices = {i: jax.random.normal(k, (SIDE, SIDE)) for i, k in enumerate(keys)}
  together = lambda tree, state: aggregator.aggregate(tree, state, keys[0])
  apart = lambda tree, state: [together({i: tree[i]}, {i: state[i]}) for i in tree]
  devices = mesh.device_mesh({"data": 1}, jax.devices()[:1])
  whole = PartitionSpec()
  programs, compiled = [], []
  for function in (together, apart):
    run = jax.shard_map(
      function, mesh=devices, in_specs=(whole, whole), out_specs=whole, check_vma=False
    )
    lowered = jax.jit(run).lower(matrices, aggregator.init(matrices))
    compiled.append(seconds(lambda lowered=lowered: programs.append(lowered.compile())))
  state = aggregator.init(matrices)
  once = lambda program: seconds(lambda: jax.block_until_ready(program(matrices, state)))
  found = in_turn([lambda program=program: once(program) for program in programs], repeats)
  return {
    "together_ms": milliseconds(found[0]),
    "apart_ms": milliseconds(found[1]),
    "compile_s": compiled,
    "ratios": [round(r, 3) for r in ratios(*found)],
    "ratio": statistics.median(ratios(*found)),
  }


def local_phase(repeats: int) -> list[dict[str, Any]]:
  """Times a round of ten simulated workers with 20 steps of 10 images, under map and vmap."""
  from research.parallel.simulate import simulate

  rows = []
  for hidden in WIDTHS:
    task = _images(hidden)
    of = lambda job, task=task: _rounds(simulate, task, job, workers=10, batch=10, rounds=5)
    changes = [{"method": LOCAL, "local_phase": phase} for phase in ("vmap", "map")]
    together, alone = in_turn([of(change) for change in changes], repeats)
    found = ratios(alone, together)
    rows.append(
      {
        "hidden": hidden,
        "model_bytes": _bytes_of(task),
        "vmap_ms": milliseconds(together),
        "map_ms": milliseconds(alone),
        "ratio": statistics.median(found),
        "ratios": [round(r, 3) for r in found],
      }
    )
  return rows


def diagnostics(repeats: int) -> list[dict[str, Any]]:
  """Times dispatches of digits with a row every ten steps, with and without diagnostics."""
  import jax

  from research.training.assemble import assemble, check
  from research.training.config import Config
  from research.training.loop import Run

  def of(method: str, on: bool) -> Callable[[], float]:
    config = Config(method=method, steps=10**9, diagnostics=on)
    run = Run(config, assemble(config, check(config)))

    return lambda: seconds(lambda: [jax.device_get(_advanced(run)) for _ in range(10)]) / 1000

  rows = []
  for method in MEASURED:
    off, on = in_turn([of(method, False), of(method, True)], repeats)
    found = ratios(on, off)
    row = {"method": method, "off_us": 1000 * milliseconds(off), "ratios": found}
    rows.append(row | {"ratio": statistics.median(found), "best": min(on) / min(off)})
  return rows


def _advanced(run: Any) -> Any:
  """Runs the next dispatch of 100 steps; returns its metrics."""
  run.advance(run.step + 100)
  return run.metrics


def diagnostics_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table of the cost of diagnostics."""
  lines = ["| method | a step without, us | with, times (median) | best of each | ratios |"]
  lines.append("|---|---|---|---|---|")
  for row in rows:
    figures = f"{row['off_us']:.0f} | {row['ratio']:.3f} | {row['best']:.3f}"
    lines.append(f"| `{row['method']}` | {figures} | {shown(row['ratios'])} |")
  return lines


def population(repeats: int) -> dict[str, Any]:
  """Times SCAFFOLD rounds with 10 of 10,000 and with 10 of 100 clients of six images each."""
  from research.parallel.simulate import simulate

  of = lambda clients: _rounds(
    simulate,
    _images((), 6 * clients),
    {"method": SCAFFOLD},
    workers=10,
    batch=6,
    rounds=100,
    owners=clients,
  )
  few, many = in_turn([of(100), of(10_000)], repeats)
  found = ratios(many, few)
  return {
    "few_ms": milliseconds(few),
    "many_ms": milliseconds(many),
    "ratio": statistics.median(found),
    "ratios": [round(r, 3) for r in found],
  }


def _bytes_of(task) -> int:
  import jax

  params = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in params)


def _images(hidden: Sequence[int] = HIDDEN, count: int = 60_000):
  """Returns a perceptron's task on random images and labels."""
  from research.models.classic import linear, mlp
  from research.tasks.supervised import supervised

  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, (count, 28, 28), np.uint8)
  labels = draw.integers(0, 10, count, np.int32)
  model = mlp(hidden) if hidden else linear()
  return supervised(model(10), {"x": images, "y": labels})


def _rounds(
  executor, task, job: dict[str, Any], *, workers: int, batch: int, rounds: int, owners: int = 0
) -> Callable[[], float]:
  """Builds a function that runs the next dispatch and returns the seconds per round.

  `job` contains a method's spec and further fields of a Job.
  """
  import jax

  from research.core import registry
  from research.parallel.job import Job, resolved
  from research.tasks.partition import iid, stack

  parts = iid()(task.train["y"], owners or workers, 0)
  examples, sizes = stack(task.train, parts)
  method = registry.build("method", job["method"])
  fields = {**job, "method": method}
  built = executor(
    resolved(Job(task=task, axes={"data": workers}, sizes=sizes, batch_size=batch, **fields))
  )
  held = [built.init(jax.random.key(0))]
  data = built.place(examples, sizes, jax.random.key(1))

  def dispatch() -> None:
    held[0], metrics = built.run(held[0], data, rounds=rounds)
    jax.block_until_ready((held[0], metrics))

  dispatch()
  return lambda: seconds(dispatch) / rounds


def power_sgd_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table of steps with PowerSGD and of dense steps."""
  lines = [
    "\nA step with error_feedback(power_sgd(4)) against a dense one, MLP of 1.9 million "
    "parameters, batch 256, one worker:\n"
  ]
  lines.append("| executor | dense, ms | PowerSGD, ms | ratio (median) | ratios |")
  lines.append("|---|---|---|---|---|")
  for row in rows:
    times = f"{row['dense_ms']:.2f} | {row['power_sgd_ms']:.2f} | {row['ratio']:.2f}"
    lines.append(f"| {row['executor']} | {times} | {shown(row['ratios'])} |")
  return lines


def equal_matrices_line(one: dict[str, Any]) -> str:
  """Formats the line on PowerSGD of equal matrices."""
  compiled = " and ".join(f"{value:.1f}" for value in one["compile_s"])
  times = f"{one['together_ms']:.2f} ms with one QR for all, {one['apart_ms']:.2f} ms with one each"
  return (
    f"\nPowerSGD of rank 4 on {LAYERS} matrices of {SIDE} x {SIDE}: {times} (ratios "
    f"{shown(one['ratios'])}); compiled in {compiled} s."
  )


def local_phase_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table of map and vmap over workers."""
  lines = [
    "\nA round of ten simulated workers, 20 local steps on 10 images each, perceptrons of several "
    "sizes: workers one after the other (map) against all at once (vmap):\n"
  ]
  lines.append("| hidden | bytes of the model | vmap, ms | map, ms | ratio (median) | ratios |")
  lines.append("|---|---|---|---|---|---|")
  for row in rows:
    hidden = "-".join(map(str, row["hidden"])) or "none"
    times = f"{row['vmap_ms']:.2f} | {row['map_ms']:.2f} | {row['ratio']:.2f}"
    lines.append(f"| {hidden} | {row['model_bytes']:,} | {times} | {shown(row['ratios'])} |")
  return lines
