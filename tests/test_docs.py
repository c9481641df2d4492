"""What the documents show is what runs: CONTRIBUTING's algorithm, README's commands and figures."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["bench", "rounds"])
def test_the_figures_in_the_readme_are_those_of_the_results(folder):
  table = (ROOT / "results" / folder / "table.md").read_text().strip()
  assert table in (ROOT / "README.md").read_text()
  result = json.loads((ROOT / "results" / folder / "result.json").read_text())
  assert result["environment"]["commit"]
  for row in result["pairs"]:
    assert f"| {row['ratio']:.3f} |" in table


def test_the_figures_of_compression_are_those_of_the_results():
  text = (ROOT / "README.md").read_text()
  result = json.loads((ROOT / "results" / "compression" / "compare.json").read_text())
  assert result["env"]["commit"]
  dense = result["methods"][0]["accuracy_mean"]
  for row in result["methods"]:
    figures = [f"{100 * row[f'accuracy_{name}']:.2f}" for name in ("mean", "least", "greatest")]
    assert "| `{}` | {} | {} to {} |".format(row["method"], *figures) in text
    assert f"{row['bytes_per_step_per_worker']:,.0f} | {row['ratio_to_dense']:.2%} |" in text
    assert row["accuracy_mean"] >= dense - 0.005
