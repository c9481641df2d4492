"""Trains several methods on one task and holds them against each other: loss, bytes, seconds.

    python experiments/compare.py --seeds=3 --link=100mbit,1ms --recommend --methods="
        data_parallel(sgd(0.1, momentum=0.9), mean());
        data_parallel(sgd(0.1, momentum=0.9), error_feedback(two_phase(int8())))"

Takes the flags of run.py; --methods, separated by ';', stands in place of --method, and learning
rates belong to the methods. Every method is trained with seeds --seed, --seed + 1, ..., each run in
its own folder under --out, so that the same command goes on where it stopped. Writes compare.json,
compare.md and compare.png there. A method that diverges stays in the table and cannot win.
"""

import ast
import hashlib
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments import run
from research.train.config import Config, UsageError, flag

FLAGS = flags.FLAGS
OUT = "runs/compare"
DENSE = {"mean", "hierarchical_mean"}  # aggregators that do not compress


class Plan(NamedTuple):
  """A method and the runs that it is judged by."""

  spec: str
  label: str  # the part of the spec that sets it apart from the others
  dense: bool
  configs: list[Config]  # by seed


class Curve(NamedTuple):
  """The evaluations of a method's runs."""

  steps: np.ndarray  # [n]
  sent: np.ndarray  # [n] bytes by a worker so far
  losses: np.ndarray  # [seeds, n] of all training data
  virtual: np.ndarray  # [n] mean seconds on the clock; not a number without one

  @property
  def best(self) -> np.ndarray:
    """[n], the mean over seeds of the least loss so far."""
    return np.minimum.accumulate(self.losses, 1).mean(0)


class Outcome(NamedTuple):
  """What became of a plan; summaries and curve are of the runs that did not diverge."""

  plan: Plan
  summaries: list[dict[str, Any]]
  curve: Curve | None
  diverged: list[int]  # seeds


class Conditions(NamedTuple):
  """What seconds are predicted for."""

  link: str  # as the flag says it; empty: none
  compute_seconds: float  # per local step of one worker; 0: as measured
  clock: str  # as the flag says it; empty: none

  @property
  def place(self) -> str:
    """Where seconds to the target are counted; empty: nowhere."""
    return " and ".join(filter(None, (self.link, self.clock and "the virtual clock")))


# ---- what is trained


def split(text: str) -> list[str]:
  """The parts between those ';' that stand in no bracket and no quotes."""
  parts, depth, quote = [""], 0, ""
  for character in text:
    if quote:
      quote = "" if character == quote else quote
    elif character in "'\"":
      quote = character
    else:
      depth += (character in "([{") - (character in ")]}")
    if character == ";" and not quote and depth <= 0:
      parts.append("")
    else:
      parts[-1] += character
  parts = [part.strip() for part in parts]
  return parts if parts[-1] else parts[:-1]


def plans(config: Config, specs: list[str], seeds: int) -> list[Plan]:
  """The runs to train, each one built once, so that what cannot be is refused before any starts.

  Raises:
    UsageError: one line, with the place of the method that it is about.
  """
  from research.train import assemble

  if not specs:
    raise UsageError("--methods='': name at least one method, and ';' between two")
  assemble.check(config._replace(method=Config().method))  # what is wrong with any method
  found = []
  for place, (spec, label) in enumerate(zip(specs, labels(specs), strict=True), 1):
    try:
      if "".join(spec.split()) in ["".join(before.split()) for before in specs[: place - 1]]:
        raise UsageError(f"'{spec}' stands there twice")
      found.append(plan(config._replace(method=spec), label, seeds))
    except UsageError as error:
      raise UsageError(f"method {place} of {len(specs)}: {error}") from error
  return found


