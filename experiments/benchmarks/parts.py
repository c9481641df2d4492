"""Times steps of Muon, Dion and block top-k, and the sum of their hand-written parts, in turn.

`experiments/bench.py --cases=parts` runs this benchmark and writes the table.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.turns import in_turn, milliseconds, ratios, seconds, shown

MODEL = "transformer('tiny', layers=2, dtype='float32')"
CONTEXT, BATCH, VOCABULARY = 32, 4, 65
TOLERANCE = 1e-5  # of the parameters after one step, relative to the largest


class Case(NamedTuple):
  """A method's spec, the name of its hand-written steps, and the number of rounds per turn."""

  method: str
  by_hand: str
  rounds: int = 10


CASES = {
  "muon": Case(
    "data_parallel(muon(0.02, weight_decay=0.1, adam_learning_rate=3e-3), mean())", "muon"
  ),
  "muon_bp": Case(
    "data_parallel(muon_bp(0.02, weight_decay=0.1, adam_learning_rate=3e-3), mean())", "muon"
  ),
  "dion": Case("dion(0.01, adamw(3e-3), mean())", "dion"),
  "block_top_k": Case(
    "data_parallel(adamw(3e-3), error_feedback(gather_mean(block_top_k())))", "compressed"
  ),
  "sparse_loco": Case(
    "diloco(adamw(3e-3), sgd(1.0), error_feedback(gather_mean(block_top_k()), decay=0.95), "
    "period=15)",
    "sparse_loco",
    rounds=1,
  ),
}


class Pair(NamedTuple):
  """A method in `spmd`, and its hand-written steps on the same data from the same parameters."""

  whole: Callable[[], None]  # runs a round and waits for its end
  params: Callable[[], dict[str, Any]]  # the parameters after the completed rounds, by path
  by_hand: Any  # a by_hand_parts.Running

  def difference(self) -> float:
    """Returns the largest difference between both sides' parameters, over the largest parameter."""
    whole, by_hand = self.params(), self.by_hand.values["params"]
    differences = [np.max(np.abs(x - np.asarray(by_hand[name]))) for name, x in whole.items()]
    return float(max(differences) / max(np.max(np.abs(x)) for x in whole.values()))


def pair(name: str, model: str = MODEL) -> Pair:
  """Builds both sides of a case, with one worker per device; each step uses all of the data."""
  import jax
  from flax.traverse_util import flatten_dict, unflatten_dict

  from experiments.baselines import by_hand_parts
  from research.core import registry
  from research.parallel.job import Job, resolved
  from research.parallel.spmd import spmd
  from research.tasks.language.language import Text, next_token
  from research.tasks.partition import iid, stack

  case, workers = CASES[name], len(jax.devices())
  count = workers * BATCH * CONTEXT
  text = Text(np.random.default_rng(0).integers(0, VOCABULARY, count).astype(np.uint8), count)
  module = registry.build("model", model)(VOCABULARY)
  task = next_token(module, VOCABULARY, text, text, context=CONTEXT)
  examples, sizes = stack(task.train, iid()(task.train["y"], workers, 0))
  method = registry.build("method", case.method)
  built = spmd(resolved(Job(method, task, {"data": workers}, sizes, batch_size=None)))
  held = [built.init(jax.random.key(0))]
  data = built.place(examples, sizes, jax.random.key(1))

  def whole() -> None:
    held[0], metrics = built.run(held[0], data, rounds=1)
    jax.block_until_ready((held[0], metrics))

  def loss(params, examples):
    return task.loss(unflatten_dict(params, sep="/"), {"x": examples}, jax.random.key(0))

  params = lambda: jax.device_get(flatten_dict(built.params(held[0]), sep="/"))
  steps = getattr(by_hand_parts, case.by_hand)(loss, params())
  return Pair(whole, params, by_hand_parts.Running(steps, examples["x"]))


def parts(repeats: int) -> list[dict[str, Any]]:
  """Times each case; returns milliseconds, the ratios of each turn and the seconds of compiling.

  Raises:
    RuntimeError: if the parts of a case, put together, are not a step of the method.
  """
  return [_timed(name, case.rounds, repeats) for name, case in CASES.items()]


def _timed(name: str, rounds: int, repeats: int) -> dict[str, Any]:
  from research.training.reports.timing import Timing

  both, found = pair(name), []
  with Timing() as whole:
    both.whole()
  with Timing() as by_hand:
    both.by_hand.step()
  difference = both.difference()
  if difference > TOLERANCE:
    raise RuntimeError(f"{name}: a step by hand differs from a step in spmd by {difference:.1e}")

  def of_whole() -> float:
    return seconds(lambda: [both.whole() for _ in range(rounds)]) / rounds

  def of_parts() -> float:
    steps = [both.by_hand.step() for _ in range(rounds)]
    found.append({part: statistics.mean(step[part] for step in steps) for part in steps[0]})
    return sum(found[-1].values())

  wholes, sums = in_turn((of_whole, of_parts), repeats)
  by_turn = ratios(wholes, sums)
  return {
    "case": name,
    "method": CASES[name].method,
    "whole_ms": milliseconds(wholes),
    "sum_ms": milliseconds(sums),
    "parts_ms": {part: milliseconds([turn[part] for turn in found[1:]]) for part in found[0]},
    "ratio": statistics.median(by_turn),
    "ratios": [round(r, 3) for r in by_turn],
    "difference": difference,
    "compile_s": whole.compiling,
    "by_hand_compile_s": by_hand.compiling,
  }


def parts_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown tables of whole steps and of their hand-written parts."""
  lines = [
    "\nA step in spmd, or a round of SparseLoCo, against the sum of its hand-written parts:\n",
    "| case | whole, ms | sum of parts, ms | ratio (median) | ratios | compiled in, s | parts, s |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    times = f"{row['whole_ms']:.1f} | {row['sum_ms']:.1f} | {row['ratio']:.2f}"
    compiled = f"{row['compile_s']:.1f} | {row['by_hand_compile_s']:.1f}"
    lines.append(f"| {row['case']} | {times} | {shown(row['ratios'])} | {compiled} |")
  lines += ["", "| case | parts (median, ms) |", "|---|---|"]
  for row in rows:
    each = ", ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms"].items())
    lines.append(f"| {row['case']} | {each} |")
  return lines
