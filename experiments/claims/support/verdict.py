"""Reports the verdict on a claim: writes gates, a table, a figure, and a table of all claims."""

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.claims.support.claim import Findings, Panel
from research.training.reports import figures, report

POINTS = 200  # maximum number of points of a curve in result.json


def values(findings: Findings, elsewhere: bool) -> dict[str, Any]:
  """Returns the values and gates of a claim, as JSON.

  Args:
    findings: the findings of the claim.
    elsewhere: whether the claim was tuned on another data set, in which case few gates apply.
  """
  gates = [
    {
      "what": gate.what,
      "value": _number(gate.value),
      "relation": gate.relation,
      "bound": gate.bound,
      "applies": not elsewhere or gate.anywhere,
      "holds": gate.holds,
    }
    for gate in findings.gates
  ]
  asked = [gate["holds"] for gate in gates if gate["applies"]]
  verdict = ("holds" if all(asked) else "fails") if asked else "no gate applies"
  return {
    "verdict": verdict,
    "values": [
      {"what": b.what, "ours": _number(b.ours), "paper": b.paper, **_deviation(b.ours, b.paper)}
      for b in findings.besides
    ],
    "gates": gates,
    "note": findings.note,
    "curves": [
      {
        "title": panel.title,
        "x": panel.x,
        "y": panel.y,
        "lines": [
          {"label": line.label, "x": _thinned(line.x), "y": _thinned(line.y)}
          for line in panel.lines
        ],
      }
      for panel in findings.panels
    ],
  }


def write(result: dict[str, Any], findings: Findings, folder: Path) -> None:
  """Writes result.json, table.md and figure.png into a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  report.write_json(folder / "result.json", result)
  report.write_text(folder / "table.md", table(result) + "\n")
  draw(findings.panels, result["title"], folder / "figure.png")


def table(result: dict[str, Any]) -> str:
  """Formats the Markdown tables: our values next to the paper's values, and the gates."""
  lines = [f"{result['claim']}: {result['title']}", ""]
  lines += ["| what | ours | paper | deviation |", "|---|---|---|---|"]
  for row in result["values"]:
    deviation = f"{row['deviation']:+.3g}" if row["paper"] is not None else ""
    lines.append(
      f"| {row['what']} | {_shown(row['ours'])} | {_shown(row['paper'])} | {deviation} |"
    )
  lines += ["", "| gate | value | bound | |", "|---|---|---|---|"]
  for gate in result["gates"]:
    said = ("holds" if gate["holds"] else "**fails**") if gate["applies"] else "not asked here"
    bound = f"{gate['relation']} {_shown(gate['bound'])}"
    lines.append(f"| {gate['what']} | {_shown(gate['value'])} | {bound} | {said} |")
  lines += ["", result["note"]] if result["note"] else []
  many = "1 seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
  return "\n".join(
    [
      *lines,
      "",
      f"{result['verdict']}; {many}, {result['seconds']:.0f} s:",
      "",
      f"    {result['command']}",
    ]
  )


def draw(panels: list[Panel], title: str, path: Path) -> None:
  """Draws the panels side by side."""
  with figures.drawing(path):
    figures.save(figure_of(panels, title), path, dpi=110)


def figure_of(panels: list[Panel], title: str) -> Any:
  """Returns the figure that `draw` writes."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
  figure.suptitle(figures.literal(textwrap.fill(title, 70 * len(panels))), fontsize=11)
  for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    colors: dict[str, str] = {}
    for line in panel.lines:
      # all seeds of a label have the same color
      color = colors.setdefault(line.label, f"C{len(colors)}")
      known = figures.literal(line.label) in axes.get_legend_handles_labels()[1]
      axes.plot(
        line.x,
        line.y,
        color=color,
        marker=line.marker or None,
        markersize=4,
        linewidth=1.3,
        label="_" if known else figures.literal(line.label),
      )
    for i, (label, level) in enumerate(panel.levels.items()):
      axes.axhline(
        level,
        color="gray",
        linestyle=("--", ":", "-.")[i % 3],
        linewidth=1,
        label=figures.literal(label),
      )
    axes.set(
      title=figures.literal(panel.title),
      xlabel=figures.literal(panel.x),
      ylabel=figures.literal(panel.y),
      xscale=panel.x_scale,
      yscale=panel.y_scale,
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  return figure


HEAD = """# Results

One folder per measurement. Those of papers' claims have `result.json` (values, gates, spec strings,
seeds, commit, versions, hardware), `table.md` and `figure.png`, and are made again by the command
beside them. A claim that does not hold here says so: no gate was moved to let it pass.

| claim | first number | paper | ours | verdict | seconds | command |
|---|---|---|---|---|---|---|
"""


def write_overview(out: Path, titles: Mapping[str, str]) -> None:
  """Writes OUT/README.md, a table of all claims by name, including claims without a record."""
  rows = []
  for name, title in titles.items():
    path = out / name / "result.json"
    if not path.exists():
      rows.append(f"| {name}: {title} | | | | not on record | | `reproduce.py --claim={name}` |")
      continue
    found = json.loads(path.read_text())
    first = found["values"][0]
    rows.append(
      f"| [{name}]({name}/table.md): {title} | {first['what']} "
      f"| {_shown(first['paper'])} | {_shown(first['ours'])} | {_verdict(found)} "
      f"| {found['seconds']:.0f} | `{found['command'].removeprefix('python experiments/')}` |"
    )
  report.write_text(out / "README.md", HEAD + "\n".join(rows) + "\n")


def _verdict(found: dict[str, Any]) -> str:
  asked = [gate for gate in found["gates"] if gate["applies"]]
  held = sum(gate["holds"] for gate in asked)
  return f"{found['verdict']} ({held} of {len(asked)} gates)"


def _deviation(ours: float, paper: float | None) -> dict[str, float | None]:
  return {} if paper is None else {"deviation": _number(ours - paper)}


def _number(value: float) -> float | None:
  """Converts a number for JSON, which has no infinity and no NaN."""
  return float(value) if math.isfinite(value) else None


def _shown(value: float | None) -> str:
  return "" if value is None else f"{value:.5g}"


def _thinned(column: Any) -> list[float | None]:
  step = max(1, -(-len(column) // POINTS))
  return [_number(float(value)) for value in [*column[:-1:step], column[-1]]]
