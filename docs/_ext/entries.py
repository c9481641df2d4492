"""Writes docs/catalogue/: one page per kind of registered name, from the code.

Signatures, docstrings, traits and rejected combinations are read from the registry. The bytes are
measured by the library's own wire accounting, for the example of the entry.
"""

import re
from typing import Any

import claims
import docstrings
import examples
import facts
import numpy as np
import optax
from pages import HERE, Writer, number, table

from research.aggregate import composition
from research.comm import mixing
from research.comm.topology import Topology
from research.core import registry
from research.core.base import Aggregator, Compressor, Trait, Wrapper
from research.core.builtin import TABLE
from research.core.method import Method
from research.methods.data_parallel import data_parallel

PAGES = {
  "compressor": "compressors",
  "aggregator": "aggregators",
  "method": "methods",
  "task": "tasks",
  "model": "models",
  "topology": "topologies",
  "delays": "delays",
  "speeds": "speeds",
  "network": "networks",
  "churn": "churn",
  "partition": "partitions",
}
# Meaning of each trait of an aggregator.
TRAITS = {
  Trait.MEMORY: "stores leaves from round to round",
  Trait.VOTE: "sends signs without a scale",
  Trait.SELECTS: "its value is not the mean of the workers' messages",
  Trait.NOISE: "adds noise for privacy",
  Trait.SECRET: "masks the workers' messages",
  Trait.FORGED: "replaces the values of faulty workers (an attack)",
  Trait.WHOLE: "needs all of a worker's leaves at once",
  Trait.EXPANSIVE: "its compressor may lose more than the whole value",
  Trait.DENSE: "sends every position of a leaf",
  Trait.APART: "workers, or phases, send different positions of a leaf",
  Trait.LOCAL: "its value differs between workers (gossip)",
  Trait.WEIGHTED: "weights workers by their position in the graph",
  Trait.DIRECTED: "uses a directed graph",
  Trait.VARYING: "its graph changes from round to round",
  Trait.PARTIAL: "averages over the workers that did not drop out",
  Trait.SENDERS: "averages each element over the workers that sent it",
  Trait.EVERYONE: "depends on every worker's earlier messages",
}


def generate() -> None:
  """Writes all pages of the catalogue."""
  write, tested = Writer(HERE / "catalogue"), _claims()
  for kind, page in PAGES.items():
    write(page, _page(kind, page, tested))
  write("optimizers", _optimizers(tested))
  write("combinations", _combinations())


def link(name: str, base: str = "") -> str:
  """Returns a name in backticks, linked to its catalogue entry if it is registered.

  Args:
    name: the code between the backticks.
    base: folder of the catalogue, relative to the page.
  """
  for kind, page in (*PAGES.items(), ("optimizer", "optimizers")):
    if name in TABLE[kind]:
      return f"[`{name}`]({base}{page}.md#{name})"
  return f"`{name}`"


def _page(kind: str, page: str, tested: dict[str, list[str]]) -> str:
  parts = [(HERE / "_ext" / "intros" / f"{page}.md").read_text(encoding="utf-8").strip()]
  groups = examples.GROUPS.get(kind) or {"": tuple(TABLE[kind])}
  placed = [name for names in groups.values() for name in names]
  if rest := [name for name in TABLE[kind] if name not in placed]:
    groups = {**groups, "More": tuple(rest)} if "" not in groups else {"": (*placed, *rest)}
  if kind == "compressor":
    parts.append(_overview())
  for title, names in groups.items():
    if title:
      parts.append(f"## {title}")
    parts += [_entry(kind, name, 3 if title else 2, tested) for name in names]
  return "\n\n".join(parts) + "\n"


def _entry(kind: str, name: str, level: int, tested: dict[str, list[str]]) -> str:
  factory = registry.lookup((kind,), name)
  doc = docstrings.parse(factory)
  spec, linked = examples.of(kind, name), docstrings.linking(link, doc, factory)
  parts = [
    f"{'#' * level} {name}",
    f"```python\n{docstrings.signature(factory, name)}\n```",
    docstrings.markdown(doc, linked, True),
  ]
  if doc.args:
    items = [f"`{n}`\n: {docstrings.prose(text, linked)}" for n, text in doc.args if n]
    parts += ["**Parameters**", "\n\n".join(items)]
  built = examples.built(kind, spec)
  parts += _facts(kind, name, built, spec)
  if isinstance(factory, type) and issubclass(factory, Wrapper):
    parts += _refusals(factory)
  if doc.raises:
    rejected = [docstrings.prose(text, linked).rstrip(".") for _, text in doc.raises]
    parts.append(f"**Raises an error** {'; '.join(rejected)}.")
  if doc.reference:
    parts.append(f"**Reference** {docstrings.prose(doc.reference, linked)}")
  if found := tested.get(name):
    links = ", ".join(f"[{claim}](../results/claims/{claim}.md)" for claim in found)
    parts.append(f"**Claims that use it** {links}")
  parts += ["**Example**", f"```python\n{spec}\n```"]
  return "\n\n".join(parts)


