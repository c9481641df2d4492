"""Times the training loop against hand-written loops of the same mathematics, in turn, in one run.

    python experiments/bench.py --repeats=7 --out=results/bench

Each case runs `train.loop.train` on its flags and a minimal JAX loop written for that case alone:
the same model, loss, workers, batch, optimizer and steps per dispatch, its batches drawn with
replacement, no evaluation, no checkpoints, no metrics but the loss, fetched once per dispatch as
the loop does. Both are warmed up, then run alternately; the ratio of steps per second is taken pair
by pair and its median is the figure. Beside them: for how long a checkpoint blocks, the memory of
10,000 simulated workers, and the time to the first logged step. Writes result.json and table.md.
"""

import contextlib
import io
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from experiments import run
from research.train.config import Config

FLAGS = flags.FLAGS


class Case(NamedTuple):
  """A pair: the flags of the loop, and the maker of a hand-written `advance(steps)`."""

  flags: dict[str, Any]
  by_hand: Callable[[dict[str, Any]], Callable[[int], None]]


def least_squares_by_hand(config: dict[str, Any]) -> Callable[[int], None]:
  """Eight workers' gradients of the mean squared error, averaged, one SGD step."""
  import jax.numpy as jnp

  examples = load(config)
  x, y = jnp.asarray(examples["x"]), jnp.asarray(examples["y"])

  def loss(w, x, y):
    return 0.5 * jnp.mean((x @ w - y) ** 2)

  def update(w, grads):
    return w - 0.1 * grads

  return dispatches(config, loss, update, jnp.zeros(x.shape[-1]), x, y)


def digits_by_hand(config: dict[str, Any]) -> Callable[[int], None]:
  """Eight workers' gradients of a 64-128-10 perceptron, averaged, one heavy-ball step."""
  import jax
  import jax.numpy as jnp

  examples = load(config)
  x = jnp.asarray(examples["x"].reshape(*examples["x"].shape[:2], -1) / 16, jnp.float32)
  y = jnp.asarray(examples["y"])

  def loss(params, x, y):
    w, _ = params
    hidden = jax.nn.relu(x @ w["a"] + w["b"])
    logits = jax.nn.log_softmax(hidden @ w["c"] + w["d"])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))

  def update(params, grads):
    w, momentum = params
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads[0])
    return jax.tree.map(lambda w, m: w - 0.1 * m, w, momentum), momentum

  keys = jax.random.split(jax.random.key(0))
  w = {
    "a": jax.random.normal(keys[0], (64, 128)) / 8,
    "b": jnp.zeros(128),
    "c": jax.random.normal(keys[1], (128, 10)) / 11,
    "d": jnp.zeros(10),
  }
  return dispatches(config, loss, update, (w, jax.tree.map(jnp.zeros_like, w)), x, y)


def dispatches(config, loss, update, state, x, y) -> Callable[[int], None]:
  """Mini-batch steps, `steps_per_dispatch` of them in one scan."""
  import jax
  import jax.numpy as jnp

  workers, batch = x.shape[0], int(config["batch_size"]) // x.shape[0]

  def step(data, state, index):
    x, y = data
    take = jax.vmap(lambda rows, i: rows[i])
    value, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(
      state, take(x, index), take(y, index)
    )
    return update(state, jax.tree.map(lambda g: jnp.mean(g, 0), grads)), jnp.mean(value)

  def run(state, data, key, length):
    index = jax.random.randint(key, (length, workers, batch), 0, data[0].shape[1])
    return jax.lax.scan(partial(step, data), state, index)

  run = jax.jit(run, static_argnames="length", donate_argnums=0)
  return advancing(config, state, lambda state, i, n: run(state, (x, y), jax.random.key(i), n))


