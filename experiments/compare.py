"""Trains several methods on one task, and compares the methods' loss, bytes and seconds.

    python experiments/compare.py --seeds=3 --network=100mbit,1ms --recommend --methods="
        data_parallel(sgd(0.1, momentum=0.9), mean());
        data_parallel(sgd(0.1, momentum=0.9), error_feedback(two_phase(int8())))"

The flags are those of run.py, except that --methods, a list separated by ';', replaces --method.
Learning rates are part of the methods. Every method is trained with seeds --seed, --seed + 1, ...
Each run has its own folder under --out, so the same command resumes an interrupted comparison. The
results are written to compare.json, compare.md and compare.png in --out. A method that diverges, or
does not improve on its initial model, stays in the table, but cannot be recommended.
"""

import ast
import hashlib
import math
import sys

from absl import flags

from experiments.reports.outcomes import Conditions, Contender, Outcome, compared, read_curve
from research.command.errors import exit_if_stopped, one_line_errors
from research.command.flags import define_flags, launch
from research.command.start import results_folder, start
from research.core.spec import syntax
from research.training.config import Config, UsageError, flag

FLAGS = flags.FLAGS
OUT = "runs/compare"
DENSE = {"mean", "hierarchical_mean"}  # names of aggregators that do not compress


def split(text: str) -> list[str]:
  """Splits a text at each ';' that is not inside brackets or quotes."""
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


def plans(config: Config, specs: list[str], seeds: int) -> list[Contender]:
  """Builds every run once, so that invalid runs are rejected before any run starts.

  Raises:
    UsageError: if a method is invalid; the message gives the method's position in --methods.
  """
  from research.training import assemble

  if not specs:
    raise UsageError("--methods='': name at least one method, and ';' between two")
  assemble.check(config.replace(method=Config().method))  # checks the flags that methods share
  found = []
  for place, (spec, label) in enumerate(zip(specs, labels(specs), strict=True), 1):
    try:
      if "".join(spec.split()) in ["".join(before.split()) for before in specs[: place - 1]]:
        raise UsageError(f"'{spec}' stands there twice")
      found.append(plan(config.replace(method=spec), label, seeds))
    except UsageError as error:
      raise UsageError(f"method {place} of {len(specs)}: {error}") from error
  return found


def plan(config: Config, label: str, seeds: int) -> Contender:
  """Plans a method's runs, each with its own folder under --out.

  Raises:
    UsageError: if a flag is invalid.
  """
  from research.training import assemble
  from research.training import folder as folders

  setting, spec = assemble.check(config), config.method
  if setting.method.one_by_one and link():
    raise UsageError(f"--network='{FLAGS.network}': a server's pushes cannot be predicted")
  stem = f"{config.out or OUT}/{folder_name(spec)}"
  configs = [
    config.replace(seed=seed, out=f"{stem}-seed={seed}")
    for seed in range(config.seed, config.seed + seeds)
  ]
  for one in configs:
    folders.check(one)
  assemble.assemble(configs[0], setting)
  return Contender(spec, label, set(names(spec, "aggregator")) <= DENSE, configs)


def names(spec: str, *kinds: str) -> list[str]:
  """Returns the registered names of the given kinds that a spec calls, outermost first."""
  from research.core import registry

  legal = {name for kind in kinds for name in registry.names(kind)}
  called = [node.func for node in ast.walk(syntax(spec)) if isinstance(node, ast.Call)]
  return [node.id for node in called if isinstance(node, ast.Name) and node.id in legal]


def folder_name(spec: str) -> str:
  """Returns a folder name that depends only on the spec, not on the other methods."""
  digest = hashlib.sha256(spec.encode()).hexdigest()[:8]
  return "-".join([*names(spec, "method", "aggregator", "compressor"), digest])


def labels(specs: list[str]) -> list[str]:
  """Labels each spec by the arguments that differ between specs, or by the full spec if needed."""
  lines = [" ".join(spec.split()) for spec in specs]
  outer, parts = zip(*map(parts_of, lines), strict=True)
  common = set.intersection(*map(set, parts))
  short = [", ".join(part for part in own if part not in common) for own in parts]
  tell = len(set(outer)) == 1 and all(short) and len(set(short)) == len(short)
  return short if tell else lines


