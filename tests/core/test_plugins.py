"""Names from outside: registered, imported by --import or an entry point, in every process."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from research.compress.cast import bf16
from research.core import plugins, registry
from research.core.base import Compressor
from research.training import folder

ROOT = Path(__file__).parents[2]
PLUGIN = """
from __future__ import annotations
from research.compress.cast import bf16
from research.core.base import Compressor
from research.core.registry import register

@register("compressor")
def rounded(bits: int = 16) -> Compressor:
  if bits < 1:
    raise ValueError(f"bits={bits} is not at least 1")
  return bf16()
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
  """Nothing is registered; modules that a test imports are forgotten."""
  monkeypatch.setattr(registry, "ADDED", {})
  monkeypatch.setattr(plugins, "_loaded", {})
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.chdir(tmp_path)
  before = set(sys.modules)
  registry.load_installed.cache_clear()
  yield
  registry.load_installed.cache_clear()
  for name in set(sys.modules) - before:
    if name.partition(".")[0] in ("own", "pack", "wrong"):
      del sys.modules[name]


# Another process, which imports each source that it is given in a fork of itself.
ELSEWHERE = """
import json, os, sys
import research.compress.cast
from research.core import plugins, registry
for line in sys.stdin:
  if os.fork() == 0:
    plugins.load_all([plugins.Source(*json.loads(line))])
    print(registry.names("compressor")[-1], plugins.fingerprint(), flush=True)
    os._exit(0)
  os.wait()
"""


@pytest.fixture(scope="module")
def elsewhere():
  """Imports a source in another process: the newest name there, and the fingerprint."""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  process = subprocess.Popen([sys.executable, "-c", ELSEWHERE], cwd=ROOT, **pipes)
  asked, answers = process.stdin, process.stdout
  assert asked
  assert answers

  def elsewhere(source: plugins.Source) -> list[str]:
    print(json.dumps(source), file=asked, flush=True)
    return answers.readline().split()

  yield elsewhere
  process.kill()
  process.communicate()


def own() -> Compressor:
  """A compressor."""
  return bf16()


def test_a_registered_name_is_built_checked_and_suggested():
  assert registry.register("compressor")(own) is own
  registry.register("compressor", "other")(own)
  assert "own" in registry.names("compressor")
  assert registry.build("aggregator", "gather_mean(other())")
  with pytest.raises(ValueError, match="compressor: unknown compressor 'onw'; did you mean 'own'"):
    registry.build("aggregator", "gather_mean(onw())")


def test_a_name_has_one_owner():
  registry.register("compressor")(own)
  registry.register("compressor")(own)  # as a reload does
  with pytest.raises(registry.NameTaken, match=r"own' is .*test_plugins\.own already"):
    registry.register("compressor", "own")(bf16)
  with pytest.raises(registry.NameTaken, match=r"research\.compress\.sparsify\.top_k already"):
    registry.register("compressor", "top_k")(own)
  with pytest.raises(registry.NameTaken, match=r"optax\.sgd already"):
    registry.register("optimizer", "sgd")(own)
  with pytest.raises(ValueError, match="kind='compresor' is unknown; did you mean 'compressor'"):
    registry.register("compresor")
  with pytest.raises(ValueError, match="not a valid name in a spec"):
    registry.register("compressor", "a b")(own)


@pytest.mark.parametrize("text", ["own", "own.py", "pack.own", "{}/pack/own.py"])
def test_a_module_or_a_file_is_imported_from_the_current_folder(text, tmp_path, elsewhere):
  (tmp_path / "pack").mkdir()
  for path in ("own.py", "pack/own.py"):
    (tmp_path / path).write_text(PLUGIN)
  plugins.load(text.format(tmp_path))
  assert registry.build("compressor", "rounded(8)")
  with pytest.raises(ValueError, match=r"rounded\(0\): bits=0 is not at least 1"):
    registry.build("compressor", "rounded(0)")
  with pytest.raises(ValueError, match="bits='a' is not a whole number"):
    registry.build("compressor", "rounded('a')")
  (source,) = plugins.carried()
  assert elsewhere(source) == ["rounded", plugins.fingerprint()]


