"""Times the training loop against hand-written loops of the same mathematics, in turn, in one run.

    python experiments/bench.py --repeats=7 --out=results/bench

Each case runs `train.loop.train` on its flags and the minimal JAX loop of `by_hand.py` or
`by_hand_transformer.py`, without evaluations and checkpoints, the losses fetched once per dispatch.
Both are warmed up, then run alternately; the ratio of steps per second is taken pair by pair and
its median is the figure.
Beside them: what compressors cost (`costs.py`), what rounds cost (`rounds.py`), for how long a
checkpoint blocks, the memory of 10,000 simulated workers, and the time to the first logged step.
Other suites run between hosts, network namespaces of Linux, as root (`hosts.py`, `speed.py`,
`faults.py`), and on a parameter server (`servers.py`), whose cases may be measured one by one: the
rest is kept.
Writes result.json and table.md. Workers of one machine share its cores better on as many devices:
`JAX_NUM_CPU_DEVICES=2` for fed_avg and local_phase.
"""

import contextlib
import importlib.util
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging

from experiments import by_hand, costs, faults, hosts, rounds, run, servers, speed
from experiments.turns import in_turn, ratios, seconds
from launch import netlab
from research.train.config import Config

FLAGS = flags.FLAGS


class Case(NamedTuple):
  """A pair: the flags of the loop, and the maker of a hand-written `advance(steps)`."""

  flags: dict[str, Any]
  by_hand: Callable[[dict[str, Any]], Callable[[int], None]]
  tokens: int = 0  # in a step, of a language model


def transformer(config: dict[str, Any]) -> Callable[[int], None]:
  """That of `by_hand_transformer.py`, which imports JAX."""
  from experiments import by_hand_transformer

  return by_hand_transformer.transformer(config)


CASES = {
  "least_squares": Case(
    {
      "task": "least_squares(samples=1000, features=10)",
      "method": "data_parallel(sgd(0.1), mean())",
      "steps": 200_000,
      "steps_per_dispatch": 1000,
    },
    by_hand.least_squares,
  ),
  "digits": Case(
    {
      "task": "digits()",
      "model": "mlp(hidden=[128])",
      "method": "data_parallel(sgd(0.1, momentum=0.9), mean())",
      "steps": 8000,
      "steps_per_dispatch": 100,
    },
    by_hand.digits,
  ),
  "a9a": Case(
    {
      "task": "libsvm('a9a')",
      "method": "data_parallel(sgd(1.0), mean())",
      "mesh": "data:20",
      "batch_size": "all",
      "steps": 3000,
      "steps_per_dispatch": 50,
    },
    by_hand.a9a,
  ),
  "fed_avg": Case(
    {
      "task": "mnist()",
      "model": "mlp(hidden=[200, 200])",
      "method": "fed_avg(sgd(0.1), mean(), epochs=1)",
      "population": 100,
      "mesh": "data:10",
      "batch_size": 100,
      "steps": 1200,
      "steps_per_dispatch": 300,
    },
    by_hand.fed_avg,
  ),
  "transformer": Case(
    {
      "task": "tinyshakespeare()",
      "method": "data_parallel(chain(clip_by_global_norm(1.0), adamw(warmup_cosine_decay_schedule("
      "0.0, 3e-3, 100, 5000, 1.5e-4), b2=0.99, weight_decay=0.1)), mean())",
      "mesh": "data:1",
      "batch_size": 16,
      "steps": 120,
      "steps_per_dispatch": 30,
    },
    transformer,
    tokens=16 * 128,
  ),
}


OTHERS = (
  "compress",
  "power_sgd",
  "local_phase",
  "population",
  "checkpoints",
  "memory",
  "start",
)


