"""The folder of a finished run: shown again whatever became of its files, never mislabelled."""

import json
import math
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from research.aggregate.mean import mean
from research.core import plugins
from research.tasks.convex.synthetic import mean_estimation
from research.training import fingerprint, loop, metrics
from research.training import folder as folders
from research.training.config import Config, UsageError

RUN = Config(
  task="mean_estimation(8, 4)",
  mesh="data:2",
  batch_size=2,
  steps=4,
  log_every=2,
  eval_every=2,
  checkpoint_every=2,
  checkpoint_seconds=0.0,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
  """The folder of a run."""
  out = tmp_path_factory.mktemp("made") / "run"
  loop.train(RUN.replace(out=str(out)))
  return out


@pytest.fixture
def out(made, tmp_path) -> Path:
  return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def undrawn(monkeypatch) -> None:
  """Runs without a plot."""
  monkeypatch.setattr(loop.figures, "loss_plot", lambda folder, summary: None)


def stored(out: Path) -> dict:
  return json.loads((out / "summary.json").read_text())


def train(out: Path, **changes) -> dict:
  return loop.train(RUN.replace(out=str(out), **changes))[0]


@pytest.mark.parametrize(
  "edited",
  [
    {"train_loss": None, "eval": "?"},
    {"steps": "4"},
    {"wire": {}},
    {"wire": None},
    {"seconds": "?"},
    *({name: ...} for name in ("wire", "eval", "steps", "task", "params_sha256", "workers")),
  ],
)
def test_an_edited_summary_is_not_shown(edited, out, capsys):
  before = stored(out)
  changed = {name: x for name, x in (before | edited).items() if x is not ...}
  (out / "summary.json").write_text(json.dumps(changed))
  assert folders.finished(RUN, out, 4) is None
  assert "was changed, and is written again" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_an_edited_summary_is_made_again(out):
  before = stored(out)
  (out / "summary.json").write_text("{}")
  train(out)
  same = ("params_sha256", "train_loss", "eval", "steps", "stopped_because")
  assert {name: stored(out)[name] for name in same} == {name: before[name] for name in same}


def test_a_number_that_was_not_finite_is_shown_as_nan(out, capsys):
  (out / "summary.json").write_text(json.dumps(stored(out) | {"train_loss": None}))
  assert math.isnan(train(out)["train_loss"])
  assert "complete" in capsys.readouterr().err


def test_a_complete_run_without_its_plot_draws_it(out, capsys):
  (out / "loss.png").unlink()
  train(out)
  assert (out / "loss.png").stat().st_size > 0
  assert "complete" in capsys.readouterr().err


def test_a_complete_run_on_a_read_only_disk_is_shown(out, monkeypatch):
  want = stored(out)
  monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
  assert train(out)["params_sha256"] == want["params_sha256"]
  with pytest.raises(UsageError, match="is not a writable folder"):
    train(out.with_name("other"))


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_is_not_relabelled(out):
  before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
  with pytest.raises(UsageError, match="other flags that has done its 4 steps"):
    train(out, seed=5, allow_changes=True)
  assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
  assert train(out, seed=5, steps=6, allow_changes=True)["steps"] == 6


@pytest.mark.usefixtures("undrawn")
def test_a_renamed_checkpoint_is_set_aside(out, capsys):
  (out / "summary.json").unlink()
  (out / "checkpoints" / "4").rename(out / "checkpoints" / "6")
  assert train(out, steps=8, allow_changes=True)["steps"] == 8
  told = capsys.readouterr().err
  assert "checkpoint 6 is damaged and was renamed to 6.damaged: it is that of step 4" in told
  assert "resuming at step 2" in told


@pytest.mark.parametrize("gradient_norm", [1.0, math.nan])
def test_an_evaluation_that_is_not_finite_ends_the_run(gradient_norm, tmp_path, monkeypatch):
  bad = {"loss": jnp.inf, "gradient_norm": gradient_norm}
  fake = lambda params, data, gradient=False: bad
  monkeypatch.setattr(metrics, "evaluator", lambda *args: fake)
  with pytest.raises(loop.NonFinite) as caught:
    train(tmp_path / "run")
  assert "training loss" in str(caught.value)
  assert ("gradient norm" in str(caught.value)) == math.isnan(gradient_norm)
  assert "not finite at step 2; no checkpoint was saved yet" in str(caught.value)
  rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["step"] for row in rows] == [2]


def test_files_of_plugins_are_part_of_the_code(tmp_path, monkeypatch):
  """A registered function may return built-in parts alone, and nothing of its own."""
  file = tmp_path / "plugin.py"
  monkeypatch.setattr(plugins, "files", lambda: [file])
  found = []
  for text in ("rate = 1.0\n", "rate = 2.0\n"):
    file.write_text(text)
    found.append(fingerprint.of_specs(mean_estimation(8, 4), mean())["code"])
  assert found[0] != found[1]
  monkeypatch.setattr(plugins, "files", list)
  assert "code" not in fingerprint.of_specs(mean_estimation(8, 4), mean())
