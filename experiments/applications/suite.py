"""Runs bench.py's suite applications: search, finance, medicine, films, driving and molecules.

The suite writes OUT/CASE/result.json (rows with commit and hardware), table.md and figure.png. The
data files are required; comparisons with peer libraries need `pip install -e ".[applications]"`.
The driving case needs a recording by `experiments/drive.py`, and
`pip install -e ".[driving,async]"`.
"""

import importlib
from pathlib import Path

# Case -> module and function. Some modules import JAX, which must not precede the flags of devices.
CASES = {
  "search": "search:search",
  "finance": "portfolios:finance",
  "medicine": "hospitals:medicine",
  "recommend": "films:recommend",
  "driving": "fleets:driving",
  "dqn": "dqn:dqn",
  "molecules": "molecules:solubility",
  "toxicity": "molecules:toxicity",
}


def measure(case: str, folder: Path) -> None:
  """Measures an application, and writes the result, the table and the figure into a folder."""
  from matplotlib.figure import Figure

  from research.training import folder as folders
  from research.training.reports import figures, report

  figure = Figure(figsize=(10, 4), layout="constrained")
  module, name = CASES[case].split(":")
  rows = getattr(importlib.import_module(f"experiments.applications.{module}"), name)(figure)
  folder.mkdir(parents=True, exist_ok=True)
  result = {"case": case, "rows": rows, "environment": folders.environment()}
  report.write_json(folder / "result.json", result)
  lines = ["| what | value | beside | |", "|---|---|---|---|"]
  for one in rows:
    peer = "" if one["peer"] is None else f"{one['peer']:.6g}"
    lines.append(f"| {one['what']} | {one['value']:.6g} | {one['beside']} | {peer} |")
  report.write_text(folder / "table.md", "\n".join(lines) + "\n")
  with figures.drawing(folder / "figure.png") as path:
    figures.save(figure, path, dpi=110)
