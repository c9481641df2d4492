"""Times the training loop in turn with hand-written loops of the same algorithms.

`experiments/bench.py` runs these pairs of loops and writes the table.
"""

import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.baselines import by_hand
from experiments.benchmarks.turns import in_turn, ratios, seconds, shown
from research.command.errors import exit_if_stopped
from research.training.config import Config


class Case(NamedTuple):
  """A pair of loops: the flags of our loop, and the factory of a hand-written `advance(steps)`."""

  flags: dict[str, Any]
  by_hand: Callable[[dict[str, Any]], Callable[[int], None]]
  tokens: int = 0  # number of tokens per step of a language model


def transformer(config: dict[str, Any]) -> Callable[[int], None]:
  """Returns the loop of `by_hand_transformer.py`, imported late because that module imports JAX."""
  from experiments.baselines import by_hand_transformer

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


def compare(name: str, repeats: int) -> dict[str, Any]:
  """Times both loops of a case in turn; returns steps per second and the pairwise ratios."""
  from research.training import loop
  from research.training.reports.timing import Timing

  case, compiling = CASES[name], []
  plain: dict[str, Any] = {"eval_every": 0, "checkpoint_every": 0, "check_every": 0}
  plain["log_every"] = case.flags["steps_per_dispatch"]
  config = Config(**plain | case.flags)
  advance = case.by_hand(config.as_dict())
  with Timing() as timing:
    advance(config.steps_per_dispatch)

  def ours() -> float:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
      summary, _ = loop.train(config.replace(out=folder))
      exit_if_stopped(summary, saved=False)
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


def pairs_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table that compares the loop with hand-written loops."""
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


def rate(value: float) -> str:
  return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
