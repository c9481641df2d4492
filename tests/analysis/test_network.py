"""The constants of a network: what a link is, and files of measured constants."""

import json
import math

import pytest

from research.analysis import network
from research.analysis.network import Kernel, Network


@pytest.mark.parametrize(
  ("spec", "link"),
  [
    ("100mbit", (1e8, 0)),
    ("100mbit,20ms", (1e8, 0.02)),
    ("1.5gbit,5us", (1.5e9, 5e-6)),
    (" 10 kbit , 1s ", (1e4, 1)),
    (".5tbit,0s", (5e11, 0)),
    ("56000bit", (56e3, 0)),
    ("100Mbit", (1e8, 0)),
  ],
)
def test_a_link_is_a_bandwidth_and_a_latency(spec, link):
  assert network.parse_link(spec) == pytest.approx(link)


@pytest.mark.parametrize(
  ("spec", "wrong", "legal"),
  [
    ("", "''", "mbit"),
    ("100", "'100'", "mbit"),
    ("100mb", "'100mb'", "kbit, mbit"),
    ("mbit", "'mbit'", "mbit"),
    ("-1mbit", "'-1mbit'", "mbit"),
    ("nan mbit", "'nan mbit'", "mbit"),
    ("0mbit", "'0mbit'", "not a bandwidth"),
    ("20ms", "'20ms'", "mbit"),
    ("100mbit,", "''", "us, ms, s"),
    ("100mbit,20", "'20'", "us, ms, s"),
    ("100mbit,1gbit", "'1gbit'", "us, ms, s"),
    ("100mbit,20ms,3ms", "'20ms,3ms'", "us, ms, s"),
  ],
)
def test_another_link_is_refused_by_what_is_wrong(spec, wrong, legal):
  with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
    network.parse_link(spec)
  assert wrong in str(error.value)
  assert legal in str(error.value)


MEASURED = Network(
  5e7, 1e8, 0.001, burst=1e5, sharing=2, efficiency=0.95, message=1e-4, byte=1e-9, computing=0.01,
  spread=0.1, kernels={"int8()": Kernel(1e-9, 2e-9)}, workers=4,
)  # fmt: skip


def written(path, contents) -> str:
  path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
  return str(path)


def test_constants_survive_their_file(tmp_path):
  for one in (MEASURED, Network()):
    place = written(tmp_path / "net.json", one.as_dict())
    assert network.parse(place) == one.replace(source=place)
    place = written(tmp_path / "probe.json", {"constants": one.as_dict(), "samples": []})
    assert network.parse(place) == one.replace(source=place)


def test_the_machines_of_a_file_can_be_on_another_link(tmp_path):
  place = written(tmp_path / "net.json", MEASURED.as_dict()) + ",1gbit,20ms"
  found = network.parse(place)
  assert found.upload == found.download == 0.95e9
  assert found.latency == 0.02
  assert found == MEASURED.replace(upload=0.95e9, download=0.95e9, latency=0.02, source=place)


def test_workers_that_share_a_link_share_its_slower_direction():
  assert MEASURED.bits_per_second == 5e7 / 2
  assert network.parse("100mbit,20ms").bits_per_second == 1e8
  assert Network().bits_per_second == math.inf


@pytest.mark.parametrize(
  ("contents", "words"),
  [
    ("{", "is not a JSON file"),
    ([1], "no table of constants"),
    ({"latensy": 1}, "did you mean 'latency'?"),
    ({"latency": -1}, "latency=-1 is not in [0, inf)"),
    ({"efficiency": 2}, "efficiency=2 is not in (0, 1]"),
    ({"upload": -5}, "upload=-5 is not above 0"),
    ({"sharing": 0}, "sharing=0 is not at least 1"),
    ({"latency": "fast"}, "probe.py"),
    ({"kernels": {"int8()": {"encode": 1}}}, "probe.py"),
  ],
)
def test_a_file_with_other_contents_is_refused_in_a_line(tmp_path, contents, words):
  with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
    network.parse(written(tmp_path / "net.json", contents))
  assert words in str(error.value)


def test_a_file_that_does_not_exist_is_refused_in_a_line(tmp_path):
  with pytest.raises(ValueError, match=r"cannot read .*No such file"):
    network.parse(str(tmp_path / "net.json"))
