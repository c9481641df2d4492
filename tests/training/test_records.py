"""What is written beside a run: JSON that every reader takes, and figures that cost no result."""

import ast
import io
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from research.training.reports import figures, report

ROOT = Path(__file__).parents[2]
SOURCES = [
  path for folder in ("research", "experiments", "launch") for path in (ROOT / folder).rglob("*.py")
]
TEXT = st.text(st.characters())  # the default knows a codec, whose table takes seconds to make
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
  lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner) | st.tuples(inner, inner),
  max_leaves=6,
)


def no_constant(name: str):
  raise AssertionError(f"{name} is not JSON")


def strict(text: str):
  """Reads JSON as RFC 8259 has it."""
  return json.loads(text, parse_constant=no_constant)


def by_definition(value):
  """A value as JSON gives it back, if it has no number for NaN and infinity."""
  if isinstance(value, float) and not abs(value) < math.inf:
    return None
  if isinstance(value, dict):
    return {name: by_definition(inner) for name, inner in value.items()}
  return [*map(by_definition, value)] if isinstance(value, list | tuple) else value


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(VALUES)
def test_what_is_written_is_json_and_finite_values_come_back(value):
  text = report.as_json(value)
  assert strict(text) == by_definition(value)
  again = report.with_nan(strict(text))
  assert report.as_json(again) == text


def test_rows_with_nan_are_read_as_nan_and_written_again_as_they_were(tmp_path):
  row = {"step": 1, "loss": 0.5, "seconds": 1.0, "eval": {"auc": math.nan, "rmse": math.inf}}
  log = report.Metrics(tmp_path, 0, tensorboard=False)
  log.write([row, row | {"step": 2, "loss": -math.inf}])
  log.close()
  before = (tmp_path / "metrics.jsonl").read_text()
  assert [strict(line)["loss"] for line in before.splitlines()] == [0.5, None]
  first, second = report.read_rows(tmp_path / "metrics.jsonl")
  assert math.isnan(first["eval"]["auc"])
  assert math.isnan(second["loss"])
  report.Metrics(tmp_path, 2, tensorboard=False).close()
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_rows_of_earlier_versions_with_nan_are_read(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": NaN, "seconds": 1.0}\n')
  (row,) = report.read_rows(path)
  assert math.isnan(row["loss"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_json_has_nan(path):
  """`json.dumps` refuses NaN, or only makes texts for digests and for pipes to a process."""
  tree = ast.parse(path.read_text())
  allowed = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      of_text = isinstance(node.func, ast.Attribute) and node.func.attr == "encode"
      inner = [node.func.value] if isinstance(node.func, ast.Attribute) and of_text else node.args
      if any(ast.unparse(word) == "allow_nan=False" for word in node.keywords):
        allowed.add(id(node))
      if of_text or name in ("print", "same_everywhere"):
        allowed |= set(map(id, inner))
  dumped = [
    node.lineno
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and re.fullmatch(r"(json\.)?dumps?", ast.unparse(node.func))
    and id(node) not in allowed
  ]
  assert not dumped


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json*")), ids=lambda p: p.stem)
def test_results_on_record_are_json(path):
  lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
  for text in lines:
    strict(text)


# ---- figures


@settings(derandomize=True, database=None, deadline=None)
@given(st.text(st.sampled_from("$\\{}_^ab "), max_size=12))
def test_text_is_drawn_as_it_stands(text):
  """No formula is made of it, which may not be one; Matplotlib itself removes the escapes."""
  drawn = Text(0, 0, figures.literal(text))
  shown, is_formula = drawn._preprocess_math(drawn.get_text())  # pyright: ignore
  assert not is_formula
  if "\\$" not in text:
    assert shown == text


SUMMARY = {
  "task": "text('a$$b', '$\\frac')",
  "method": "data_parallel(sgd(0.1), mean())",
  "workers": 2,
  "evaluated_on": "test",
}


def test_a_path_with_dollars_does_not_spoil_the_plot(tmp_path):
  row = {"step": 1, "loss": 0.5, "seconds": 1.0, "train_loss": 0.5, "eval": {"accuracy": 0.5}}
  log = report.Metrics(tmp_path, 0, tensorboard=False)
  log.write([row, row | {"step": 2}])
  log.close()
  figures.write_result(tmp_path, SUMMARY)
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_outlives_a_plot_that_fails_and_the_plot_is_drawn_later(
  tmp_path, monkeypatch, capsys
):
  def fail(*args, **kwargs):
    raise RuntimeError("no\nfont")

  with monkeypatch.context() as broken:
    broken.setattr(Figure, "savefig", fail)
    figures.write_result(tmp_path, SUMMARY)
  assert strict((tmp_path / "summary.json").read_text()) == SUMMARY
  (line,) = capsys.readouterr().err.splitlines()
  assert line == f"warning: {tmp_path / 'loss.png'} was not drawn: RuntimeError: no font"
  assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
  figures.show_again(tmp_path, SUMMARY)
  assert (tmp_path / "loss.png").stat().st_size > 0


# ---- progress


class Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self) -> bool:
    return True


def test_a_terminal_that_cannot_redraw_gets_a_line_per_evaluation(monkeypatch):
  for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("TERM", "dumb")
  terminal = Terminal()
  monkeypatch.setattr("sys.stderr", terminal)
  progress = report.Progress(20, "test {}".format, shown=True)
  progress.start(0)
  progress.update({"step": 10, "loss": 0.5, "eval": {"accuracy": 0.25}})
  progress.close()
  assert terminal.getvalue() == "step      10/20  loss 0.5, test accuracy 0.25\n"
