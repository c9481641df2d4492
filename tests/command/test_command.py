"""The command as a room of the library: its console script, and --import."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from absl import flags

from research.command import start
from research.core import plugins, registry
from research.training.config import UsageError

ROOT = Path(__file__).parents[2]


def test_the_console_script_is_the_command():
  scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
  module, function = scripts["distopt"].split(":")
  script = f"import sys; from {module} import {function}; sys.argv[0] = 'run.py'; {function}()"
  help_of = lambda *command: subprocess.run(
    [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  want = help_of(str(ROOT / "experiments/run.py"))
  assert "explain_sharding" in want.stdout
  assert help_of("-c", script).stdout == want.stdout


INTERRUPTED = """
import sys
module = sys.argv.pop()
class CtrlC:
  def find_spec(self, name, path=None, target=None):
    if name == module:
      raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
from research.command.run import run
run()
"""


@pytest.mark.parametrize("module", ["jax", "research.training.loop"])
def test_ctrl_c_during_the_imports_ends_in_one_line(module, tmp_path):
  command = [sys.executable, "-c", INTERRUPTED, module]
  environ = {**os.environ, "PYTHONPATH": str(ROOT)}
  ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
  assert ended.returncode == 130
  assert ended.stderr == "error: interrupted before there was anything to save\n"
  assert not [*tmp_path.iterdir()]


@pytest.fixture
def given(tmp_path, monkeypatch):
  """Imports modules in a folder as a command with these flags does."""
  monkeypatch.setattr(registry, "ADDED", {})
  monkeypatch.setattr(plugins, "_loaded", {})
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.chdir(tmp_path)
  values = flags.FlagValues()
  flags.DEFINE_multi_string("import", [], "", flag_values=values)
  monkeypatch.setattr(start, "FLAGS", values)
  before = set(sys.modules)

  def imported(*argv: str) -> None:
    values["import"].unparse()
    values(["run.py", *argv])
    start.import_modules()

  yield imported
  for name in {"first", "second", "broken", "clash", "unreadable"} & (set(sys.modules) - before):
    del sys.modules[name]


MODULE = "from research.core.registry import register\n@register('compressor')\ndef {}(): ...\n"


def test_several_modules_are_imported_in_order_also_from_a_preset(given, tmp_path):
  for name in ("first", "second"):
    (tmp_path / f"{name}.py").write_text(MODULE.format(name))
  (tmp_path / "preset.flags").write_text("--import=second.py\n")
  given("--import=first", f"--flagfile={tmp_path / 'preset.flags'}")
  assert registry.names("compressor")[-2:] == ["first", "second"]


def test_what_is_not_there_is_a_usage_error(given, tmp_path):
  with pytest.raises(UsageError, match=r"^--import='third\.py': there is no such file or package"):
    given("--import=third.py")
  (tmp_path / "clash.py").write_text(MODULE.format("top_k"))
  with pytest.raises(UsageError, match=r"^--import='clash': .* 'top_k' is research\.compress"):
    given("--import=clash")


@pytest.mark.parametrize(
  ("name", "text", "line", "last"),
  [
    ("broken", "\n\n1 / 0\n", "<module> failed (broken.py, line 3): ZeroDivisionError", "Zero"),
    ("unreadable", "def f(:\n", "SyntaxError: invalid syntax (unreadable.py, line 1)", "Syntax"),
  ],
)
def test_an_error_of_a_module_is_a_line_and_its_traceback(
  given, tmp_path, capfd, name, text, line, last
):
  (tmp_path / f"{name}.py").write_text(text)
  with pytest.raises(SystemExit) as ended:
    given(f"--import={name}.py")
  assert ended.value.code == 2
  first, second, *_, end = capfd.readouterr().err.splitlines()
  assert first.startswith(f"error: --import='{name}.py': {line}")
  assert second.startswith("Traceback")
  assert end.startswith(last)


def test_debug_shows_where_a_wrong_value_was_rejected(tmp_path):
  """The line, which is all that there is without it, comes last."""
  wrong = ["--task=digits()", "--method=data_parallel(sgd(0.1), power_sgd(0))", f"--out={tmp_path}"]
  command = [sys.executable, str(ROOT / "experiments" / "run.py"), *wrong, "--debug"]
  ended = subprocess.run(command, capture_output=True, text=True)
  assert ended.returncode == 2
  assert "Traceback" in ended.stderr
  assert "power_sgd.py" in ended.stderr
  assert ended.stderr.splitlines()[-1].startswith("error: --method=")