def plan(config: Config, label: str, seeds: int) -> Plan:
  """A method's runs, a folder each under --out.

  Raises:
    UsageError: one line.
  """
  from research.train import assemble
  from research.train import folder as folders

  setting, spec = assemble.check(config), config.method
  if setting.method.one_by_one and FLAGS.link:
    raise UsageError(f"--link='{FLAGS.link}': a server's pushes are no collectives, not predicted")
  stem = Path(config.out or OUT) / folder_name(spec)
  configs = [
    config._replace(seed=seed, out=f"{stem}-seed={seed}")
    for seed in range(config.seed, config.seed + seeds)
  ]
  for one in configs:
    folders.check(one)
  assemble.assemble(configs[0], setting)
  return Plan(spec, label, set(names(spec, "aggregator")) <= DENSE, configs)


def names(spec: str, *kinds: str) -> list[str]:
  """The registered names of some kinds that a spec calls, from the outside in."""
  from research import registry

  legal = {name for kind in kinds for name in registry.TABLE[kind]}
  called = [node.func for node in ast.walk(ast.parse(spec)) if isinstance(node, ast.Call)]
  return [node.id for node in called if isinstance(node, ast.Name) and node.id in legal]


def folder_name(spec: str) -> str:
  """The same spec always means the same folder, whatever it is compared with."""
  digest = hashlib.sha256(spec.encode()).hexdigest()[:8]
  return "-".join([*names(spec, "method", "aggregator", "compressor"), digest])


def labels(specs: list[str]) -> list[str]:
  """Of each spec, the arguments that not all have, or all of it where these do not tell."""
  lines = [" ".join(spec.split()) for spec in specs]
  outer, parts = zip(*map(parts_of, lines), strict=True)
  common = set.intersection(*map(set, parts))
  short = [", ".join(part for part in own if part not in common) for own in parts]
  tell = len(set(outer)) == 1 and all(short) and len(set(short)) == len(short)
  return short if tell else lines


def parts_of(spec: str) -> tuple[str, list[str]]:
  """The name that a spec calls, and its arguments; none of what is malformed."""
  try:
    call = ast.parse(spec, mode="eval").body
  except SyntaxError:
    return spec, []
  if not isinstance(call, ast.Call):
    return spec, []
  text = lambda node: ast.get_source_segment(spec, node) or ""
  return text(call.func), [text(part) for part in (*call.args, *call.keywords)]


def trained(plan: Plan) -> Outcome:
  """Trains, or finds trained, every seed of a method."""
  from research.train import loop

  summaries, folders, diverged = [], [], []
  for config in plan.configs:
    print(f"{plan.label}, seed {config.seed}: {config.out}", file=sys.stderr, flush=True)
    try:
      summary, folder = loop.train(config)
    except loop.NonFinite as error:
      print(error, file=sys.stderr)
      diverged.append(config.seed)
      continue
    if summary["stopped_because"] not in ("steps", "converged"):
      sys.exit(130 if summary["stopped_because"] == "interrupted" else 0)
    summaries.append(summary)
    folders.append(folder)
  return Outcome(plan, summaries, read_curve(folders) if folders else None, diverged)


def read_curve(folders: list[Path]) -> Curve:
  """The evaluations in some runs' metrics.jsonl; a run that converged stays where it ended."""
  from research.train import report

  runs = []
  for folder in folders:
    rows = [row for row in report.read_rows(folder / "metrics.jsonl") if "train_loss" in row]
    names = ("step", "bytes", "train_loss", "virtual_seconds")
    runs.append(np.array([[row.get(name, math.nan) for name in names] for row in rows]))
  steps = np.unique(np.concatenate([found[:, 0] for found in runs]))
  longest = max(runs, key=len)
  of = lambda column: np.stack([np.interp(steps, found[:, 0], found[:, column]) for found in runs])
  sent = np.interp(steps, longest[:, 0], longest[:, 1])
  return Curve(steps, sent, of(2), of(3).mean(0))


# ---- how they compare


def common_target(outcomes: list[Outcome]) -> float | None:
  """The greatest of the methods' mean best losses, which all that did not diverge reach."""
  ends = [float(o.curve.best[-1]) for o in outcomes if o.curve and not o.diverged]
  return max(filter(math.isfinite, ends), default=None)