def parts_of(spec: str) -> tuple[str, list[str]]:
  """Returns the name that a spec calls, and the arguments; a malformed spec has no arguments."""
  try:
    call = syntax(spec)
  except ValueError:
    return spec, []
  if not isinstance(call, ast.Call):
    return spec, []
  text = lambda node: ast.get_source_segment(spec, node) or ""
  return text(call.func), [text(part) for part in (*call.args, *call.keywords)]


def trained(plan: Contender) -> Outcome:
  """Trains every seed of a method, or loads finished runs."""
  from research.training import loop

  summaries, folders, diverged = [], [], []
  for config in plan.configs:
    print(f"{plan.label}, seed {config.seed}: {config.out}", file=sys.stderr, flush=True)
    try:
      summary, folder = loop.train(config)
    except loop.NonFinite as error:
      print(error, file=sys.stderr)
      diverged.append(config.seed)
      continue
    exit_if_stopped(summary)
    summaries.append(summary)
    folders.append(folder)
  return Outcome(plan, summaries, read_curve(folders) if folders else None, diverged)


def conditions() -> Conditions:
  """Returns the conditions under which seconds are predicted, from the flags.

  Raises:
    UsageError: if a flag is invalid.
  """
  import jax

  from research.analysis import network

  for name in ("target", "compute_seconds"):
    with flag(name, FLAGS[name].value):
      if not math.isfinite(FLAGS[name].value or 0.0):
        raise ValueError("not a finite number")
  if FLAGS.recommend and not link() and not FLAGS.clock:
    raise UsageError(
      "--recommend: needs the network to recommend for, such as --network=100mbit,20ms"
    )
  if FLAGS.compute_seconds and FLAGS.clock:
    raise UsageError(f"--compute_seconds={FLAGS.compute_seconds}: --clock already determines it")
  with flag("network", FLAGS.network):
    given = network.parse(link()) if link() else None
    known = FLAGS.compute_seconds or (given and given.computing)
    if given and jax.process_count() > 1 and not known:
      raise ValueError(
        "what is measured among several processes holds their communication already; say how long "
        "one worker computes per step by --compute_seconds"
      )
  return Conditions(link(), FLAGS.compute_seconds, FLAGS.clock)


def link() -> str:
  """Returns --network if times are predicted from it; '' if it is a network that is simulated."""
  from research.sim.network import is_simulated

  return "" if is_simulated(FLAGS.network) else FLAGS.network


def main(argv: list[str]) -> None:
  """Checks all runs, trains every method, and writes and prints the comparison."""
  del argv
  with one_line_errors():
    out = results_folder("out", FLAGS.out, OUT)
    config = start().replace(out=str(out))
    if link():
      config = config.replace(network="")
    import jax

    from experiments.reports import comparison
    from research.training.reports import report

    if FLAGS["method"].present:
      raise UsageError(f"--method='{FLAGS.method}': use --methods here")
    with flag("eval_every", config.eval_every):
      if not config.eval_every:
        raise ValueError("a comparison needs evaluations on the way")
    asked = conditions()
    outcomes = [trained(plan) for plan in plans(config, split(FLAGS.methods), FLAGS.seeds)]
    if jax.process_index():
      return
    result = compared(config, outcomes, FLAGS.target, asked)
    result["recommendation"] = comparison.recommendation(result) if FLAGS.recommend else ""
    report.write_json(out / "compare.json", result)
    report.write_text(out / "compare.md", comparison.markdown(result))
    comparison.draw(out / "compare.png", result)
    print(comparison.table(result), *comparison.caption(result), sep="\n")
    if FLAGS.recommend:
      print(result["recommendation"])
    sys.stdout.flush()


def define_own_flags() -> None:
  """Defines the flags of run.py and the flags of a comparison."""
  define_flags()
  flags.DEFINE_string("methods", "", "The methods to compare, separated by ';'.")
  flags.DEFINE_integer("seeds", 1, "Number of seeds per method, from --seed on.", 1)
  FLAGS["network"].help += (
    " Also every worker's link, such as 100mbit,20ms, a file of probe.py, or FILE,LINK, from which "
    "times are predicted."
  )
  flags.DEFINE_float("target", None, "Training loss to reach; none: the lowest that all reach.")
  flags.DEFINE_bool("recommend", False, "Names the method that reaches the target first.")
  text = "Seconds that a worker of the real cluster computes per local step; 0: those of the file "
  text += "of --network, or as measured here."
  flags.DEFINE_float("compute_seconds", 0.0, text, 0.0)


if __name__ == "__main__":
  define_own_flags()
  launch(main, __doc__)