def _facts(kind: str, name: str, built: Any, spec: str) -> list[str]:
  if isinstance(built, Compressor):
    return _of_compressor(built, spec)
  if isinstance(built, Aggregator):
    return _of_aggregator(built, spec)
  if isinstance(built, Method):
    return _of_method(built, spec)
  if kind == "topology":
    return _of_topology(built)
  return []


# ---- compressors


def _overview() -> str:
  """Lists all compressors, sorted by the bytes that they send."""
  rows = []
  for name in TABLE["compressor"]:
    spec = examples.of("compressor", name)
    built = registry.build("compressor", spec)
    sent = sum(array.bytes for array in facts.payload(built))
    rows.append((sent, [link(name), f"`{spec}`", number(sent), f"{facts.DENSE / sent:.3g}x"]))
  head = ["compressor", "example", "bytes for 1,000,000 float32", "smaller by"]
  shown = table(head, [row for _, row in sorted(rows, key=lambda row: -row[0])])
  return f"## All compressors\n\n{shown}"


def _of_compressor(compressor: Compressor, spec: str) -> list[str]:
  arrays = facts.payload(compressor)
  sent = sum(array.bytes for array in arrays)
  rows = [
    [f"`{a.name}`", a.dtype, " x ".join(map(str, a.shape)) or "scalar", number(a.bytes)]
    for a in arrays
  ]
  traits = [
    ("contractive", compressor.contractive, "error feedback and `two_phase` accept it"),
    ("linear", compressor.linear, "`sum_mean` accepts it"),
    ("sparse", compressor.sparse, "most positions are zero after decoding"),
  ]
  shown = "; ".join(f"{name}: {'yes' if has else 'no'}" for name, has, _ in traits)
  return [
    f"**Sends** {number(sent)} bytes for a leaf of 1,000,000 float32 elements, which takes "
    f"{number(facts.DENSE)} bytes, by `{spec}`:",
    table(["payload", "dtype", "shape", "bytes"], rows),
    f"**Properties** {shown}. A server accepts it in `gather_mean`"
    + (" and `sum_mean`." if compressor.linear else "."),
  ]


# ---- aggregators


def _of_aggregator(aggregator: Aggregator, spec: str) -> list[str]:
  sent = facts.exchange(aggregator)
  traits = [meaning for trait, meaning in TRAITS.items() if trait in aggregator.traits]
  parts = [
    f"**Sends** {number(sent.total)} bytes per worker and exchange, "
    f"{_of_mean(sent.total)}, for a leaf of 1,000,000 float32 elements and {_workers(sent.axes)}, "
    f"by `{spec}`:",
    _traffic(sent.rows),
  ]
  if traits:
    parts.append(f"**Traits** of this example: {'; '.join(traits)}.")
  return [*parts, _runs_on(_not_served(aggregator), sent.axes)]


def _of_mean(sent: float) -> str:
  dense = 2 * 7 / 8 * facts.DENSE
  return f"{sent / dense:.4g} times the bytes of `mean()`"


def _workers(axes: Any) -> str:
  if set(axes) == {"data"}:
    return "8 workers"
  return "8 workers in 2 slices of 4 (`slice:2,data:4`)"


def _traffic(rows: list[dict[str, Any]]) -> str:
  head = ["collective", "axis", "dtype", "operand, bytes", "sent, bytes", "messages"]
  cells = [
    [
      row["operation"],
      row["axis"],
      row["dtype"],
      number(row["payload_bytes"]),
      number(row["sent_bytes"]),
      number(row["messages"]),
    ]
    for row in rows
  ]
  return table(head, cells)


def _not_served(aggregator: Aggregator) -> str:
  """Returns why a server's workers cannot push through an aggregator; '' if they can."""
  try:
    method = data_parallel(optax.sgd(0.1), aggregator)
  except ValueError as error:
    return str(error)
  return facts.not_served(method)


