"""Compiles a run's round for TPU chips on a machine without TPUs, and reports its resource use.

    python experiments/compile.py --topology=v5p:2x2x1 --mesh="data:2,fsdp:2" \\
        --task="digits()" --model="mlp(hidden=[1024])" --batch_size=256 \\
        --method="data_parallel(adam(1e-3), mean())"

Takes the flags of run.py; the program is the one that `spmd` runs there. Prints memory, FLOPs and
collectives per device, and a lower bound on the time of a step at the chip's peak rates; with --out
also writes compile.json and compile.md into that folder. --sweep compares meshes and methods:

    --sweep="data:4;data:2,fsdp:2 x data_parallel(adam(1e-3), mean());local_sgd(adam(1e-3))"

Exit codes: 0 done; 2 an invalid flag, or a model that does not fit.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import compare
from research.analysis import chips
from research.command.errors import fail, one_line_errors
from research.command.flags import define_flags, launch
from research.command.start import results_folder, start
from research.training.config import Config, UsageError

if TYPE_CHECKING:
  from experiments.reports.ahead import Target

FLAGS = flags.FLAGS
# Keeps libtpu from looking for a TPU, and allows several processes to compile at once.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


# ---- the report


def of_bytes(amount: float) -> str:
  for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if abs(amount) >= size:
      return f"{amount / size:.2f} {unit}"
  return f"{amount:.0f} B"


def of_rate(amount: float) -> str:
  return f"{amount / 1e9:.4g} GB/s"


def of_seconds(amount: float | None) -> str:
  if amount is None:
    return "not known"
  for size, unit in ((1, "s"), (1e-3, "ms")):
    if amount >= size:
      return f"{amount / size:.3g} {unit}"
  return f"{amount * 1e6:.3g} us"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """A Markdown table with aligned columns."""
  lines = [list(header), *map(list, rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  lines.insert(1, ["-" * width for width in widths])
  padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
  return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def report(found: dict[str, Any], target: "Target") -> str:
  """The report of one compiled round, as tables."""
  unread = found["collectives_unread"]
  return "\n\n".join(
    (
      of_run(found, target),
      memory(found["memory"]),
      traffic(found["collectives"], target.slices)
      or (f"collectives: not read: {unread}" if unread else "collectives: none"),
      times(found, target),
      summary(found),
    )
  )


def of_run(found: dict[str, Any], target: "Target") -> str:
  """The compiled run as flags; for a sweep the flags that its rows share."""
  chosen = {"topology": target.topology, **({"slices": target.slices} if target.slices > 1 else {})}
  names = ("mesh", "task", "model", "method", "batch_size")
  chosen |= {name: found[name] for name in names if name in found}
  chosen |= {"effort": found["effort"]} if found["effort"] else {}
  quoted = lambda text: f'"{text}"' if not set(text) & set('"$`\\!') else shlex.quote(text)
  return "\n".join(f"    --{name}={quoted(str(value))}" for name, value in chosen.items())


def memory(found: dict[str, Any]) -> str:
  """Memory by kind; the kinds add up to what is used."""
  held = found["of_arguments"]
  kinds = {
    f"arguments (state {of_bytes(held['state'])}, examples {of_bytes(held['examples'])})": found[
      "arguments"
    ],
    "results beside the new state, which takes the old one's place": found["outputs"]
    - found["aliased"],
    "temporaries (gradients, activations, buffers)": found["temporaries"],
    "code": found["code"],
    "used": found["used"],
    f"left of {of_bytes(found['hbm'])}": found["hbm"] - found["used"],
  }
  share = lambda amount: f"{amount / found['hbm']:.1%}"
  rows = ((name, of_bytes(amount), share(amount)) for name, amount in kinds.items())
  return table(("memory", "per chip", "of HBM"), rows)


def times(found: dict[str, Any], target: "Target") -> str:
  """The four times of a step; the longest is the bound."""
  roof, chip = found["roofline"], target.chip
  links = chips.links(target.shape)
  network = of_rate(chip.dcn) if chip.dcn else "not published"
  sent = lambda amount: "not known" if amount is None else of_bytes(amount)
  rows = (
    ("compute", f"{found['flops']['run']:.4g} FLOPs", f"{chip.flops:.4g} FLOP/s"),
    ("HBM", of_bytes(found["hbm_bytes"]), of_rate(chip.hbm_bandwidth)),
    ("ICI", sent(roof["ici_bytes"]), f"{links} x {of_rate(chip.link)}"),
    ("DCN", sent(roof["dcn_bytes"]), network),
  )
  return table(
    ("of a step", "per chip", "peak", "takes at least"),
    ((*row, of_seconds(roof["seconds"][row[0].lower()])) for row in rows),
  )


def traffic(collectives: Iterable[dict[str, Any]], slices: int) -> str:
  """Collectives by operation, axis and dtype, sorted by bytes sent, descending."""
  rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
  for row in collectives:
    crosses = (("yes" if row["crosses_slices"] else "no"),) * (slices > 1)
    rows.setdefault((row["operation"], row["axis"], row["dtype"], *crosses), []).append(row)
  sent = lambda alike: sum(row["sent_bytes"] * row["times"] for row in alike)
  lines = [
    [
      *key,
      of_bytes(max(row["payload_bytes"] for row in alike)),
      of_bytes(sent(alike)),
      f"{sum(row['times'] for row in alike):.4g}",
    ]
    for key, alike in sorted(rows.items(), key=lambda item: -sent(item[1]))
  ]
  columns = ("crosses slices",) * (slices > 1)
  header = ("collective", "axis", "dtype", *columns, "largest payload")
  return table((*header, "sent per step", "times per step"), lines) if lines else ""


def summary(found: dict[str, Any]) -> str:
  """The bound in words, and what it includes."""
  roof, flops, seconds = found["roofline"], found["flops"], found["seconds"]
  rest = f"; not known: {', '.join(roof['left_out'])}" if roof["left_out"] else ""
  steps = found["steps_per_round"]
  round_ = "1 step" if steps == 1 else f"{steps} steps, which share what it does once"
  by = roof["bound_by"] if roof["bound_by"] == "compute" else roof["bound_by"].upper()
  return (
    f"A step takes at least {of_seconds(roof['seconds_per_step'])} ({by}{rest}): the "
    f"MFU is at most {roof['mfu']:.1%}.\n"
    "That is the longest of the four, as if the others ran beside it. HBM counts the state and the "
    "activations that loops carry from turn to turn, and nothing else; compute what is run, the "
    f"MFU the {flops['needed']:.4g} FLOPs that the model needs, nothing computed twice.\n"
    f"A round has {round_}. Lowered in {seconds['lowering']:.1f} s, compiled in "
    f"{seconds['compiling']:.1f} s."
  )


# ---- several meshes and methods


def grid(text: str, config: Config) -> list[Config]:
  """Parses a sweep, 'MESH;MESH x METHOD;METHOD'; an empty side takes the flag's value.

  Raises:
    UsageError: if there is only one run.
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
  """Compiles each run to a row; rejected runs get their error message instead of figures."""
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


