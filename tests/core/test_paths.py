"""Paths as users give them: what is expanded, what is rejected, and that all of them go one way."""

import ast
import errno
import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core import paths
from research.tasks import files
from research.training.config import UsageError

ROOT = Path(__file__).parents[2]
SOURCES = [
  path for folder in ("research", "experiments", "launch") for path in (ROOT / folder).rglob("*.py")
]


@pytest.fixture
def homeless(monkeypatch):
  """A user without $HOME and without an entry in the table of users."""

  def unknown(uid):
    raise KeyError(uid)

  for name in ("HOME", "XDG_CACHE_HOME", "RESEARCH_DATA_DIR"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_home_directory_is_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/of/mine")
  assert paths.local("~/runs") == Path("/home/of/mine/runs")
  assert paths.local("~root/x") == Path(pwd.getpwnam("root").pw_dir, "x")
  assert paths.local("./~/x") == Path.cwd() / "~" / "x"
  assert paths.local("a~/b") == Path("a~/b")


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("", "empty"),
    ("a\0b", "NUL"),
    ("gs://bucket/run", r"URL \(gs://\), .* mount"),
    ("s3://bucket", r"URL \(s3://\), .* mount"),
    ("HDFS://host:8020/x", "HDFS://"),
    ("file:///tmp/x", "only the path: '/tmp/x'"),
    ("~nosuchuser/x", "home directory '~nosuchuser' .* no such user"),
    ("caf\udce9", "not UTF-8 .*0xe9"),
    ("caf\ud800", "not UTF-8 .*0xd800"),
    ("a/" + "n" * 256, "more than 255 bytes"),
    ("a/" + "ü" * 128, "more than 255 bytes"),
    ("n/" * 2100, "longer than 4095 bytes"),
  ],
)
def test_what_is_no_local_path_is_rejected_in_one_short_line(text, says):
  with pytest.raises(ValueError, match=says) as caught:
    paths.local(text)
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
  "text", ["a b", "a\nb", "ü", "日本", "a:b", "c:/x", "a//b", "x" * 255, "$x"]
)
def test_odd_names_are_paths(text):
  assert paths.local(text) == Path(text)


@settings(derandomize=True, database=None, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_whatever_is_typed_is_a_path_or_a_line(text):
  found, said = None, ""
  try:
    found = paths.local(text)
  except ValueError as error:
    said = str(error)
  assert (found is None) == bool(said)
  assert said.isprintable()


def test_without_a_home_directory_there_is_no_cache_and_no_traceback(homeless, tmp_path):
  with pytest.raises(ValueError, match=r"home directory '~' is not known .*\$HOME is not set"):
    paths.local("~/runs")
  assert paths.local(tmp_path) == tmp_path
  assert paths.cache() is None
  (tmp_path / "set").write_bytes(b"data")
  assert files.find("set", str(tmp_path), "http://127.0.0.1:9/set") == tmp_path / "set"
  with pytest.raises(FileNotFoundError, match=r"no cache folder.* name its folder by data_dir"):
    files.find("other", "", "http://127.0.0.1:9/other")


def test_the_cache_is_where_the_user_says(monkeypatch):
  monkeypatch.setenv("HOME", "/home/of/mine")
  monkeypatch.setenv("XDG_CACHE_HOME", "~/kept")
  assert files.cache() == Path("/home/of/mine/kept/distributed-optimization-jax")
  monkeypatch.setenv("XDG_CACHE_HOME", "gs://kept")
  with pytest.raises(ValueError, match="XDG_CACHE_HOME='gs://kept': is a URL"):
    files.cache()


def test_data_folders_are_paths_too(monkeypatch, tmp_path):
  (tmp_path / "set").write_bytes(b"data")
  monkeypatch.setenv("HOME", str(tmp_path.parent))
  monkeypatch.setenv("RESEARCH_DATA_DIR", f"~/{tmp_path.name}")
  assert files.find("set", "", "http://127.0.0.1:9/set") == tmp_path / "set"
  with pytest.raises(ValueError, match="gs://"):
    files.find("set", "gs://data", "http://127.0.0.1:9/set")
  monkeypatch.setenv("RESEARCH_DATA_DIR", "gs://data")
  with pytest.raises(ValueError, match="RESEARCH_DATA_DIR='gs://data'"):
    files.find("set", "", "http://127.0.0.1:9/set")


def test_a_folder_of_results_can_be_made_and_is_not_yet(tmp_path):
  assert paths.writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
  assert not [*tmp_path.iterdir()]
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="file is not a writable folder"):
    paths.writable(tmp_path / "file" / "run")
  with pytest.raises(ValueError, match="files in it would exceed 4095 bytes"):
    paths.writable("/" + "n/" * 1990)


def test_a_full_disk_is_seen_through_what_was_raised_of_it():
  reason = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with pytest.raises(UsageError) as caught:
    raise UsageError("--out='x': no") from reason
  assert paths.is_full(caught.value)
  assert paths.is_full(Exception("No space left on device (os error 28)"))
  assert not paths.is_full(OSError(errno.EACCES, "no"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_of_users_go_through_one_function(path):
  """Nobody else expands `~`, or makes a path of a flag as it was typed."""
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, ast.Call):
      continue
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if path.name != "paths.py":
      assert called not in ("expanduser", "home"), f"line {node.lineno}"
    if called == "Path" and path.parent.name != "claims":
      given = " ".join(map(ast.unparse, node.args))
      assert not any(name in given for name in ("FLAGS.", "config.out", "data_dir")), (
        f"line {node.lineno}"
      )
