"""Data files: where they are looked for, how they are fetched, what is refused."""

import bz2
import contextlib
import functools
import gzip
import hashlib
import http.server
import logging
import socket
import threading
from pathlib import Path

import pytest

from research.tasks import files

CONTENT = b"one line of data\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GZIP = functools.partial(gzip.compress, mtime=0)  # what names of tests are made of does not change
COMPRESS = {"": bytes, ".gz": GZIP, ".bz2": bz2.compress}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.delenv("RESEARCH_DATA_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "distributed-optimization-jax"


@pytest.fixture
def closed():
  """A URL that nobody answers."""
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
  return f"http://127.0.0.1:{port}/set"


@contextlib.contextmanager
def serving(pages):
  """A local server of {path: (bytes, announced length)}; yields its URL."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      if self.path not in pages:
        self.send_error(404)
        return
      body, length = pages[self.path]
      self.send_response(200)
      self.send_header("Content-Length", str(length))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *unused):
      pass

  server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def write(path: Path, content: bytes) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return path


def read(path: Path) -> bytes:
  with files.opened(path) as file:
    return file.read()


def one_line(caught) -> str:
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
@pytest.mark.parametrize("where", ["data_dir", "environment", "cache"])
@pytest.mark.parametrize("relative", ["sets/set", "set"])
def test_found(suffix, where, relative, tmp_path, cache, closed, monkeypatch):
  folder = cache if where == "cache" else tmp_path / where
  path = write(folder / (relative + suffix), COMPRESS[suffix](CONTENT))
  if where == "environment":
    monkeypatch.setenv("RESEARCH_DATA_DIR", str(folder))
  found = files.find("sets/set", str(folder) if where == "data_dir" else "", closed, SHA256)
  assert found == path
  assert read(found) == CONTENT


def test_the_users_directory_comes_first(tmp_path, cache, closed):
  path = write(tmp_path / "mine" / "set", CONTENT)
  write(cache / "set", CONTENT)
  assert files.find("set", str(tmp_path / "mine"), closed, SHA256) == path


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_fetched_once(suffix, cache):
  body = COMPRESS[suffix](CONTENT)
  with serving({f"/set{suffix}": (body, len(body))}) as url:
    found = files.find("sets/set", "", f"{url}/set{suffix}", SHA256)
  assert found == cache / f"sets/set{suffix}"
  assert read(found) == CONTENT
  assert files.find("sets/set", "", f"{url}/set{suffix}", SHA256) == found  # the server is gone
  assert [path.name for path in found.parent.iterdir()] == [found.name]
  ordinary = write(cache / "ordinary", b"")
  assert found.stat().st_mode == ordinary.stat().st_mode  # others may read it where files may be


@pytest.mark.parametrize(
  ("name", "body", "length", "error", "message"),
  [
    ("set", b"something else", 14, ValueError, f"/set is .* expected {SHA256[:12]}$"),
    ("set", CONTENT, len(CONTENT) + 9, FileNotFoundError, "broke after 17000 of 17009 bytes"),
    ("set.gz", GZIP(CONTENT)[:-20], None, ValueError, "/set.gz is truncated or no .gz"),
    ("other", CONTENT, None, FileNotFoundError, "cannot be fetched .Not Found."),
  ],
)
def test_a_bad_answer_leaves_nothing_behind(name, body, length, error, message, cache):
  url_name = "set" if name == "other" else name
  pages = {f"/{name}": (body, len(body) if length is None else length)}
  with serving(pages) as url, pytest.raises(error, match=message) as caught:
    files.find("sets/set", "", f"{url}/{url_name}", SHA256)
  one_line(caught)
  assert list((cache / "sets").iterdir()) == []


def test_offline_says_what_where_and_whence(tmp_path, cache, closed):
  with pytest.raises(FileNotFoundError) as caught:
    files.find("sets/set", str(tmp_path), closed, SHA256)
  message = one_line(caught)
  for part in ("sets/set is not in", str(tmp_path), str(cache), closed, f"{tmp_path}/sets/set"):
    assert part in message


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("set", CONTENT[:-1], f"truncated or another file: .* expected {SHA256[:12]}"),
    ("set.gz", GZIP(CONTENT)[:-20], "truncated or no .gz file"),
    ("set.gz", CONTENT, "truncated or no .gz file"),
    ("set.bz2", bz2.compress(CONTENT)[:-20], "truncated or no .bz2 file"),
    ("set.bz2", CONTENT, "truncated or no .bz2 file"),
  ],
)
def test_a_wrong_file_is_refused_with_its_path(name, content, message, tmp_path, closed):
  path = write(tmp_path / "mine" / name, content)
  with pytest.raises(ValueError, match=message) as caught:
    files.find("set", str(tmp_path / "mine"), closed, SHA256)
  assert str(path) in one_line(caught)


@pytest.mark.parametrize("name", ["set", "set.gz"])
@pytest.mark.parametrize("published", ["set", "set.gz"])
def test_a_damaged_file_of_the_cache_is_fetched_again(name, published, cache, closed):
  body = COMPRESS[Path(published).suffix](CONTENT)
  path = write(cache / name, body[:-20])
  with pytest.raises(ValueError, match=r"is truncated .* and http.* cannot be fetched") as caught:
    files.find("set", "", closed, SHA256)
  assert str(path) in one_line(caught)
  with serving({f"/{published}": (body, len(body))}) as url:
    found = files.find("set", "", f"{url}/{published}", SHA256)
  assert read(found) == CONTENT
  assert files.find("set", "", closed, SHA256) == found


def test_a_directory_that_is_none_is_refused(tmp_path, closed):
  with pytest.raises(ValueError, match="typo' is not a directory"):
    files.find("set", str(tmp_path / "typo"), closed)


def test_an_unrecorded_file_is_taken_with_a_warning(tmp_path, closed, caplog):
  path = write(tmp_path / "set", CONTENT)
  with caplog.at_level(logging.WARNING):
    assert files.find("set", str(tmp_path), closed) == path
  (record,) = caplog.records
  assert str(path) in record.getMessage()
  assert SHA256 in record.getMessage()


def test_what_a_package_does_not_ship_is_named():
  with pytest.raises(FileNotFoundError, match=r"installed sklearn does not contain data/none\.gz;"):
    files.shipped("sklearn", "data/none.gz")
  with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere_at_all'"):
    files.shipped("nowhere_at_all", "x")