def compare(name: str, repeats: int) -> dict[str, Any]:
  """Both loops of a case in turn; steps per second of each and the ratios pair by pair."""
  from research.train import loop
  from research.train.timing import Timing

  case, compiling = CASES[name], []
  plain: dict[str, Any] = {"eval_every": 0, "checkpoint_every": 0, "check_every": 0}
  plain["log_every"] = case.flags["steps_per_dispatch"]
  config = Config(**plain | case.flags)
  advance = case.by_hand(config._asdict())
  with contextlib.closing(Timing()) as timing:
    advance(config.steps_per_dispatch)

  def ours() -> float:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
      summary, _ = loop.train(config._replace(out=folder))
    compiling.append(summary["compile_seconds"])
    return summary["steps_per_second"]

  def theirs() -> float:
    return config.steps / seconds(lambda: advance(config.steps))

  loop_rates, hand_rates = in_turn((ours, theirs), repeats)
  found = ratios(loop_rates, hand_rates)
  return {
    "case": name,
    "ours": statistics.median(loop_rates),
    "by_hand": statistics.median(hand_rates),
    "ratio": statistics.median(found),
    "ratios": [round(r, 3) for r in found],
    "tokens_per_step": case.tokens,
    "compile_seconds": statistics.median(compiling),
    "by_hand_compile_seconds": timing.compiling,
  }


def checkpoints(repeats: int) -> list[float]:
  """Milliseconds for which a save of the digits run blocks, one a second between dispatches."""
  import jax

  from research.parallel import resize, workers
  from research.train import assemble
  from research.train.checkpoint import Checkpoints

  config = Config(**CASES["digits"].flags)
  problem = assemble.assemble(config, assemble.check(config))
  state = problem.executor.init(jax.random.key(0))
  data = problem.executor.place(problem.examples, problem.sizes, jax.random.key(1))
  blocked = []
  with tempfile.TemporaryDirectory() as folder:
    private = workers.infer_layout(problem.job).state
    store = Checkpoints(Path(folder), state, resize.placed(problem.job, private, state))
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


def pairs_table(rows: list[dict[str, Any]]) -> list[str]:
  """Loop against hand-written loop, in Markdown."""
  lines = ["| case | loop, steps/s | by hand, steps/s | ratio (median) | ratios |"]
  lines.append("|---|---|---|---|---|")
  for row in rows:
    rates = f"{rate(row['ours'])} | {rate(row['by_hand'])} | {row['ratio']:.3f}"
    lines.append(f"| {row['case']} | {rates} | {shown(row['ratios'])} |")
  for row in rows:
    if row["tokens_per_step"]:
      ours, by_hand_ = (row[name] * row["tokens_per_step"] for name in ("ours", "by_hand"))
      lines.append(
        f"\n{row['case']}: {ours:,.0f} tokens/s, by hand {by_hand_:,.0f}. The loop compiles for "
        f"{row['compile_seconds']:.1f} s with initialization and evaluation, the hand-written step "
        f"for {row['by_hand_compile_seconds']:.1f} s."
      )
  return lines


def compress_table(rows: list[dict[str, Any]]) -> list[str]:
  """Compressors against a copy, in Markdown."""
  device, copied = rows[0]["device"], statistics.median(row["copy_ms"] for row in rows)
  lines = [
    f"\nEncode and decode of 64 MiB of float32 on {device}, as ratio to `jnp.copy` of them "
    f"({copied:.3g} ms), each written over the result before:\n"
  ]
  lines.append(
    "| compressor | bytes | encode, ms | decode, ms | ratio (median) | encode, of the copy's "
    "bandwidth | largest sort |"
  )
  lines.append("|---|---|---|---|---|---|---|")
  for row in rows:
    times = f"{row['encode_ms']:.3g} | {row['decode_ms']:.3g} | {row['ratio']:.2f}"
    rest = f"{row['encode_bandwidth']:.0%} | {row['largest_sort']:,}"
    lines.append(f"| {row['compressor']} | {row['payload_bytes']:,} | {times} | {rest} |")
  return lines


def power_sgd_table(rows: list[dict[str, Any]]) -> list[str]:
  """Steps with PowerSGD against dense ones, in Markdown."""
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


def local_phase_table(rows: list[dict[str, Any]]) -> list[str]:
  """Workers one after the other against all at once, in Markdown."""
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


def rate(value: float) -> str:
  return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def shown(ratios: list[float]) -> str:
  return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def on_hosts() -> tuple[dict[str, Any], list[str]]:
  """What the suites between hosts measure, and its table."""
  if FLAGS.suite == "faults":
    found = faults.faults(FLAGS.hosts, FLAGS.kills, FLAGS.kill_every, FLAGS.steps)
    return {"faults": found}, faults.faults_table(found)
  if FLAGS.suite == "hosts":
    has_torch = importlib.util.find_spec("torch") is not None
    begun = speed.start(FLAGS.repeats)
    rows = speed.speed(FLAGS.repeats, has_torch)
    target = speed.to_target(rows, has_torch)
    found = {"hosts": rows, "target": target, "start_seconds": begun}
    return found, speed.speed_table(rows) + speed.target_table(target, begun)
  wire = hosts.wire((2, 4))
  return {"wire": wire}, hosts.wire_table(wire)


