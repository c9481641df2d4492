"""Ranks methods for a model, a number of workers and a network, and says why each one loses.

    python experiments/advise.py --model=1b --workers=8 --chips=8 --network=1gbit,20ms

--model is a preset of transformer, a size of the parameters such as 500MB, or a folder with a
model's .safetensors files. A local step takes 6 FLOPs per parameter and token (or --flops) on
--chips chips at a share of their peak, or --compute_seconds. --network is a link such as
100mbit,20ms, or a file of probe.py, which also contains the times of encoding. --priority=time
ranks by the time to the target; bytes and memory rank by these; privacy, faulty and unlike exclude
methods that do not serve private data, faulty peers, or workers of unlike speed.

The step time is predicted by research/analysis/cost.py. How many steps a method needs comes from
recorded results, which the table names. --json writes the ranking, and all numbers that it depends
on, to a file. --methods adds methods of your own, also from --import.
"""

import statistics
import sys
from typing import Any

from absl import flags, logging

from experiments.compare import split
from experiments.reports.advice import PRIORITIES
from research.command.errors import one_line_errors
from research.command.flags import define_import, launch
from research.command.start import import_modules
from research.core import checks, paths
from research.training.config import flag

FLAGS = flags.FLAGS


def computing(parameters: int, known: float) -> tuple[float, str]:
  """Returns the seconds of computation per local step, and where the number comes from.

  Args:
    parameters: the number of parameters of the model.
    known: seconds per step that the network's file contains, or 0.

  Raises:
    UsageError: if a flag is invalid.
  """
  from research.analysis import chips

  with flag("utilization", FLAGS.utilization):
    checks.in_range("utilization", FLAGS.utilization, "(0, 1]")
  with flag("compute_seconds", FLAGS.compute_seconds):
    checks.in_range("compute_seconds", FLAGS.compute_seconds, "[0, inf)")
  if FLAGS.compute_seconds:
    return FLAGS.compute_seconds, "as given"
  if known:
    return known, "as measured by the probe"
  with flag("chip", FLAGS.chip):
    checks.one_of("chip", FLAGS.chip, chips.CHIPS)
  with flag("flops", FLAGS.flops):
    checks.in_range("flops", FLAGS.flops, "[0, inf)")
  work = FLAGS.flops or 6.0 * parameters * FLAGS.tokens
  rate = FLAGS.chips * chips.CHIPS[FLAGS.chip].flops * FLAGS.utilization
  at = f"{FLAGS.chips} {FLAGS.chip} at {FLAGS.utilization:.0%} of their peak"
  return work / rate, f"{work:.3g} FLOPs on {at}"


def table(rows: list[dict[str, Any]]) -> str:
  """Formats the ranking as a Markdown table.

  Args:
    rows: the result of `advice.ranked`.
  """
  has_board = any(row["losses"] for row in rows)
  lines = [
    "| | method | ms per step | bytes per step | steps over the exact average's | "
    "ms per step of the exact average (range) | GB of state | steps from |"
    f"{' loss on the leaderboard (range) |' if has_board else ''} why |"
  ]
  lines.append("|---" * (9 + has_board) + "|")
  for place, row in enumerate(rows, 1):
    ratio, times = "", ""
    if row["seconds"] is not None:
      span = f"{1000 * row['seconds_low']:.4g} to {1000 * row['seconds_high']:.4g}"
      ratio, times = f"{row['ratio']:.2f}", f"{1000 * row['seconds']:.4g} ({span})"
    cells = ["-" if row["excluded"] else str(place), row["name"]]
    cells += [f"{1000 * row['step_seconds']:.4g}", f"{row['bytes_per_step']:,.0f}", ratio, times]
    cells += [f"{row['memory_bytes'] / 1e9:.3g}", row["source"]]
    cells += [_losses(row["losses"])] * has_board
    lines.append(f"| {' | '.join([*cells, row['why']])} |")
  return "\n".join(lines)


def _losses(found: list[float]) -> str:
  if not found:
    return ""
  return f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def command(row: dict[str, Any], workers: int) -> str:
  """Returns the command that trains with the method of a row."""
  server = f"--executor=server --workers={workers}"
  where = server if row["spec"].startswith("asgd") else f"--executor=spmd --mesh=data:{workers}"
  return f'python experiments/run.py {where} --method="{row["spec"]}"'


def main(argv: list[str]) -> None:
  """Prints the advice, the ranking and the commands."""
  del argv
  with one_line_errors():
    logging.set_verbosity(logging.WARNING)
    import_modules()
    import jax

    from experiments.reports import advice, options
    from research.analysis import network as networks
    from research.core import registry
    from research.training.reports import report

    with flag("model", FLAGS.model):
      shapes = options.shapes_of(FLAGS.model)
    with flag("network", FLAGS.network):
      network = networks.parse(FLAGS.network)
    place = None
    if FLAGS.json:
      with flag("json", FLAGS.json):
        place = paths.local(FLAGS.json)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    seconds, origin = computing(size, network.computing)
    tell = lambda name: print(f"tracing {name}", file=sys.stderr, flush=True)
    with flag("methods", FLAGS.methods):
      more = split(FLAGS.methods)
      for spec in more:
        registry.build("method", spec)
    found = options.options(shapes, FLAGS.workers, network, tell, more)
    rows = advice.ranked(
      found, network, workers=FLAGS.workers, computing=seconds, priority=FLAGS.priority
    )
    print(advice.verdict(rows, FLAGS.priority))
    print(
      f"\n{size:,} parameters, {FLAGS.workers} workers, {FLAGS.network}; computing takes "
      f"{seconds:.3g} s per step ({origin}).\n"
    )
    print(table(rows))
    if not network.kernels:
      print("\nEncoding costs nothing here: no file of probe.py says what it costs.")
    print("\nTo run them, with --task and --model:\n")
    print("\n".join(f"{row['name']}: {command(row, FLAGS.workers)}" for row in rows))
    if place:
      asked = {"parameters": size, "workers": FLAGS.workers, "computing": seconds}
      asked |= {"network": network.as_dict(), "priority": FLAGS.priority}
      chosen = {"verdict": advice.verdict(rows, FLAGS.priority), "rows": rows}
      chosen["options"] = [{**one._asdict(), "load": one.load._asdict()} for one in found]
      report.write_json(place, asked | chosen)


def define_own_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("model", "1b", "Preset of transformer, size such as 500MB, or model folder.")
  flags.DEFINE_integer("workers", 8, "Number of workers.", 2)
  flags.DEFINE_integer("chips", 1, "Chips per worker.", 1)
  flags.DEFINE_string("chip", "v5e", "Type of the chips.")
  flags.DEFINE_float("utilization", 0.4, "Share of the chips' peak rate.")
  flags.DEFINE_integer("tokens", 2**16, "Tokens per worker and local step.", 1)
  flags.DEFINE_float("flops", 0.0, "FLOPs per worker and local step; 0: 6 per parameter and token.")
  flags.DEFINE_float("compute_seconds", 0.0, "Seconds of computation per local step, if known.")
  flags.DEFINE_string("network", "1gbit,1ms", "A link, a file of probe.py, or FILE,LINK.")
  flags.DEFINE_enum("priority", "time", PRIORITIES, "What matters.")
  flags.DEFINE_string("methods", "", "Further methods to rank, separated by ';'.")
  flags.DEFINE_string("json", "", "File for the ranking and the numbers that it depends on.")
  define_import()


if __name__ == "__main__":
  define_own_flags()
  launch(main, __doc__)
