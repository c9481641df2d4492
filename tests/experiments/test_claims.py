"""Claims: each says what it is of, gates can fail, and what is recorded is what the pages show."""

import json
import math
import re
from pathlib import Path

import pytest

from experiments import reproduce
from experiments.claims.support import claim, settings, verdict
from research.training.config import UsageError

ROOT = Path(__file__).parents[2]
RECORDS = sorted(
  path
  for path in (ROOT / "results").glob("*/result.json")
  if "claim" in json.loads(path.read_text())
)


@pytest.mark.parametrize("name", reproduce.CLAIMS)
def test_a_claim_says_what_it_is_of(name):
  found = reproduce.module_of(name)
  told = found.__doc__ or ""
  assert re.search(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b", told)
  assert "Same:" in told
  assert "Scaled:" in told
  assert set(found.QUICK) <= set(found.FULL)
  assert set(found.SEEDS) in (set(), {"full", "quick"})


def test_every_claim_is_on_record():
  assert {path.parent.name for path in RECORDS} == set(reproduce.CLAIMS)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_a_record_is_in_full_and_its_pages_show_it(path):
  found = json.loads(path.read_text())
  assert (found["scale"], found["elsewhere"]) == ("full", False)
  assert found["settings"] == dict(reproduce.module_of(found["claim"]).FULL)
  for gate in found["gates"]:
    value = math.nan if gate["value"] is None else gate["value"]
    assert claim.Gate("", value, gate["relation"], gate["bound"]).holds == gate["holds"]
  assert (path.parent / "table.md").read_text().strip() == verdict.table(found)
  assert (path.parent / "figure.png").exists()


def test_the_overview_is_made_of_the_records(tmp_path):
  for path in RECORDS:
    (tmp_path / path.parent.name).mkdir()
    (tmp_path / path.parent.name / "result.json").write_text(path.read_text())
  titles = {name: reproduce.module_of(name).TITLE for name in reproduce.CLAIMS}
  verdict.write_overview(tmp_path, titles)
  assert (tmp_path / "README.md").read_text() == (ROOT / "results" / "README.md").read_text()


def findings(value: float, *, anywhere: bool = False) -> claim.Findings:
  gates = [claim.Gate("error", value, "<=", 1.0, anywhere)]
  return claim.Findings([claim.Beside("error", value, 0.5)], gates, [])


@pytest.mark.parametrize(
  ("value", "elsewhere", "expected"),
  [
    (1.0, False, "holds"),
    (1.5, False, "fails"),
    (math.nan, False, "fails"),
    (math.inf, False, "fails"),
    (1.5, True, "no gate applies"),
  ],
)
def test_a_gate_can_fail(value, elsewhere, expected):
  assert verdict.values(findings(value), elsewhere)["verdict"] == expected


def test_some_gates_apply_to_any_data():
  assert verdict.values(findings(1.5, anywhere=True), True)["verdict"] == "fails"


def test_the_deviation_is_ours_less_the_papers():
  assert verdict.values(findings(0.75), False)["values"][0]["deviation"] == 0.25


FULL = {"factor": 64.0, "steps": 4000, "rates": [0.1, 0.2], "methods": ["SGD", "ours"]}
QUICK = {"steps": 100}


def test_settings_by_scale_and_by_hand():
  assert settings.of_claim(FULL, QUICK, "full", {}) == FULL
  assert settings.of_claim(FULL, QUICK, "quick", {"factor": 2}) == FULL | {
    "factor": 2.0,
    "steps": 100,
  }


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (
      {"facto": 1.0},
      "--set=facto=1.0: unknown; did you mean 'factor'? legal: factor, steps, rates, methods",
    ),
    ({"steps": 1.5}, "--set=steps=1.5: not of the type int"),
    ({"steps": -5}, "--set='steps=-5': not a number from 1 on"),
    ({"factor": math.inf}, "--set='factor=inf': not a number from 0 on"),
    ({"rates": []}, "--set='rates=[]': not a list such as [0.1, 0.2]"),
    ({"rates": ["a"]}, "not a list such as [0.1, 0.2]"),
    ({"rates": [-1.0]}, "not a number from 0 on"),
    ({"methods": ["SGD"]}, "the compared methods depend on the scale"),
  ],
)
def test_refused_settings(given, said):
  with pytest.raises(UsageError, match=re.escape(said)):
    settings.of_claim(FULL, QUICK, "full", given)


def test_refused_claim():
  with pytest.raises(UsageError, match=re.escape("--claim='ef2': unknown; did you mean 'ef21'?")):
    reproduce.module_of("ef2")


@pytest.mark.parametrize("text", ["steps", "steps=4e", "steps=open(1)"])
def test_refused_texts(text):
  with pytest.raises(UsageError, match=re.escape(f"--set='{text}'")):
    reproduce.given([text])


def test_a_run_is_measured_and_remembered():
  lab = claim.Lab({}, 1, "digits()", lambda line: None)
  found = lab.run(model="logistic()", mesh="data:4", batch_size=32, steps=6, eval_every=3)
  assert found.column("step").tolist() == [3, 6]
  assert lab.runs[0]["accuracy"] == found.last("accuracy") > 0.3
  again = lab.run(model="logistic()", mesh="data:4", batch_size=32, steps=6, eval_every=3)
  assert again.rows == found.rows


@pytest.mark.slow
def test_a_run_that_diverges_ends_there():
  lab = claim.Lab({}, 1, "digits()", lambda line: None)
  method = "data_parallel(sgd(1e30), mean())"
  found = lab.run(model="mlp(hidden=[8])", method=method, mesh="data:2", steps=50, eval_every=10)
  assert not found.finite
  assert found.last("step") < 50


def test_a_grid_is_remembered():
  lab = claim.Lab({}, 1, "", lambda line: None)
  best, scores = lab.tune(
    "rate", (1.0, 2.0, 3.0), lambda rate: {2.0: 5.0, 3.0: 6.0}.get(rate, math.nan)
  )
  assert best == 2.0
  assert lab.grids == [
    {"what": "rate", "scores": {"1.0": None, "2.0": 5.0, "3.0": 6.0}, "best": 2.0}
  ]
  assert math.isnan(scores[1.0])


def test_data_with_further_arguments():
  lab = claim.Lab({}, 1, "libsvm('a9a', l2=1.0)", lambda line: None)
  assert lab.data(l2=2.0, nonconvex=0.1) == "libsvm('a9a', l2=1.0, nonconvex=0.1)"
  assert claim.Lab({}, 1, "digits()", print).data(a=1) == "digits(a=1)"
