"""Compiles a round for TPU chips on a machine without TPUs, and reports the use of resources.

    python experiments/compile.py --topology=v5p:2x2x1 --mesh="data:2,fsdp:2" \\
        --task="digits()" --model="mlp(hidden=[1024])" --batch_size=256 \\
        --method="data_parallel(adam(1e-3), mean())"

The flags are those of run.py, and the program is the one that `spmd` would run on these chips. The
command prints memory, FLOPs and collectives per device, and a lower bound on the time of a step at
the chip's peak rates. With --out, the command also writes compile.json and compile.md into that
folder. --sweep compares meshes and methods:

    --sweep="data:4;data:2,fsdp:2 x data_parallel(adam(1e-3), mean());local_sgd(adam(1e-3))"

Exit codes: 0: done; 2: a flag is invalid, or the model does not fit.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import compare
from experiments.reports.compiled import best, comparison, of_run, report
from research.command.errors import fail, one_line_errors
from research.command.flags import define_flags, launch
from research.command.start import results_folder, start
from research.training.config import Config, UsageError

if TYPE_CHECKING:
  from experiments.reports.ahead import Target

FLAGS = flags.FLAGS
# Prevents libtpu from searching for a TPU, and allows several processes to compile at once.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def grid(text: str, config: Config) -> list[Config]:
  """Parses a sweep, 'MESH;MESH x METHOD;METHOD'; an empty side stands for the flag's value.

  Raises:
    UsageError: if the sweep contains only one run.
  """
  first, _, second = f" {text} ".partition(" x ")
  both = itertools.product(
    compare.split(first.strip()) or [config.mesh], compare.split(second.strip()) or [config.method]
  )
  found = [config.replace(mesh=mesh, method=method) for mesh, method in both]
  if len(found) < 2:
    raise UsageError(f"--sweep='{text}': name several meshes or methods, MESH;MESH x METHOD;METHOD")
  return found


def swept(configs: Iterable[Config], target: "Target", effort: float) -> list[dict[str, Any]]:
  """Compiles runs, and returns a row for each run, with an error message if a run is rejected."""
  from experiments.reports import ahead

  rows = []
  for config in configs:
    print(f"compiling {config.mesh} x {config.method}", file=sys.stderr, flush=True)
    try:
      rows.append(ahead.compiled_round(config, target, effort))
    except UsageError as error:
      rows.append({"mesh": config.mesh, "method": config.method, "refused": str(error)})
  if all("refused" in row for row in rows):
    raise UsageError(rows[0]["refused"])
  return rows


def main(argv: list[str]) -> None:
  """Checks the flags, compiles the rounds, and prints and writes the report."""
  del argv
  if importlib.util.find_spec("libtpu") is None:
    fail(2, 'compiling for TPU chips needs their compiler: pip install -e ".[tpu]"')
  if FLAGS.executor != "spmd":
    fail(2, f"--executor='{FLAGS.executor}': only spmd is compiled for chips")
  os.environ.update(ENVIRONMENT)
  with one_line_errors():
    out = results_folder("out", FLAGS.out) if FLAGS.out else None
    config = start().replace(rounds=1, epochs=0.0, clock="", network="", virtual_seconds=0.0)
    configs = grid(FLAGS.sweep, config) if FLAGS.sweep else [config]
    from experiments.reports import ahead

    place = ahead.target(FLAGS.topology, FLAGS.slices)
    if FLAGS.sweep:
      rows = swept(configs, place, FLAGS.effort)
      found = {name: getattr(config, name) for name in ("task", "model", "batch_size")}
      found |= {"effort": FLAGS.effort, "rows": rows, "best": best(rows)}
      text = f"{of_run(found, place)}\n\n{comparison(rows)}"
    else:
      found = ahead.compiled_round(config, place, FLAGS.effort)
      text = report(found, place)
    if out:
      _write(out, found, text, place)
    print(text, flush=True)


def _write(folder: Path, found: dict[str, Any], text: str, target: "Target") -> None:
  from research.training import folder as folders
  from research.training.reports.report import write_json, write_text

  folder.mkdir(parents=True, exist_ok=True)
  described = {
    "topology": target.topology,
    "slices": target.slices,
    "chip": target.chip._asdict(),
    **found,
    "libtpu": _version("libtpu"),
    "environment": folders.environment(),
  }
  write_json(folder / "compile.json", described)
  write_text(folder / "compile.md", text + "\n")


def _version(package: str) -> str:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(package)
  return ""


if __name__ == "__main__":
  define_flags()
  FLAGS.set_default("executor", "spmd")
  FLAGS.set_default("compilation_cache", "off")
  flags.DEFINE_string("topology", "v5e:2x4", "Chip and dimensions of a slice, such as v5p:8x8x8.")
  flags.DEFINE_integer("slices", 1, "Number of slices, which is the mesh's size along 'slice'.", 1)
  flags.DEFINE_float(
    "effort", 0.0, "Effort of the compiler: 0: as for a run; -1: a third of the time.", -1, 1
  )
  flags.DEFINE_string("sweep", "", "Meshes and methods to compare: MESH;MESH x METHOD;METHOD.")
  launch(main, __doc__)
