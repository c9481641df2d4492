"""Reproduces claims of papers, and compares our numbers with the papers' numbers.

    python experiments/reproduce.py --claim=ef21
    python experiments/reproduce.py --claim=all --scale=quick
    python experiments/reproduce.py --list

The command writes OUT/NAME/result.json (values, gates, spec strings, seeds, commit, versions,
hardware, seconds), table.md and figure.png, and OUT/README.md with a table of all claims in OUT.
Exit codes: 0: all gates hold; 1: a gate fails; 2: a flag is invalid.
"""

import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

from absl import flags, logging

from research.command.errors import one_line_errors
from research.command.flags import define_compilation_cache, define_import, launch
from research.command.start import import_modules, results_folder, use_compilation_cache
from research.core import checks
from research.core.spec import literal, parse
from research.core.text import quoted
from research.training import environment
from research.training.config import UsageError, flag

FLAGS = flags.FLAGS
FOLDER = Path(__file__).parent / "claims"
CLAIMS = sorted(path.stem for path in FOLDER.glob("*.py"))
# Groups of tasks that may replace each other.
KINDS = (("mnist", "digits"), ("tinyshakespeare", "text"))


def module_of(name: str) -> ModuleType:
  """Imports the module of a claim.

  Raises:
    UsageError: if the claim is unknown; the message gives the closest name.
  """
  if name not in CLAIMS:
    raise UsageError(f"--claim='{name}': {checks.unknown(name, ['all', *CLAIMS])}")
  return importlib.import_module(f"experiments.claims.{name}")


def given(texts: list[str]) -> dict[str, Any]:
  """Parses the values of --set=NAME=VALUE.

  Raises:
    UsageError: if a setting is malformed.
  """
  found = {}
  for text in texts:
    name, equals, value = text.partition("=")
    with flag("set", text):
      if not equals:
        raise ValueError("not of the form NAME=VALUE")
      try:
        found[name] = literal(value)
      except ValueError as error:
        raise ValueError(f"{quoted(value)} is not a number, text or list: {error}") from error
  return found


def out_folder(changed: bool) -> Path:
  """Returns the results folder; only unchanged claims at full scale are written to results/."""
  default = "runs/claims" if changed or FLAGS.scale == "quick" else "results"
  return results_folder("out", FLAGS.out, default)


def data_of(name: str, default: str) -> str:
  """Returns the task spec of a claim's data.

  Raises:
    UsageError: if the kind of --dataset differs from the kind of the claim's own data.
  """
  if not FLAGS.dataset:
    return default
  with flag("dataset", FLAGS.dataset):
    if not default:
      raise ValueError(f"the claim {name} generates its own problem")
    call, own = (parse(spec).name for spec in (FLAGS.dataset, default))
    legal = next((kind for kind in KINDS if own in kind), (own,))
    if call not in legal:
      hint = checks.hint(call, legal)
      raise ValueError(f"the claim {name} is not about '{call}'{hint} legal: {', '.join(legal)}")
  return FLAGS.dataset


def seeds_of(name: str, seeds: dict[str, int]) -> int:
  """Returns the number of seeds of a claim.

  Raises:
    UsageError: if --seeds is given for a claim with a single seed.
  """
  with flag("seeds", FLAGS.seeds):
    if FLAGS.seeds and not seeds:
      raise ValueError(f"the claim {name} has one")
  return FLAGS.seeds or seeds.get(FLAGS.scale, 1)


def reproduce(name: str, out: Path) -> bool:
  """Runs one claim and writes the results; returns whether all gates of the claim hold."""
  import jax

  from experiments.claims.support import claim, settings, verdict
  from research.training import folder as folders

  found, sets = module_of(name), given(FLAGS.set)
  numbers = settings.of_claim(found.FULL, found.QUICK, FLAGS.scale, sets)
  dataset, seeds = data_of(name, found.DATASET), seeds_of(name, found.SEEDS)
  elsewhere = dataset != found.DATASET
  print(f"{name}: {found.TITLE}", file=sys.stderr)
  started = time.perf_counter()
  tell = lambda line: print(f"  {line}", file=sys.stderr, flush=True)
  with jax.enable_x64(found.X64):
    lab = claim.Lab(numbers, seeds, dataset, tell)
    findings = found.measure(lab)
  result = {
    "claim": name,
    "title": found.TITLE,
    "command": command(name),
    "scale": FLAGS.scale,
    "dataset": dataset,
    "elsewhere": elsewhere,
    "settings": numbers,
    "seeds": seeds,
    **verdict.values(findings, elsewhere),
    "grids": lab.grids,
    "runs": lab.runs,
    "seconds": round(time.perf_counter() - started, 1),
    "environment": folders.environment(),
  }
  verdict.write(result, findings, out / name)
  print(verdict.table(result))
  return result["verdict"] != "fails"


def command(name: str) -> str:
  """Returns the command of this process, without the output folder."""
  parts = [f"--claim={name}"]
  parts += [f"--scale={FLAGS.scale}"] if FLAGS.scale != "full" else []
  parts += [f'--dataset="{FLAGS.dataset}"'] if FLAGS.dataset else []
  parts += [f"--seeds={FLAGS.seeds}"] if FLAGS.seeds else []
  parts += [f"--set={text}" for text in FLAGS.set]
  return f"python experiments/reproduce.py {' '.join(parts)}"


def main(argv: list[str]) -> None:
  """Runs the selected claims one after another."""
  del argv
  logging.set_verbosity(logging.WARNING)
  if FLAGS.list:
    width = max(map(len, CLAIMS))
    for name in CLAIMS:
      print(f"{name:{width}}  {module_of(name).TITLE}")
    sys.exit(0)
  names = CLAIMS if FLAGS.claim == "all" else FLAGS.claim.split(",")
  with one_line_errors():
    environment.start_jax()
    use_compilation_cache(FLAGS.compilation_cache)
    import_modules()
    for name in names:
      module_of(name)
    if FLAGS.claim == "all" and (FLAGS.dataset or FLAGS.set):
      raise UsageError("--claim=all: --dataset and --set belong to one claim")
    out = out_folder(bool(FLAGS.dataset or FLAGS.set or FLAGS.seeds))
    held = [reproduce(name, out) for name in names]
    from experiments.claims.support import verdict

    verdict.write_overview(out, {name: module_of(name).TITLE for name in CLAIMS})
  sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
  flags.DEFINE_string("claim", "all", "Names of claims, separated by commas, or all.")
  flags.DEFINE_bool("list", False, "Lists the claims and exits.")
  flags.DEFINE_enum("scale", "full", ["full", "quick"], "full: for the record; quick: for CI.")
  flags.DEFINE_string("dataset", "", "Task spec of the data, instead of the claim's own.")
  flags.DEFINE_integer("seeds", 0, "Number of seeds, from 0 on; 0: the claim's own number.", 0)
  flags.DEFINE_multi_string("set", [], "NAME=VALUE: one of the claim's own settings.")
  flags.DEFINE_string("out", "", "Folder; empty: results, or runs/claims if changed or quick.")
  define_compilation_cache()
  define_import()
  launch(main, __doc__)
