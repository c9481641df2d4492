"""Files that a project is used by: version, changelog, citation, Makefile, hooks, templates."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import research

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
FORMS = sorted(path.name for path in TEMPLATES.glob("*.yml") if path.name != "config.yml")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


def load(path: Path) -> Any:
  return yaml.safe_load(path.read_text(encoding="utf-8"))


def make(*words: str) -> str:
  line = ["make", "--no-print-directory", *words]
  return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


# ---- the version


def test_the_newest_release_of_the_changelog_is_the_version():
  headings = re.findall("^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert headings[0] == "Unreleased"
  released = [re.fullmatch(r"(\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d", line) for line in headings[1:]]
  assert all(released)
  assert released[0]
  assert released[0][1] == research.__version__


def test_no_other_file_states_the_version():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  assert project["project"]["dynamic"] == ["version"]
  assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "research.__version__"}
  assert "version" not in load(ROOT / "CITATION.cff")
  assert not re.search(r"\d+\.\d+\.\d+", (ROOT / "docs" / "conf.py").read_text())


def test_the_citation_agrees_with_the_project():
  citation = load(ROOT / "CITATION.cff")
  assert {"cff-version", "message", "title", "authors"} <= set(citation)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert citation["license"] == project["license"]
  assert [author["name"] for author in citation["authors"]] == [f"The authors of {project['name']}"]


# ---- make and the hooks


@needs_make
def test_make_lists_its_targets():
  text = (ROOT / "Makefile").read_text()
  targets = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
  listed = [line.split()[1] for line in make().splitlines()]
  assert listed == targets
  assert all(re.search(rf"^{name}:", text, re.MULTILINE) for name in targets)


@needs_make
@pytest.mark.parametrize(
  ("target", "command"),
  [
    ("setup", 'pip install -e ".[dev,docs]"'),
    ("hooks", "pre-commit install"),
    ("run", "python experiments/run.py --steps=1"),
    ("test", "pytest -k one"),
    ("slow", "pytest -m slow -k one"),
    ("lint", "ruff format --check ."),
    ("docs", "python -m sphinx -W --keep-going -b html docs docs/_build/html"),
    ("ci", "bash .ci/run"),
  ],
)
def test_a_target_runs_its_command(target, command):
  assert command in make("--dry-run", target, "FLAGS=--steps=1", "ARGS=-k one")


@needs_make
def test_hooks_and_ci_run_the_commands_of_make_lint():
  (local,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
  assert local["repo"] == "local"  # another source would have a version of its own
  hooks = {hook["id"]: hook for hook in local["hooks"]}
  assert {hook["entry"].split()[-1] for hook in hooks.values()} == {"style", "types"}
  assert "stages" not in hooks["style"]
  assert hooks["types"]["stages"] == ["manual"]
  linted, in_ci = make("--dry-run", "lint"), (ROOT / ".ci" / "run").read_text()
  for command in ("ruff check .", "ruff format --check .", "pyright --pythonpath"):
    assert command in linted
    assert command in in_ci


# ---- the templates


@pytest.mark.parametrize("name", FORMS)
def test_an_issue_form_is_one(name):
  form = load(TEMPLATES / name)
  assert set(form) == {"name", "description", "labels", "body"}
  ids = [element["id"] for element in form["body"]]
  assert len(set(ids)) == len(ids)
  assert all(isinstance(name, str) for name in ids)
  for element in form["body"]:
    assert element["type"] in ("textarea", "input", "dropdown", "checkboxes")
    assert element["attributes"]["label"]
    assert ("options" in element["attributes"]) == (element["type"] in ("dropdown", "checkboxes"))


def test_a_bug_report_asks_for_what_is_needed_to_repeat_it():
  body = {element["id"]: element for element in load(TEMPLATES / "bug_report.yml")["body"]}
  for name in ("command", "output", "environment"):
    assert body[name]["validations"]["required"]
  assert "traceback" in body["output"]["attributes"]["description"]
  assert "env.json" in body["environment"]["attributes"]["label"]
