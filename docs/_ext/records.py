"""Sphinx extension: directives that show records of results/.

```{provenance} bench/result.json
```
"""

import abc
import json
from typing import Any

import claims
from docutils import nodes
from pages import ROOT, number, table
from sphinx.util.docutils import SphinxDirective


class _Record(SphinxDirective, abc.ABC):
  """Reads a JSON file in results/, and parses the Markdown that is generated from it."""

  required_arguments = 1

  @abc.abstractmethod
  def markdown(self, record: dict[str, Any]) -> str:
    """Formats the record as Markdown."""

  def run(self) -> list[nodes.Node]:
    path = ROOT / "results" / self.arguments[0]
    self.env.note_dependency(str(path))
    record = json.loads(path.read_text(encoding="utf-8"))
    return self.parse_text_to_nodes(self.markdown(record))


class Provenance(_Record):
  """Shows the commit, hardware, versions and command."""

  def markdown(self, record: dict[str, Any]) -> str:
    environment = record.get("environment") or record.get("env") or record
    text = claims.provenance(environment)
    if commits := record.get("commits"):
      cases = ", ".join(f"{case} `{commit[:12]}`" for case, commit in commits.items())
      text += f"\n- cases that were measured at another commit: {cases}"
    return text


class GpuRuns(_Record):
  """Shows the runs on a GPU."""

  def markdown(self, record: dict[str, Any]) -> str:
    rows = []
    for run in record["runs"]:
      accuracy = run.get("test_accuracy")
      rows.append(
        [
          f"`{run['command']}`",
          "" if accuracy is None else f"{accuracy:.4f}",
          f"{run['train_loss']:.5f}",
          number(round(run["steps_per_second"])) if "steps_per_second" in run else "",
          f"`{run['params_sha256'][:12]}`" if "params_sha256" in run else "",
        ]
      )
    head = ["command", "test accuracy", "training loss", "steps/s", "SHA-256 of the parameters"]
    return table(head, rows)


class GpuCompressors(_Record):
  """Shows compressors on a GPU: their time, and how many payload elements equal those on a CPU."""

  def markdown(self, record: dict[str, Any]) -> str:
    rows = [
      [
        f"`{spec}`",
        f"{row['encode_ms']:.3f}",
        f"{row['decode_ms']:.3f}",
        ", ".join(f"{share:.3g}" for share in row["equal_shares_of_payload_leaves"]),
      ]
      for spec, row in record["compressors"]["of"].items()
    ]
    head = ["compressor", "encode, ms", "decode, ms", "equal elements, by payload leaf"]
    return table(head, rows)


class Summary(_Record):
  """Shows the facts in a run's summary.json."""

  def markdown(self, record: dict[str, Any]) -> str:
    rows = [["method", f"`{record['method']}`"], ["steps", number(record["steps"])]]
    rows.append(["training loss", f"{record['train_loss']:.6g}"])
    rows += [[f"test {name}", f"{value:.6g}"] for name, value in record["eval"].items()]
    rows.append(["steps per second", f"{record['steps_per_second']:.4g}"])
    rows.append(
      ["seconds", f"{record['seconds']:.4g}, compiling {record['compile_seconds']:.3g} of them"]
    )
    return table(["", ""], rows)


def setup(app: Any) -> dict[str, Any]:
  """Called by Sphinx."""
  app.add_directive("provenance", Provenance)
  app.add_directive("gpu-runs", GpuRuns)
  app.add_directive("gpu-compressors", GpuCompressors)
  app.add_directive("summary", Summary)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