def _runs_on(why_not: str, axes: Any) -> str:
  own = "`simulate`, `spmd`"
  own += " and `pmap`" if set(axes) == {"data"} else " (not `pmap`, which has only one worker axis)"
  if not why_not:
    return f"**Runs on** {own}, and on a `server`."
  return f"**Runs on** {own}. Not on a `server`: {docstrings.prose(why_not, link)}."


def _refusals(factory: type[Wrapper]) -> list[str]:
  """Lists the traits that a wrapper rejects, read from its class."""
  if not factory.refuses or factory.refuses == Wrapper.refuses:
    return []
  rows = [[TRAITS[trait], _sentence(why)] for trait, why in factory.refuses.items()]
  return ["**Rejects** an aggregator with one of these traits:", table(["trait", "reason"], rows)]


def _sentence(text: str) -> str:
  return docstrings.prose(text, link)


# ---- methods


def _of_method(method: Method, spec: str) -> list[str]:
  steps = method.local_steps
  try:
    stretches, axes = facts.rounds_of(method)
  except ValueError as error:
    why = docstrings.prose(str(error), link)
    return [f"**Sends** an amount that is not statically known: {why}."]
  rounds = sum(count for count, _ in stretches)
  each = [sent for _, sent in stretches]
  if len(stretches) == 1:
    amount = f"{number(each[0])} bytes per worker and round"
  elif len(stretches) <= 3:
    shown = [f"{number(sent)} bytes in each of {count} rounds" for count, sent in stretches[:-1]]
    amount = f"{', then '.join(shown)}, then {number(each[-1])} bytes per round and worker"
  else:
    mean = sum(count * sent for count, sent in stretches) / rounds
    amount = (
      f"{number(min(each))} to {number(max(each))} bytes per worker and round, "
      f"{number(mean)} on average over the first {number(rounds)} rounds"
    )
  per = "" if steps == 1 else f" of {steps} local steps"
  if method.passes:
    per = " (the local steps of its epochs)"
  why_not = facts.not_served(method)
  return [
    f"**Sends** {amount}{per}, for a model of 1,000,000 float32 parameters and {_workers(axes)}, "
    f"by `{spec}`. `mean()` of a gradient sends {number(2 * 7 / 8 * facts.DENSE)} bytes.",
    _runs_on(why_not, axes),
  ]


# ---- topologies


def _of_topology(graph: Topology) -> list[str]:
  rows = []
  for count in (4, 8, 16):
    try:
      matrices = mixing.mixing(graph, count)
    except ValueError:
      continue
    links = np.count_nonzero(matrices * (1 - np.eye(count))) / (len(matrices) * count)
    gap = mixing.spectral_gap(matrices)
    rows.append([str(count), f"{links:.3g}", f"{gap:.4f}", str(len(matrices))])
  kinds = "symmetric" if graph.symmetric else "directed"
  head = ["workers", "links per worker", "spectral gap", "rounds of a period"]
  return [f"**Weights** {kinds}.", *([table(head, rows)] if rows else [])]


# ---- further pages


def _optimizers(tested: dict[str, list[str]]) -> str:
  intro = (HERE / "_ext" / "intros" / "optimizers.md").read_text(encoding="utf-8").strip()
  parts = [intro, *(_entry("optimizer", name, 2, tested) for name in TABLE["optimizer"])]
  for kind, title in (("optimizer", "Optimizers"), ("schedule", "Schedules")):
    names = sorted(registry.names(kind))
    parts += [f"## {title}", " ".join(f"`{name}`" for name in names)]
  return "\n\n".join(parts) + "\n"


def refused_table() -> str:
  """Lists the rejected pairs of a wrapper and an aggregator, with reasons, from the code."""
  rows = [
    [
      ", ".join(link(n) if n != "fsdp" else "a mesh with `fsdp`" for n in names),
      TRAITS[trait],
      _sentence(why),
    ]
    for names, trait, why in composition.refused()
  ]
  return table(["wrapper or method", "rejected trait of the aggregator", "reason"], rows)


def _combinations() -> str:
  intro = (HERE / "_ext" / "intros" / "combinations.md").read_text(encoding="utf-8").strip()
  return intro.replace("REFUSED_PAIRS", refused_table()) + "\n"


def _claims() -> dict[str, list[str]]:
  """Maps each name to the claims that use it; names that most claims use are left out."""
  found: dict[str, list[str]] = {}
  names = {name for kind in TABLE.values() for name in kind}
  for claim, record in claims.records().items():
    specs = claims.names_in(record)
    for name in names:
      if re.search(rf"\b{name}\(", specs):
        found.setdefault(name, []).append(claim)
  return {name: using for name, using in found.items() if len(using) <= 8}