def best(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
  """The row with the lowest bound, among those with all times known; ties go to less memory."""
  known = [row for row in rows if "refused" not in row and not row["roofline"]["left_out"]]
  order = lambda row: (row["roofline"]["seconds_per_step"], row["memory"]["used"])
  return min(known, key=order, default=None)


def comparison(rows: list[dict[str, Any]]) -> str:
  """A table with one line per run, and the best run."""
  lines, notes = [], []
  for row in rows:
    if "refused" in row:
      lines.append([row["mesh"], row["method"], *["-"] * 8])
      notes.append(f"{row['mesh']} x {row['method']}: {row['refused']}")
      continue
    roof, memory = row["roofline"], row["memory"]
    times = [of_seconds(roof["seconds"][name]) for name in ("compute", "hbm", "ici", "dcn")]
    lines.append(
      [
        row["mesh"],
        row["method"],
        of_bytes(memory["used"]),
        f"{memory['left']:.1%}",
        *times,
        of_seconds(roof["seconds_per_step"]),
        f"{roof['mfu']:.1%}",
      ]
    )
  found = best(rows)
  header = ("mesh", "method", "used", "left", "compute", "HBM", "ICI", "DCN", "step", "MFU")
  winner = f"best: --mesh='{found['mesh']}' --method='{found['method']}'" if found else "none"
  return "\n\n".join((table(header, lines), *notes, f"{winner} (least time of a step)"))


# ---- the command


def main(argv: list[str]) -> None:
  """Checks, compiles, prints and writes."""
  del argv
  if importlib.util.find_spec("libtpu") is None:
    fail(2, 'compiling for TPU chips needs their compiler: pip install -e ".[tpu]"')
  if FLAGS.executor != "spmd":
    fail(2, f"--executor='{FLAGS.executor}': what is compiled for chips is spmd")
  os.environ.update(ENVIRONMENT)
  with one_line_errors():
    out = results_folder("out", FLAGS.out) if FLAGS.out else None
    config = start().replace(rounds=1, epochs=0.0, clock="", virtual_seconds=0.0)
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
  from research.training.reports import report

  folder.mkdir(parents=True, exist_ok=True)
  described = {
    "topology": target.topology,
    "slices": target.slices,
    "chip": target.chip._asdict(),
    **found,
    "libtpu": _version("libtpu"),
    "environment": folders.environment(),
  }
  report.write_json(folder / "compile.json", described)
  report.write_text(folder / "compile.md", text + "\n")


def _version(package: str) -> str:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(package)
  return ""


if __name__ == "__main__":
  define_flags()
  FLAGS.set_default("executor", "spmd")
  FLAGS.set_default("compilation_cache", "off")
  flags.DEFINE_string("topology", "v5e:2x4", "Chip and sides of a slice, such as v5p:8x8x8.")
  flags.DEFINE_integer("slices", 1, "How many such slices: the size of the mesh's 'slice'.", 1)
  flags.DEFINE_float(
    "effort", 0.0, "Of the compiler, 0 as for a run; -1 takes a third of the time.", -1, 1
  )
  flags.DEFINE_string("sweep", "", "MESH;MESH x METHOD;METHOD: compares them; empty: no.")
  launch(main, __doc__)
