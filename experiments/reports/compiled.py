"""Formats tables of compiled rounds: memory, times, traffic, and a comparison of several runs.

The functions format results of `ahead.compiled_round`.
"""

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from research.analysis import chips

if TYPE_CHECKING:
  from experiments.reports.ahead import Target


def of_bytes(amount: float) -> str:
  """Formats a number of bytes, as in '1.50 GiB'."""
  for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if abs(amount) >= size:
      return f"{amount / size:.2f} {unit}"
  return f"{amount:.0f} B"


def of_rate(amount: float) -> str:
  """Formats bytes per second, as in '1.2 GB/s'."""
  return f"{amount / 1e9:.4g} GB/s"


def of_seconds(amount: float | None) -> str:
  """Formats a time in seconds, as in '1.5 ms'."""
  if amount is None:
    return "not known"
  for size, unit in ((1, "s"), (1e-3, "ms")):
    if amount >= size:
      return f"{amount / size:.3g} {unit}"
  return f"{amount * 1e6:.3g} us"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Formats a Markdown table with aligned columns."""
  lines = [list(header), *map(list, rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  lines.insert(1, ["-" * width for width in widths])
  padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
  return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def report(found: dict[str, Any], target: "Target") -> str:
  """Formats the report of one compiled round as tables."""
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
  """Formats the compiled run as flags; for a sweep, the flags that all rows share."""
  chosen = {"topology": target.topology, **({"slices": target.slices} if target.slices > 1 else {})}
  names = ("mesh", "task", "model", "method", "batch_size")
  chosen |= {name: found[name] for name in names if name in found}
  chosen |= {"effort": found["effort"]} if found["effort"] else {}
  quoted = lambda text: f'"{text}"' if not set(text) & set('"$`\\!') else shlex.quote(text)
  return "\n".join(f"    --{name}={quoted(str(value))}" for name, value in chosen.items())


def memory(found: dict[str, Any]) -> str:
  """Formats the bytes of each kind of memory; the sum is the memory in use."""
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
  """Formats the four times of a step; the longest time is the bound."""
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
  """Formats collectives by operation, axis and dtype, in descending order of sent bytes."""
  rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
  for row in collectives:
    crosses = (("yes" if row["crosses_slices"] else "no"),) * (slices > 1)
    rows.setdefault((row["operation"], row["axis"], row["dtype"], *crosses), []).append(row)
  lines = [
    [
      *key,
      of_bytes(max(row["payload_bytes"] for row in alike)),
      of_bytes(_sent(alike)),
      f"{sum(row['times'] for row in alike):.4g}",
      f"{_sent(row for row in alike if row['asynchronous']) / _sent(alike):.0%}",
      _meanwhile(alike),
    ]
    for key, alike in sorted(rows.items(), key=lambda item: -_sent(item[1]))
  ]
  columns = ("crosses slices",) * (slices > 1)
  header = ("collective", "axis", "dtype", *columns, "largest payload")
  header = (*header, "sent per step", "times per step", "asynchronous", "meanwhile")
  return table(header, lines) if lines else ""


def _sent(rows: Iterable[dict[str, Any]]) -> float:
  return sum(row["sent_bytes"] * row["times"] for row in rows)


def _meanwhile(rows: Iterable[dict[str, Any]]) -> str:
  """Describes what runs between the start and the end of the collectives with most bytes."""
  row = max(rows, key=lambda row: _sent([row]))
  if not row["asynchronous"]:
    return ""
  if not row["products_meanwhile"]:
    return "no matrix products"
  turns = ", ".join(f"{trips}" for trips in row["loops_meanwhile"])
  loops = f" in {len(row['loops_meanwhile'])} loops of {turns} turns" if turns else ""
  loops = loops.replace("1 loops", "a loop")
  return f"{row['products_meanwhile']} matrix products{loops}"


def summary(found: dict[str, Any]) -> str:
  """Describes in words the bound and the costs that the bound includes."""
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
    f"A round has {round_}. {_compiled(found)}Lowered in {seconds['lowering']:.1f} s, compiled in "
    f"{seconds['compiling']:.1f} s."
  )


def _compiled(found: dict[str, Any]) -> str:
  if found["rounds"] == 1:
    return ""
  return (
    f"Exchanges overlap with the next round: {found['rounds']} rounds were compiled, with "
    f"{found['products']:.4g} matrix products per step. "
  )


def best(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
  """Returns the row with the lowest known bound; among equal bounds, the row with least memory."""
  known = [row for row in rows if "refused" not in row and not row["roofline"]["left_out"]]
  order = lambda row: (row["roofline"]["seconds_per_step"], row["memory"]["used"])
  return min(known, key=order, default=None)


def comparison(rows: list[dict[str, Any]]) -> str:
  """Formats a table with one line per run, and names the best run."""
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