def test_the_fingerprint_follows_the_code(tmp_path):
  assert plugins.fingerprint() == ""
  (tmp_path / "own.py").write_text(PLUGIN)
  plugins.load("own.py")
  before = plugins.fingerprint()
  (tmp_path / "own.py").write_text(PLUGIN + "\n")
  assert plugins.fingerprint() not in ("", before)


WRONG = {
  "onw.py": r"no such file or package; did you mean '.*own\.py'",
  "onw": "no module 'onw'; did you mean 'own'",
  "pack.missing": "no module 'missing' in 'pack'",
  "pack.inn": "no module 'inn' in 'pack'; did you mean 'inner'",
  "": "neither a module",
  "a-b": "neither a module",
  "a-b.py": "'a-b' is not a name",
  "./pak": "no such file or package; did you mean '.*pack'",
  "json.py": "the name 'json' is already that of the module .*; rename the file",
  "http://host/own.py": "URL",
  "clash.py": "'bf16' is research.compress.cast.bf16 already",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_imported_is_one_line(text, tmp_path):
  (tmp_path / "pack").mkdir()
  for path in ("own.py", "json.py", "pack/inner.py", "pack/__init__.py", "a-b.py"):
    (tmp_path / path).write_text("")
  clash = "from research.core.registry import register\nregister('compressor', 'bf16')(print)\n"
  (tmp_path / "clash.py").write_text(clash)
  with pytest.raises(ValueError, match=WRONG[text]) as caught:
    plugins.load(text)
  assert "\n" not in str(caught.value)


def test_an_error_of_the_module_itself_is_its_own(tmp_path):
  (tmp_path / "wrong.py").write_text("import nothing_of_that_name\n")
  with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
    plugins.load("wrong.py")


def test_an_installed_package_is_imported_when_a_name_is_not_built_in(tmp_path, monkeypatch):
  (tmp_path / "own.py").write_text(PLUGIN)
  monkeypatch.syspath_prepend(tmp_path)
  points = [importlib.metadata.EntryPoint("any", "own", registry.GROUP)]
  monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
  assert registry.build("compressor", "bf16()")
  assert "own" not in sys.modules
  assert registry.build("compressor", "rounded()")
  assert "own" in sys.modules


def test_a_run_of_an_installed_package_asks_for_no_import(tmp_path, monkeypatch, capsys):
  (tmp_path / "own.py").write_text(PLUGIN)
  (tmp_path / "config.json").write_text('{"import": ["own"]}')
  monkeypatch.syspath_prepend(tmp_path)
  points: list[importlib.metadata.EntryPoint] = []
  monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
  folder.note_missing_modules(tmp_path)
  assert capsys.readouterr().err.endswith("was made with --import=own\n")
  registry.load_installed.cache_clear()
  points.append(importlib.metadata.EntryPoint("any", "own", registry.GROUP))
  folder.note_missing_modules(tmp_path)
  assert capsys.readouterr().err == ""


def test_an_installed_package_that_fails_is_named(tmp_path, monkeypatch):
  (tmp_path / "wrong.py").write_text("1 / 0\n")
  monkeypatch.syspath_prepend(tmp_path)
  points = [importlib.metadata.EntryPoint("any", "wrong", registry.GROUP)]
  monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
  with pytest.raises(ZeroDivisionError) as caught:
    registry.build("compressor", "rounded()")
  assert "any = wrong" in caught.value.__notes__[0]


def test_a_module_that_registers_nothing_is_told_apart(tmp_path):
  (tmp_path / "wrong.py").write_text("x = 1\n")
  (tmp_path / "own.py").write_text(PLUGIN)
  assert not plugins.load("wrong.py")
  assert plugins.load("own.py")
  assert plugins.load("own.py")  # again