def steps_to(curve: Curve, target: float) -> float | None:
  """Where the best loss falls to the target, on straight lines between evaluations."""
  best = curve.best
  below = np.flatnonzero(best <= target)
  if not below.size:
    return None
  around = slice(max(below[0] - 1, 0), below[0] + 1)
  return float(np.interp(-target, -best[around], curve.steps[around]))


def figures(outcome: Outcome, target: float | None, conditions: Conditions) -> dict[str, Any]:
  """A method's figures: means over the seeds that did not diverge, without those there are not."""
  plan, summaries, curve, diverged = outcome
  found: dict[str, Any] = {
    "method": plan.spec,
    "label": plan.label,
    "dense": plan.dense,
    "folders": [config.out for config in plan.configs],
    "diverged_seeds": diverged,
  }
  if curve is None:
    return found
  wire = summaries[0]["wire"]
  by_axis, dense = wire["bytes_per_step_per_worker"], wire["dense_bytes_per_step_per_worker"]
  sent = sum(by_axis.values())
  counted = {"bytes_per_step_per_worker": sent, "ratio_to_dense": sent / dense if dense else 1.0}
  found |= counted if by_axis else {}  # those of a server are not counted
  found |= {
    "train_loss": statistics.mean(s["train_loss"] for s in summaries),
    "steps_per_second": statistics.median(s["steps_per_second"] for s in summaries),
    "curve": {name: value.tolist() for name, value in curve._asdict().items()},
  }
  accuracies = [s["eval"]["accuracy"] for s in summaries if "accuracy" in s["eval"]]
  if accuracies:
    measures = {"mean": statistics.mean, "least": min, "greatest": max}
    found |= {f"accuracy_{name}": of(accuracies) for name, of in measures.items()}
  found |= step_seconds(summaries, conditions)
  computing, waiting = found["compute_seconds_per_step"], found["latency_seconds_per_step"]
  of_bytes = found["seconds_per_step"] - computing - waiting  # of a mean step; early ones vary
  computed = curve.virtual if conditions.clock else curve.steps * computing
  seconds = computed + curve.steps * waiting + curve.sent * (of_bytes / sent if sent else 0.0)
  found["curve"]["seconds"] = seconds.tolist()
  if target is not None and not diverged:
    reached = to_target(curve, target, seconds if conditions.place else None)
    found |= {k: v for k, v in reached.items() if by_axis or k != "bytes_to_target"}
  return found


def to_target(curve: Curve, target: float, seconds: np.ndarray | None) -> dict[str, Any]:
  """Steps to the target, the bytes that a worker has sent until then and the seconds it takes."""
  steps = steps_to(curve, target)
  if steps is None:
    return {}
  found = {
    "steps_to_target": steps,
    "at_first_evaluation": steps == float(curve.steps[0]),
    "bytes_to_target": float(np.interp(steps, curve.steps, curve.sent)),
  }
  if seconds is not None:
    found["seconds_to_target"] = float(np.interp(steps, curve.steps, seconds))
  return found


def step_seconds(summaries: list[dict[str, Any]], conditions: Conditions) -> dict[str, float]:
  """Of a mean local step: seconds of computing, of latency on the link if any, and in all."""
  from research.comm import cost
  from research.comm import mesh as meshes

  measured = 1 / statistics.median(s["steps_per_second"] for s in summaries)
  computing, waiting, talking = conditions.compute_seconds or measured, 0.0, 0.0
  if conditions.clock:
    computing = statistics.mean(s["virtual_seconds"] / s["steps"] for s in summaries)
  if conditions.link:
    axes, link = meshes.parse_mesh(summaries[0]["mesh"]), cost.parse_link(conditions.link)
    rows = summaries[0]["wire"]["transfers"]
    talking = cost.seconds(rows, axes, link)
    waiting = cost.seconds(rows, axes, link._replace(bits_per_second=math.inf))
  return {
    "compute_seconds_per_step": computing,
    "communication_seconds_per_step": talking,
    "latency_seconds_per_step": waiting,
    "seconds_per_step": computing + talking,
  }


