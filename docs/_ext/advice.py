"""Writes the numbers of the advisor's page, docs/_static/advisor/data.js.

The methods and the recorded numbers of steps are those of `experiments/advise.py`. What a worker
sends is linear in the size of the model, and in 1 / W for collectives that send blocks, so two
traces of each method give the traffic for every model and number of workers. A third trace checks
this.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from pages import HERE, ROOT

from experiments.reports import evidence, options, work
from research.analysis import network
from research.core import registry

PLACE = HERE / "_static" / "advisor" / "data.js"
MODEL = f"{14 * options.SIDE**2 * 4 / 1e6}MB"  # 14 square matrices, and nothing else
COUNTS = (8, 16, 64)  # numbers of workers; the last one checks the fit to the first two
PROBE = ROOT / "results" / "prediction" / "probe-2.json"


def generate() -> None:
  """Writes the file if its contents change."""
  kernels = network.parse(str(PROBE)) if PROBE.exists() else network.Network()
  shapes = options.shapes_of(MODEL)
  known = [one for one in options.CANDIDATES if one.evidence]
  data = {
    "exact": options.EXACT,
    "kernels": bool(kernels.kernels),
    "methods": [method(one, shapes, kernels) for one in known],
  }
  text = f"window.ADVISOR_DATA = {json.dumps(data, indent=1)};\n"
  if not PLACE.exists() or PLACE.read_text(encoding="utf-8") != text:
    PLACE.write_text(text, encoding="utf-8")


def method(one: options.Candidate, shapes: Any, kernels: network.Network) -> dict[str, Any]:
  """Returns the numbers of a method, per parameter of the model.

  Args:
    one: the method; a recorded result says how many steps it needs.
    shapes: the parameters of the model that is traced.
    kernels: the times of encoding.

  Raises:
    ValueError: if the traffic is not a + b / W per parameter.
  """
  size = sum(math.prod(leaf.shape) for leaf in shapes.values())
  spec = options.spec_of(one, shapes, COUNTS[0])
  built = registry.build("method", spec)
  works = [work.of_shapes(built, shapes, count)[0] for count in COUNTS]
  steps = evidence.READERS[one.evidence]()
  return {
    "name": one.name,
    "spec": spec,
    "transfers": transfers([found.rows for found in works], size),
    "encoding": works[0].encoding(kernels) / size,
    "unmeasured": unmeasured(works[0].counts, kernels.kernels),
    "period": works[0].period,
    "delay": works[0].delay,
    "steps": [steps.low, steps.counted, steps.high],
    "sources": [[name, page(name)] for name in steps.source.split(", ")],
  }


def unmeasured(counted: Iterable[str], kernels: Iterable[str]) -> list[str]:
  """Returns the specs that were measured only with other arguments.

  Args:
    counted: the specs whose elements are counted.
    kernels: the specs that were measured.
  """
  name = lambda spec: spec.partition("(")[0]
  known = {name(spec) for spec in kernels}
  return sorted(spec for spec in {*counted} - {*kernels} if name(spec) in known)


def transfers(found: list[list[dict[str, Any]]], size: int) -> list[dict[str, Any]]:
  """Fits the operands of collectives, in bytes per parameter and step, as a + b / W.

  Args:
    found: the transfers with each number of workers in COUNTS.
    size: number of parameters.

  Raises:
    ValueError: if the fit does not give the transfers with the last number of workers.
  """
  rows = []
  for few, more, check in zip(*found, strict=True):
    (x, y, z), (v, w, last) = [
      [row["payload_bytes"] / size for row in (few, more, check)],
      COUNTS,
    ]
    b = (x - y) / (1 / v - 1 / w)
    a = x - b / v
    if abs(a + b / last - z) > 0.01 * z:
      raise ValueError(
        f"{few['operation']}: {z} bytes per parameter, but the fit is {a + b / last}"
      )
    row = {"operation": few["operation"], "fixed": a, "by_workers": b, "messages": few["messages"]}
    rows.append(row)
  return rows


def page(source: str) -> str | None:
  """Returns the page of the documentation that shows a recorded result, or None.

  Args:
    source: the folder of the result, such as results/diloco.
  """
  name = source.removeprefix("results/")
  if (ROOT / "experiments" / "claims" / f"{name}.py").exists():
    return f"results/claims/{name}.html"
  return f"results/{name}.html" if (HERE / "results" / f"{name}.md").exists() else None
