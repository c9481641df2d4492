"""File formats: one content in any legal form reads the same, and what is illegal names its line.

Each reader gets a valid file, the same in other forms, and the file with one field or line damaged.
"""

import contextlib
import datetime
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from research.models import classic
from research.tasks import texts
from research.tasks.convex import libsvm
from research.tasks.finance import cvar, frontier
from research.tasks.language import text_files
from research.tasks.language.token_files import TokenFile
from research.tasks.recommend import movielens
from research.tasks.search import graphs

QUICK = settings(
  max_examples=30,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


class Format(NamedTuple):
  """A valid file and what reads it."""

  lines: list[list[str]]
  separator: str
  read: Callable[[str], Any]


def _ratings(path: str) -> Any:
  train, test = movielens.load(path)
  rows = np.concatenate([np.stack([*part]) for part in (train, test)], 1)
  return rows[:, np.lexsort(rows)]


def _examples(path: str) -> Any:
  return libsvm.libsvm(Path(path).name, model=classic.logistic(), data_dir=str(Path(path).parent))


# Day i has the prices 100 + i, 50 + 3i mod 7 and 1 + i mod 3.
DAYS = [datetime.date(2023, 12, 28) + datetime.timedelta(i) for i in range(20)]
PRICES = [[100 + i, 50 + 3 * i % 7, 1 + i % 3] for i in range(20)]
RETURNS = np.array(PRICES[1:], float) / np.array(PRICES[:-1], float) - 1

FORMATS = {
  "prices": Format(
    [["date", "A", "B", "C"], *([str(d), *map(str, p)] for d, p in zip(DAYS, PRICES, strict=True))],
    ",",
    cvar.load,
  ),
  "portfolio": Format(
    [
      *(["3"], ["0.1", "0.5"], ["0.2", "0.25"], ["-0.3", "1"]),
      *(["1", "1", "1"], ["1", "2", "0.5"], ["1", "3", "-0.25"]),
      *(["2", "2", "1"], ["2", "3", "0"], ["3", "3", "1"]),
    ],
    " ",
    lambda path: tuple(frontier.load(path))[:2],
  ),
  "edges": Format(
    [["1", "2"], ["2", "3"], ["-3", "1"], ["900000000000000000", "1"]],
    "\t",
    lambda path: tuple(graphs.load(path, "")),
  ),
  "ratings": Format(
    [[str(1 + i // 4), str(1 + i * 7 % 9), str(1 + i % 5), "881250949"] for i in range(20)],
    "\t",
    _ratings,
  ),
  "examples": Format(
    [["+1", "1:0.5", "3:-2"], ["-1", "2:1e-3"], ["+1", "1:3", "2:.1", "7:4"]],
    " ",
    lambda path: _examples(path).train,
  ),
}


@pytest.fixture(autouse=True)
def unpublished(monkeypatch):
  """No name has a recorded sha256, and nothing is fetched."""
  monkeypatch.setattr(libsvm, "SHA256", {})
  monkeypatch.setattr(libsvm, "URL", "http://127.0.0.1:9/")


def write(path: Path, lines: list[list[str]], separator: str, end: str = "\n", bom="") -> str:
  content = bom + "".join(separator.join(line) + end for line in lines)
  path.write_bytes(content.encode())
  return str(path)


def refused(call: Callable[[], Any], *parts: str) -> str:
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    call()
  message = str(caught.value)
  assert "\n" not in message
  assert len(message) < 600
  for part in parts:
    assert part in message
  return message


def same(found: Any, wanted: Any) -> None:
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


# --- Any legal form


@QUICK
@given(data=st.data())
def test_prices_are_read_in_the_order_of_their_dates(tmp_path, data):
  form = data.draw(st.sampled_from(["%Y-%m-%d", "%Y/%m/%d", "%Y%m%d", "%Y-%m-%d 00:00:00-05:00"]))
  form = data.draw(st.sampled_from([form, "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y"]))
  rows = [[d.strftime(form), *map(str, p)] for d, p in zip(DAYS, PRICES, strict=True)]
  rows = data.draw(st.permutations(rows))
  header = [["Date", "600519", "000001", "Ørsted"], ["", "A", "B", "C"]]
  lines = [*data.draw(st.sampled_from([[], *([line] for line in header)])), *rows]
  for blank in data.draw(st.sampled_from([[], [""], ["", "", "", ""], [" "]])):
    lines.append([blank])
  bom = data.draw(st.sampled_from(["", "\ufeff"]))
  path = write(tmp_path / "t.csv", lines, ",", data.draw(st.sampled_from(["\n", "\r\n"])), bom)
  np.testing.assert_allclose(cvar.load(path), RETURNS, rtol=1e-12)


def test_a_day_without_a_price_has_no_return(tmp_path):
  lines = [line[:] for line in FORMATS["prices"].lines]
  lines[4][2] = lines[1][1] = ""
  found = cvar.load(write(tmp_path / "t.csv", lines, ","))
  np.testing.assert_allclose(found, np.delete(RETURNS, [0, 2, 3], 0), rtol=1e-12)


@QUICK
@given(data=st.data())
def test_pairs_of_assets_come_in_any_order(tmp_path, data):
  lines, separator, read = FORMATS["portfolio"]
  wanted = read(write(tmp_path / "p.txt", lines, separator))
  deviations, correlation = np.array([0.5, 0.25, 1]), [[1, 0.5, -0.25], [0.5, 1, 0], [-0.25, 0, 1]]
  same(wanted, ([0.1, 0.2, -0.3], np.outer(deviations, deviations) * correlation))
  pairs = data.draw(st.permutations(lines[4:]))
  pairs = [[*line[1::-1], line[2]] if data.draw(st.booleans()) else line for line in pairs]
  if data.draw(st.booleans()):
    pairs = [line for line in pairs if line[0] != line[1]]
  end, bom = data.draw(ENDS), data.draw(st.sampled_from(["", "\ufeff"]))
  same(read(write(tmp_path / "q.txt", [*lines[:4], *pairs], "  ", end, bom)), wanted)


@settings(QUICK, max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("name", ["edges", "ratings", "examples"])
def test_blank_lines_and_line_ends_change_nothing(tmp_path, name, data):
  lines, separator, read = FORMATS[name]
  wanted = read(write(tmp_path / "a", lines, separator))
  lines = list(lines)
  comments = {"edges": [["# c"], ["  # c"], ["% sym"], [" %"]], "examples": [["# c"]]}.get(name, [])
  for line in data.draw(st.lists(st.sampled_from([[], ["  "], *comments]), max_size=5)):
    lines.insert(data.draw(st.integers(0, len(lines))), line)
  end = "\n" if name == "examples" else data.draw(ENDS)
  same(read(write(tmp_path / "b", lines, separator, end)), wanted)


# --- One damaged field or line


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_field_is_refused_with_its_line(tmp_path, name, data):
  form = FORMATS[name]
  lines = [line[:] for line in form.lines]
  row = data.draw(st.integers(int(name == "prices"), len(lines) - 1))
  column = data.draw(st.integers(0, len(lines[row]) - 1))
  junk = ["x", "nan", "inf", "-Infinity", "1e400", "0x10", "-", "1.5.1", "é", "9" * 5000]
  if name != "examples":
    junk += ["1_0", "\u0661"]  # float() takes both
  lines[row][column] = data.draw(st.sampled_from(junk))
  if name == "examples" and column and data.draw(st.booleans()):
    lines[row][column] = form.lines[row][column].partition(":")[0] + ":" + lines[row][column]
  path = write(tmp_path / "file", lines, form.separator)
  refused(lambda: form.read(path), f"{path}, line {row + 1}: ")


@pytest.mark.parametrize("name", ["prices", "portfolio", "ratings"])
def test_a_line_that_is_there_twice_is_refused(tmp_path, name):
  lines, separator, read = FORMATS[name]
  for row in range(4 if name == "portfolio" else 1, len(lines)):
    path = write(tmp_path / "file", [*lines, lines[row]], separator)
    refused(lambda path=path: read(path), f"{path}, line {len(lines) + 1}: ", "already")


def test_a_portfolio_file_without_one_line_is_refused(tmp_path):
  lines, separator, read = FORMATS["portfolio"]
  for row in range(len(lines)):
    path = write(tmp_path / "file", lines[:row] + lines[row + 1 :], separator)
    refused(lambda path=path: read(path), path)
    path = write(tmp_path / "file", lines[:row], separator)
    refused(lambda path=path: read(path), f"{path} ends after {row} lines")


@pytest.mark.parametrize(
  ("name", "row", "line", "message"),
  [
    ("prices", 3, "2023-12-30,102,0,3", "the price '0' is not a positive number"),
    ("prices", 3, "2023-12-30,102,-6,3", "the price '-6' is not a positive number"),
    ("prices", 3, "2023-12-30,102,6", "has 3 cells, and the first line 4"),
    ("prices", 3, "2023-12-30,102,6,3,1", "has 5 cells"),
    ("prices", 3, "2023-02-30,102,6,3", "'2023-02-30' is not a date such as 2024-01-31"),
    ("prices", 3, "30/12/2023,102,6,3", "'30/12/2023' is not a date such as 2024-01-31, in the"),
    ("prices", 3, ",102,6,3", "'' is not a date"),
    ("prices", 3, "2023-12-30,1e300,6,1e-300", "a return since the day before is not finite"),
    ("prices", 3, '"2023-12-30,102,6,3', "is not comma-separated"),
    ("portfolio", 0, "0", "number of assets"),
    ("portfolio", 1, "0.1 -0.5", "the standard deviation -0.5 is not in [0, "),
    ("portfolio", 1, "1e300 0.5", "the mean 1e+300 is not in ["),
    ("portfolio", 4, "1 1 0.3", "the correlation of asset 1 with itself is 0.3, not 1"),
    ("portfolio", 5, "1 2 1.5", "the correlation 1.5 is not in [-1, 1]"),
    ("portfolio", 5, "1 2.5 0.5", "'2.5' is not a whole number"),
    ("portfolio", 5, "0 2 0.5", "asset 0 is not one of the 3"),
    ("portfolio", 5, "1 4 0.5", "asset 4 is not one of the 3"),
    ("edges", 1, "2 3 0.5", "weights are not supported"),
    ("edges", 1, "2", "two fields, not 1"),
    ("edges", 1, "2,3", "two fields, not 1"),
    ("edges", 1, "2 3 # c", "two fields, not 4"),
    ("ratings", 1, "1 8 2 0 0", "not 5 fields"),
    ("ratings", 1, "1 8", "not 2 fields"),
    ("ratings", 1, "1 0 2", "user 1, item 0: both are numbered from 1"),
    ("ratings", 1, "1 8 0.5", "a rating of 0.5 is out of range; legal: 1 to 5"),
    ("ratings", 1, "1::8::5::0", "not 1 fields"),
    ("examples", 1, "-1 2:1e39", "1e+39 does not fit float32"),
    ("examples", 1, "-1 2:1 2:1", "index 2 after 2"),
    ("examples", 1, "-1 3000000000:1", "index 3000000000 after 0"),
    ("examples", 1, "0.5 2:1", "label 0.5 is not an integer"),
  ],
)
def test_an_illegal_line_is_refused(tmp_path, name, row, line, message):
  lines, separator, read = FORMATS[name]
  path = write(tmp_path / "f", [*lines[:row], [line], *lines[row + 1 :]], separator)
  refused(lambda: read(path), f"{path}, line {row + 1}: ", message)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("prices", "", "has no line 'DATE,PRICE,...'"),
    ("prices", "date,A\n", "not have three days"),
    ("prices", "date;A\n2020-01-01;1\n", "has no line 'DATE,PRICE,...'"),
    ("prices", "101,52\n102,53\n103,54\n", "line 1: '101' is not a date"),
    ("prices", "01/02/2020,1\n02/02/2020,2\n03/02/2020,3\n", "may be day/month or month/day"),
    ("portfolio", "", "ends after 0 lines"),
    ("portfolio", "1000000000\n0.1 1\n", "ends after 2 lines: 1 of 1000000000 assets are there"),
    ("portfolio", "1\n0.1 1\n0.2 1\n", "line 3: a line of a correlation is 'i j r'"),
    ("portfolio", "2\n0.1 1\n1 2 0.5\n", "line 3: a line of an asset has its mean and deviation"),
    ("portfolio", "2\n0.1 0\n0.2 0\n1 2 0\n", "all standard deviations are below 1e-100"),
    ("portfolio", "2\n0.1 1e-200\n0.2 0\n1 2 0\n", "all standard deviations are below 1e-100"),
    ("portfolio", "2\n0.1 1\n0.2 1\n1 1 1\n1 2 0\n", "assets 2 and 2 is missing"),
    ("portfolio", "3\n0 1\n1 1\n1 1\n1 2 .9\n1 3 .9\n2 3 -.9\n", "not positive semidefinite"),
    ("edges", "% only\n", "has no edges"),
    ("ratings", "", ": 0 ratings; at least two"),
    ("ratings", "1 1 5 0\n", ": 1 ratings; at least two"),
    ("ratings", "1 1 5\n3 1 4\n", "user 2 of 3 has no ratings"),
    ("ratings", "1 1 5\n2 100000000000 4\n", "number the items without large gaps"),
    ("examples", "", "has no examples"),
  ],
)
def test_a_file_that_is_wrong_as_a_whole_is_refused(tmp_path, name, content, message):
  (tmp_path / "f").write_text(content)
  refused(lambda: FORMATS[name].read(str(tmp_path / "f")), str(tmp_path / "f"), message)


# --- Text and tokens

BINARIES = {
  "tokens": np.arange(400, dtype=np.uint16).tobytes(),
  "small tokens": np.arange(100, dtype=np.uint16).tobytes(),
  "UTF-16": "Windows".encode("utf-16"),
  "large tokens": np.arange(70000, 70100).tobytes(),
  "UTF-16 without a mark": "Windows".encode("utf-16-le"),
  "UTF-32": "Windows".encode("utf-32"),
  "Latin-1": "Größe".encode("latin-1"),
  "half a character": "ß".encode()[:1],
}


@pytest.mark.parametrize("kind", BINARIES)
def test_binaries_are_no_text(tmp_path, kind):
  path = tmp_path / "x.bin"
  path.write_bytes(BINARIES[kind])
  message = refused(lambda: TokenFile(path), str(path), "tokens are read from .npy files")
  assert ("save it as UTF-8" in message) == (kind in ("UTF-16", "UTF-32"))
  refused(lambda: text_files.text(str(path), model=classic.linear()), str(path))
  for form in FORMATS.values():
    refused(lambda form=form: form.read(str(path)), str(path))


@QUICK
@given(content=st.text(st.characters(exclude_characters="\0"), min_size=1), data=st.data())
def test_a_check_by_blocks_finds_what_decoding_does(tmp_path, content, data):
  path = tmp_path / "text"
  encoded = bytearray(content.encode())
  if data.draw(st.booleans()):
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(1, 255))
  path.write_bytes(encoded)
  legal = encoded.decode(errors="replace").encode() == encoded
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(texts, "BLOCK", data.draw(st.integers(4, 9)))
    if legal:
      texts.check(path)
      texts.check(path, 2)
    else:
      refused(lambda: texts.check(path), str(path), "byte ")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_tokens_of_any_integer_type(tmp_path, kind, order):
  wanted = np.arange(100)
  np.save(tmp_path / "t.npy", wanted.astype(order + kind))
  found = TokenFile(tmp_path / "t.npy")
  np.testing.assert_array_equal(found[3:90], wanted[3:90])
  assert found[3:90].dtype == found.dtype
  assert found.dtype.isnative
  assert found.dtype.itemsize <= 4


@pytest.mark.parametrize("token", [-1, 2**31, 2**32 + 1, -(2**63)])
def test_a_token_that_does_not_fit_is_refused_when_it_is_read(tmp_path, token):
  np.save(tmp_path / "t.npy", np.array([1, 2, token]))
  found = TokenFile(tmp_path / "t.npy")
  assert found[:2].tolist() == [1, 2]
  refused(lambda: found[1:3], "t.npy has tokens from", f"{token}", "not in [0, 2^31)")


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros(3, bool), np.zeros((3, 1), np.int32)])
def test_what_is_no_row_of_integers_is_refused(tmp_path, wrong):
  np.save(tmp_path / "t.npy", wrong)
  refused(lambda: TokenFile(tmp_path / "t.npy"), "t.npy holds", "integers such as int32")


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # a header as Python 2 wrote it
@QUICK
@given(place=st.integers(0, 127), byte=st.integers(0, 255), cut=st.integers(0, 140))
def test_a_damaged_token_file_raises_nothing_else(tmp_path, place, byte, cut):
  file = io.BytesIO()
  np.save(file, np.arange(10, dtype=np.uint16))
  content = bytearray(file.getvalue()[: cut or None])
  content[min(place, len(content) - 1)] = byte
  (tmp_path / "t.npy").write_bytes(content)
  with contextlib.suppress(ValueError):
    found = TokenFile(tmp_path / "t.npy")
    assert len(found[:]) == len(found)


def test_a_stretch_of_nul_bytes_in_a_stream_is_refused(tmp_path):
  """What a crash leaves of a file that was being written."""
  (tmp_path / "text").write_bytes(b"text" * 50000 + bytes(3 * texts.BLOCK) + b"text" * 50000)
  refused(lambda: TokenFile(tmp_path / "text"), "of 65536 bytes are NUL")