def compared(
  config: Config, outcomes: list[Outcome], wanted: float | None, conditions: Conditions
) -> dict[str, Any]:
  """The contents of compare.json, but for the recommendation."""
  from research.comm import mesh as meshes
  from research.train import folder as folders

  target = common_target(outcomes) if wanted is None else wanted
  given = {name: value for name, value in config._asdict().items() if name not in ("method", "out")}
  return given | {
    "workers": meshes.count(meshes.worker_axes(meshes.parse_mesh(config.mesh))),
    "seeds": [one.seed for one in outcomes[0].plan.configs],
    "evaluated_on": next((o.summaries[0]["evaluated_on"] for o in outcomes if o.summaries), "test"),
    **conditions._asdict(),
    "place": conditions.place,
    "target": target,
    "target_is": "the greatest of the methods' least losses" if wanted is None else "as given",
    "methods": [figures(outcome, target, conditions) for outcome in outcomes],
    "env": folders.environment(),
  }


def conditions() -> Conditions:
  """What the flags say that seconds are for.

  Raises:
    UsageError: one line.
  """
  import jax

  from research.comm import cost

  for name in ("target", "compute_seconds"):
    with flag(name, FLAGS[name].value):
      if not math.isfinite(FLAGS[name].value or 0.0):
        raise ValueError("not a finite number")
  if FLAGS.recommend and not FLAGS.link and not FLAGS.clock:
    raise UsageError("--recommend: needs the link to recommend for, such as --link=100mbit,20ms")
  if FLAGS.compute_seconds and FLAGS.clock:
    raise UsageError(f"--compute_seconds={FLAGS.compute_seconds}: --clock says it already")
  with flag("link", FLAGS.link):
    if FLAGS.link:
      cost.parse_link(FLAGS.link)
    if FLAGS.link and jax.process_count() > 1 and not FLAGS.compute_seconds:
      raise ValueError(
        "what is measured among several processes holds their communication already; say how long "
        "one worker computes per step by --compute_seconds"
      )
  return Conditions(FLAGS.link, FLAGS.compute_seconds, FLAGS.clock)


def main(argv: list[str]) -> None:
  """Checks everything, trains every method, writes and prints how they compare."""
  del argv
  with run.one_line_errors():
    config = run.start()
    import jax

    from experiments import comparison
    from research.train import report

    if FLAGS["method"].present:
      raise UsageError(f"--method='{FLAGS.method}': goes into --methods here")
    with flag("eval_every", config.eval_every):
      if not config.eval_every:
        raise ValueError("a comparison needs evaluations on the way")
    asked = conditions()
    outcomes = [trained(plan) for plan in plans(config, split(FLAGS.methods), FLAGS.seeds)]
    if jax.process_index():
      return
    result = compared(config, outcomes, FLAGS.target, asked)
    result["recommendation"] = comparison.recommendation(result) if FLAGS.recommend else ""
    out = Path(config.out or OUT).expanduser()
    report.write_json(out / "compare.json", result)
    (out / "compare.md").write_text(comparison.markdown(result))
    comparison.draw(out / "compare.png", result)
  print(comparison.table(result), *comparison.caption(result), sep="\n")
  if FLAGS.recommend:
    print(result["recommendation"])


def define_flags() -> None:
  """Those of run.py and what a comparison is told beside them."""
  run.define_flags()
  flags.DEFINE_string("methods", "", "The methods to compare, separated by ';'.")
  flags.DEFINE_integer("seeds", 1, "How many seeds to train each with, from --seed on.", 1)
  flags.DEFINE_string("link", "", "A worker's link, BANDWIDTH[,LATENCY]: 100mbit,20ms.")
  flags.DEFINE_float("target", None, "Training loss to reach; none: the one that all reach.")
  flags.DEFINE_bool("recommend", False, "Names what reaches the target first on --link.")
  text = "Seconds that a worker of the real cluster computes per local step; 0: as measured here."
  flags.DEFINE_float("compute_seconds", 0.0, text, 0.0)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=run.parse_flags)
