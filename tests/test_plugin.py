"""A package of somebody else's, tests/plugin: its names in every execution, by --import alone."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from research.core import plugins, registry
from research.testing import check_aggregator, check_compressor, check_method
from research.training import loop
from research.training.config import Config, UsageError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "plugin" / "spirals"
RUN = ROOT / "experiments" / "run.py"
RELAXED = "relaxed(0.5, gather_mean(fixed()), period=2, relaxation=1.0)"
COMMON = ("--task=spirals()", "--mesh=data:2", "--batch_size=40", "--compilation_cache=off")
RUNS = {
  "simulate": ("--steps=40", f"--method={RELAXED}"),
  "spmd": ("--steps=40", f"--method={RELAXED}", "--executor=spmd"),
  "agreeing": ("--steps=40", "--method=data_parallel(sgd(0.5), agreeing(0.1))", "--model=mlp()"),
  "hogwild": (
    "--steps=80",
    "--method=asgd(sgd(0.2), mean())",
    "--executor=server",
    "--server_mode=hogwild",
  ),
}


class Ended(NamedTuple):
  """What is left of a command."""

  code: int
  err: str


def command(out: Path, *flags: str, python: str = sys.executable, **environ: str):
  """Starts run.py in an empty folder."""
  out.parent.mkdir(parents=True, exist_ok=True)
  cheap = {"JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  env = os.environ | cheap | {"JAX_PLATFORMS": "cpu"} | environ
  line = [python, str(RUN), f"--out={out}", *COMMON, *flags]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(line, cwd=out.parent, env=env, **pipes)  # pyright: ignore


def ended(process: subprocess.Popen) -> Ended:
  _, err = process.communicate(timeout=200)
  return Ended(process.returncode, err)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Path]:
  """The folder of a run that imports the package."""
  folder = tmp_path_factory.mktemp("runs")

  def of(name: str) -> Path:
    if not (folder / name).exists():
      code, err = ended(command(folder / name, f"--import={PACKAGE}", *RUNS[name]))
      assert code == 0, err
    return folder / name

  return of


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_command_trains_with_the_package(name, trained):
  summary = json.loads((trained(name) / "summary.json").read_text())
  assert summary["train_loss"] < 0.55


@pytest.mark.slow
def test_processes_on_ray_import_the_package(tmp_path):
  pytest.importorskip("ray")
  flags = ("--steps=40", f"--method={RELAXED}", "--executor=server", "--eval_every=0")
  code, err = ended(command(tmp_path / "run", f"--import={PACKAGE}", *flags))
  assert code == 0, err
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["train_loss"] < 0.55


@pytest.mark.slow
def test_executions_agree(trained):
  losses = [json.loads((trained(n) / "summary.json").read_text()) for n in ("simulate", "spmd")]
  assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_run_is_resumed_with_the_package_and_refused_without(trained, tmp_path):
  flags = ("--steps=60", RUNS["simulate"][1], "--allow_changes")
  bare, whole = command(trained("simulate"), *flags), command(tmp_path / "other", *flags)
  for process, notes in ((bare, 1), (whole, 0)):  # the note names the missing --import
    code, err = ended(process)
    assert code == 2
    *noted, line = err.splitlines()
    assert line.startswith("error: --task='spirals()'") or "unknown method 'relaxed'" in line
    assert len(noted) == notes
    assert all("was made with --import=" in note for note in noted)
  code, err = ended(command(trained("simulate"), f"--import={PACKAGE}", *flags))
  assert code == 0, err
  assert "resuming at step 40" in err


@pytest.fixture(scope="module")
def package():
  """The package in this process."""
  added, loaded, path = registry.ADDED, plugins._loaded, [*sys.path]
  registry.ADDED, plugins._loaded = {}, {}
  plugins.load(str(PACKAGE))
  yield
  registry.ADDED, plugins._loaded, sys.path[:] = added, loaded, path
  for name in [name for name in sys.modules if name.partition(".")[0] == "spirals"]:
    del sys.modules[name]


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_the_package_keeps_the_contracts():
  fixed = registry.build("compressor", "fixed(8)")
  check_compressor(fixed, content=lambda n, size: n + 4, idempotent=True)
  check_aggregator(registry.build("aggregator", "agreeing(0.25)"))
  check_method(registry.build("method", "relaxed(0.05, error_feedback(gather_mean(fixed(8))))"))


SPECS = {
  "method": (RELAXED, "relaxed(0.5, mean(), 8)", "data_parallel(sgd(0.1), agreeing(0.25))"),
  "compressor": ("fixed(8)", "hadamard(fixed(8))"),
}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("kind", "spec"), [(k, s) for k in SPECS for s in SPECS[k]])
def test_its_objects_say_their_specs(kind, spec):
  built = registry.build(kind, spec)
  assert registry.build(kind, repr(built)) == built


REFUSED = {
  "relaxed(0.5, gossip(ring()))": r"relaxed cannot be combined with .* \(local\)",
  "relaxed(0.5, sum_mean(fixed()))": "only a linear compressor",
  "relaxed(0.5, gather_mean(fixed(12)))": r"fixed\(12\): bits=12 is not 8 or 16",
  "relaxed(0.5, gather_mean(fixd()))": "unknown compressor 'fixd'; did you mean 'fixed'",
  "relaxed(0.5, mean(), period=0)": "period=0 is not at least 1",
  "relaxed('a', mean())": "learning_rate='a' is not a number",
  "relaxed(0.5, agreeing(2.0))": r"threshold=2.0 is not in \[0, 1\]",
  "relaxed(0.5, error_feedback(agreeing()))": r"error_feedback cannot be combined .* \(selects\)",
}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("method", REFUSED)
def test_what_built_ins_are_refused_it_is_refused(method, tmp_path):
  with pytest.raises(UsageError, match=REFUSED[method]) as caught:
    loop.train(Config(task="spirals()", method=method, out=str(tmp_path / "run")))
  assert str(caught.value).startswith("--method=")
  assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_installed_package_needs_no_import(tmp_path):
  """By its entry point, in an environment of its own that has our libraries.

  Building the package fetches setuptools.
  """
  venv.create(tmp_path / "env", with_pip=False, system_site_packages=True)
  python = str(tmp_path / "env" / "bin" / "python")
  purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
  libraries = subprocess.check_output([sys.executable, "-c", purelib], text=True).strip()
  path = os.pathsep.join([str(ROOT), libraries])
  target = subprocess.check_output([python, "-c", purelib], text=True).strip()
  shutil.copytree(PACKAGE.parent, tmp_path / "source")
  install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
  install += [f"--target={target}", str(tmp_path / "source")]
  subprocess.run(install, check=True)
  env = {"python": python, "PYTHONPATH": path}
  code, err = ended(command(tmp_path / "run", *RUNS["simulate"], **env))
  assert code == 0, err