def main(argv: list[str]) -> None:
  """Runs the cases of a suite, prints the table, writes the result."""
  del argv
  logging.set_verbosity(logging.WARNING)
  known = servers.CASES if FLAGS.suite == "server" else (*CASES, *OTHERS)
  if FLAGS.suite == "server" and not FLAGS["cases"].present:
    FLAGS.cases = list(known)
  unknown = [name for name in FLAGS.cases if name not in known]
  if unknown:
    run.fail(2, f"--cases={unknown[0]}: unknown; legal: {', '.join(known)}")
  if FLAGS.suite in ("wire", "hosts", "faults"):
    netlab.refuse()
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")  # to compile for as many hosts
  with run.one_line_errors():
    from research.train import folder, report

    suites = {"loop": of_loop, "server": lambda: of_server(folder.environment())}
    result, lines = suites.get(FLAGS.suite, on_hosts)()
    result = {"environment": folder.environment(), **result}
  print("\n".join(lines))
  if FLAGS.out:
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(out / "result.json", result)
    (out / "table.md").write_text("\n".join(lines) + "\n")


def of_server(environment: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """What a server's cases measure, beside those measured before, each with what it was made by."""
  stored = Path(FLAGS.out) / "result.json" if FLAGS.out else None
  result = json.loads(stored.read_text()) if stored and stored.exists() else {}
  found = servers.measure(FLAGS.cases, FLAGS.kills, FLAGS.kill_every)
  made = dict.fromkeys(found, environment["commit"])
  result = result | found | {"commits": result.get("commits", {}) | made}
  result.pop("environment", None)
  return result, servers.table(result)


def of_loop() -> tuple[dict[str, Any], list[str]]:
  """What the cases of one machine measure, and its tables."""
  pairs = [compare(name, FLAGS.repeats) for name in FLAGS.cases if name in CASES]
  result: dict[str, Any] = {"pairs": pairs}
  lines = pairs_table(pairs) if pairs else []
  if "compress" in FLAGS.cases:
    result["compress"] = costs.compress(FLAGS.repeats)
    lines += compress_table(result["compress"])
  if "power_sgd" in FLAGS.cases:
    result["power_sgd"] = rounds.power_sgd(FLAGS.repeats)
    lines += power_sgd_table(result["power_sgd"])
  if "local_phase" in FLAGS.cases:
    result["local_phase"] = rounds.local_phase(FLAGS.repeats)
    lines += local_phase_table(result["local_phase"])
  if "population" in FLAGS.cases:
    found = result["population"] = rounds.population(FLAGS.repeats)
    lines.append(
      f"\nA round of SCAFFOLD with 10 of 10,000 clients takes {found['ratio']:.2f} times as long "
      f"as one with 10 of 100 ({found['many_ms']:.2f} ms against {found['few_ms']:.2f}; ratios "
      f"{shown(found['ratios'])})."
    )
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
  return result, lines


if __name__ == "__main__":
  text = "loop: against loops by hand; between hosts wire: bytes; hosts: speed; faults: deaths; "
  text += "server: a parameter server."
  flags.DEFINE_enum("suite", "loop", ["loop", "wire", "hosts", "faults", "server"], text)
  flags.DEFINE_integer("hosts", 4, "Of the suite faults.", 2)
  flags.DEFINE_integer("kills", 50, "Of the suite faults.", 1)
  flags.DEFINE_float("kill_every", 15.0, "Mean seconds between two kills.", 0.1)
  flags.DEFINE_integer("steps", 5000, "Of the suite faults.", 1)
  flags.DEFINE_list("cases", [*CASES, *OTHERS], "What to measure.")
  flags.DEFINE_integer("repeats", 7, "Counted turns of each pair.", 1)
  flags.DEFINE_string("out", "", "Folder for result.json and table.md; empty: only prints.")
  app.run(main, flags_parser=run.parse_flags)
