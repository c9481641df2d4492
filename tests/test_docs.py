"""What the documents show is what runs: CONTRIBUTING's algorithm, README's commands and figures."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import SIMULATED, Running, distance, regression

from research import base
from research.aggregate.mean import mean

ROOT = Path(__file__).parents[1]


def test_the_algorithm_in_contributing_runs_everywhere():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  block = re.search(r"```python\n(.*?)```", text, re.S)
  assert block
  names: dict[str, Any] = {"NamedTuple": NamedTuple, "jax": jax, "jnp": jnp, **vars(base)}
  exec(re.sub(r"^ {3}", "", block[1], flags=re.M), names)
  method = names["local_sgd"](0.1, mean(), period=1)
  plain = Running(method, "simulate", SIMULATED, batch_size=None).rounds(10).params()
  method = names["local_sgd"](0.1, mean(), period=4)
  want = Running(method, "simulate", SIMULATED).rounds(5)
  assert not any(jax.tree.leaves(want.layout.state))
  assert distance(Running(method, "spmd", SIMULATED).rounds(5).params(), want.params()) <= 1e-5
  # with one local step it is gradient descent
  task = regression()
  params = task.init(jax.random.split(jax.random.key(0))[0])
  for _ in range(10):
    params = optax.apply_updates(
      params, jax.tree.map(lambda g: -0.1 * g, jax.grad(task.loss)(params, task.train, None))
    )
  assert distance(plain, params) <= 1e-5
  assert np.isfinite(want.metrics["loss"]).all()


def test_the_figures_in_the_readme_are_those_of_the_results():
  table = (ROOT / "results" / "bench" / "table.md").read_text().strip()
  assert table in (ROOT / "README.md").read_text()
  result = json.loads((ROOT / "results" / "bench" / "result.json").read_text())
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