def a9a_by_hand(config: dict[str, Any]) -> Callable[[int], None]:
  """Twenty workers' gradients over all their rows of logistic regression, summed, one step."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  examples = load(config)
  x, y = jnp.asarray(examples["x"]), jnp.asarray(examples["y"], jnp.float32)
  present = jnp.asarray(np.abs(examples["x"]).sum(-1) > 0, jnp.float32)
  total = float(jnp.sum(present))

  def loss(params, x, y, present):
    logits = (x @ params[0])[:, 0] + params[1]
    return jnp.sum(present * (jax.nn.softplus(logits) - y * logits)) / total

  def step(data, params, _):
    value, grads = jax.vmap(jax.value_and_grad(loss), (None, 0, 0, 0))(params, *data)
    moved = jax.tree.map(lambda p, g: p - 1.0 * jnp.sum(g, 0), params, grads)
    return moved, jnp.sum(value)

  def run(params, data, length):
    return jax.lax.scan(partial(step, data), params, None, length)

  run = jax.jit(run, static_argnames="length", donate_argnums=0)
  params = (jnp.zeros((x.shape[-1], 1)), jnp.zeros(()))
  return advancing(config, params, lambda params, i, n: run(params, (x, y, present), n))


def advancing(config, state, run) -> Callable[[int], None]:
  """`advance(steps)` by dispatches, each one's losses fetched when the next has begun."""
  import jax

  held = [state]

  def advance(steps: int) -> None:
    length, before = config["steps_per_dispatch"], None
    for i in range(steps // length):
      held[0], losses = run(held[0], i, length)
      if before is not None:
        jax.device_get(before)
      before = losses
    jax.device_get(before)

  return advance


def load(config: dict[str, Any]) -> dict[str, Any]:
  """The examples by worker, as the loop gets them."""
  from research.train import assemble

  settings = Config(**config)
  return assemble.assemble(settings, assemble.check(settings)).examples


CASES = {
  "least_squares": Case(
    {
      "task": "least_squares(samples=1000, features=10)",
      "method": "data_parallel(sgd(0.1), mean())",
      "steps": 200_000,
      "steps_per_dispatch": 1000,
    },
    least_squares_by_hand,
  ),
  "digits": Case(
    {
      "task": "digits()",
      "model": "mlp(hidden=[128])",
      "method": "data_parallel(sgd(0.1, momentum=0.9), mean())",
      "steps": 8000,
      "steps_per_dispatch": 100,
    },
    digits_by_hand,
  ),
  "a9a": Case(
    {
      "task": "libsvm('a9a')",
      "method": "data_parallel(sgd(1.0), mean())",
      "mesh": "data:20",
      "batch_size": "all",
      "steps": 1000,
      "steps_per_dispatch": 50,
    },
    a9a_by_hand,
  ),
}


OTHERS = ("checkpoints", "memory", "start")


def compare(name: str, repeats: int) -> dict[str, Any]:
  """Both loops of a case in turn; steps per second of each and the ratios pair by pair."""
  from research.train import loop

  case = CASES[name]
  plain: dict[str, Any] = {"eval_every": 0, "checkpoint_every": 0, "check_every": 0}
  plain["log_every"] = case.flags["steps_per_dispatch"]
  config = Config(**plain | case.flags)
  advance = case.by_hand(config._asdict())

  def ours() -> float:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
      summary, _ = loop.train(config._replace(out=folder))
    return summary["steps_per_second"]

  def by_hand() -> float:
    start = time.perf_counter()
    advance(config.steps)
    return config.steps / (time.perf_counter() - start)

  for warm_up in (ours, by_hand):
    warm_up()
  pairs = [(ours(), by_hand()) for _ in range(repeats)]
  return {
    "case": name,
    "ours": statistics.median(a for a, _ in pairs),
    "by_hand": statistics.median(b for _, b in pairs),
    "ratio": statistics.median(a / b for a, b in pairs),
    "ratios": [round(a / b, 3) for a, b in pairs],
  }


def checkpoints(repeats: int) -> list[float]:
  """Milliseconds for which a save of the digits run blocks, one a second between dispatches."""
  import jax

  from research.train import assemble
  from research.train.checkpoint import Checkpoints

  config = Config(**CASES["digits"].flags)
  problem = assemble.assemble(config, assemble.check(config))
  state = problem.executor.init(jax.random.key(0))
  data = problem.executor.place(problem.examples, problem.job.sizes, jax.random.key(1))
  blocked = []
  with tempfile.TemporaryDirectory() as folder:
    store = Checkpoints(Path(folder), state)
    for step in range(repeats + 1):
      until = time.perf_counter() + 1
      while time.perf_counter() < until:
        state, metrics = problem.executor.run(state, data, rounds=config.steps_per_dispatch)
        jax.block_until_ready(metrics)
      start = time.perf_counter()
      store.save(step, state, 0.0)
      blocked.append(1000 * (time.perf_counter() - start))
    store.wait()
    store.close()
  return blocked[1:]


def start(repeats: int) -> list[float]:
  """Seconds from the start of the main job's process to its first logged step, compiled before."""
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
  """GiB at most in use by a run of 10,000 simulated workers on least squares, 100 features each."""
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
  """run.py in a process of its own."""
  program = [sys.executable, str(Path(run.__file__)), *words]
  return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def main(argv: list[str]) -> None:
  """Runs the cases, prints the table, writes the result."""
  del argv
  unknown = [name for name in FLAGS.cases if name not in (*CASES, *OTHERS)]
  if unknown:
    run.fail(2, f"--cases={unknown[0]}: unknown; legal: {', '.join((*CASES, *OTHERS))}")
  with run.one_line_errors():
    from research.train import folder, report

    pairs = [compare(name, FLAGS.repeats) for name in FLAGS.cases if name in CASES]
    lines = ["| case | loop, steps/s | by hand, steps/s | ratio (median) | ratios |"]
    lines.append("|---|---|---|---|---|")
    for row in pairs:
      ratios = ", ".join(f"{r:.2f}" for r in row["ratios"])
      rates = f"{row['ours']:.0f} | {row['by_hand']:.0f} | {row['ratio']:.3f}"
      lines.append(f"| {row['case']} | {rates} | {ratios} |")
    result: dict[str, Any] = {"environment": folder.environment(), "pairs": pairs}
    if "checkpoints" in FLAGS.cases:
      blocked = result["checkpoint_milliseconds"] = checkpoints(FLAGS.repeats)
      middle, top = statistics.median(blocked), max(blocked)
      lines.append(f"\nA save blocks for {middle:.1f} ms (median; at most {top:.1f} ms).")
    if "memory" in FLAGS.cases:
      result["memory_gib"] = memory()
      lines.append(f"\n10,000 simulated workers need {result['memory_gib']:.2f} GiB at most.")
    if "start" in FLAGS.cases:
      begun = result["start_seconds"] = start(FLAGS.repeats)
      middle, top = statistics.median(begun), max(begun)
      lines.append(f"\nFirst logged step after {middle:.1f} s (median; at most {top:.1f} s).")
  print("\n".join(lines))
  if FLAGS.out:
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(out / "result.json", result)
    (out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
  flags.DEFINE_list("cases", [*CASES, *OTHERS], "What to measure.")
  flags.DEFINE_integer("repeats", 7, "Counted turns of each pair.", 1)
  flags.DEFINE_string("out", "", "Folder for result.json and table.md; empty: only prints.")
  app.run(main, flags_parser=run.parse_flags)
