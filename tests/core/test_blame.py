"""Faults in a user's own code: they are no wrong flags, and their tracebacks are shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from research.command import errors
from research.core import blame, plugins, registry
from research.training import folder, loop
from research.training.config import Config, UsageError

RUN = Path(__file__).parents[2] / "experiments" / "run.py"

# A module of a user's own.
PLUGIN = '''
import jax, jax.numpy as jnp
from research.core.registry import register
from research.core.base import Aggregator, Compressor
from research.core.task import Task
from research.methods.data_parallel import DataParallel
from research.aggregate.mean import mean
from research.tasks.convex.synthetic import mean_estimation
import optax

@register("task")
def of_types() -> Task:
  """A loss that JAX refuses."""
  def loss(params, batch, key):
    return jnp.dot(jnp.ones((2, 3)), jnp.ones((2, 3)))
  return mean_estimation(8, 4)._replace(loss=loss)

@register("task")
def of_values() -> Task:
  """A loss that refuses its batch."""
  def loss(params, batch, key):
    raise ValueError("no such labels")
  return mean_estimation(8, 4)._replace(loss=loss)

@register("task")
def of_names() -> Task:
  """A metric that looks for what is not there."""
  return mean_estimation(8, 4)._replace(evaluate=lambda params, batch: {"a": batch["nothing"]})

@register("task")
def init_fails() -> Task:
  """A model that cannot be made."""
  def init(key):
    return {"w": jnp.zeros(3) + jnp.zeros(4)}
  return mean_estimation(8, 4)._replace(init=init)

@register("method", "own_method")
class Broken(DataParallel, name="own_method"):
  """A sync that fails."""
  inner: optax.GradientTransformation = optax.sgd(0.1)
  aggregator: Aggregator = mean()
  def sync(self, local, state, *, key, presence=None):
    return jnp.reshape(state.params, (17, 3))

@register("aggregator")
class Fails(Aggregator, name="own_aggregator"):
  """An aggregator that fails where a method of ours calls it."""
  def aggregate(self, tree, state, key, presence=None):
    return int("x")

@register("aggregator")
class Pairs(Aggregator, name="pairs"):
  """An aggregator that returns a pair."""
  def aggregate(self, tree, state, key, presence=None):
    return tree, state

@register("compressor")
class Fussy(Compressor, name="fussy"):
  """An encoding that raises while it is tried."""
  def encode(self, x, shared, own):
    raise ValueError("no such dtype")
  def decode(self, payload, like, shared):
    return payload

@register("aggregator")
def misspelt(size: int) -> Aggregator:
  """A factory with a mistake in it."""
  return mean(sise=size)

@register("aggregator")
def choosy(size: int) -> Aggregator:
  """A factory that refuses a value, as ours do."""
  if size < 1:
    raise ValueError(f"size={size} is not at least 1")
  return mean()

@register("method")
def asks_too_much() -> DataParallel:
  """Refused by a check of ours."""
  return DataParallel(optax.sgd(0.1), mean(), period=0)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
  """The folder of the module, whose names are registered."""
  (tmp_path / "mine.py").write_text(PLUGIN)
  monkeypatch.setattr(registry, "ADDED", {})
  monkeypatch.setattr(plugins, "_loaded", {})
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.delitem(sys.modules, "mine", raising=False)
  plugins.load(str(tmp_path / "mine.py"))
  yield tmp_path
  del sys.modules["mine"]


def trained(folder: Path, **flags: str):
  small = {"task": "mean_estimation(8, 4)", "mesh": "data:2", "batch_size": 2, "steps": 2}
  return loop.train(Config(**{**small, "out": str(folder / "run"), **flags}))


FAULTS = {
  "task": {
    "of_types()": ("loss of of_types failed (mine.py, line 15)", TypeError),
    "of_values()": ("loss of of_values failed (mine.py, line 22)", ValueError),
    "of_names()": ("a lambda of of_names failed (mine.py, line 28)", KeyError),
    "init_fails()": ("init of init_fails failed (mine.py, line 34)", TypeError),
  },
  "method": {
    "own_method()": ("sync of Broken failed (mine.py, line 43)", TypeError),
    "data_parallel(sgd(0.1), own_aggregator())": (
      "aggregate of Fails failed (mine.py, line 49)",
      ValueError,
    ),
    "data_parallel(sgd(0.1), gather_mean(fussy()))": (
      "encode of Fussy failed (mine.py, line 61): ValueError: no such dtype",
      ValueError,
    ),
    "data_parallel(sgd(0.1), misspelt(1))": ("misspelt failed (mine.py, line 68)", TypeError),
  },
}


@pytest.mark.parametrize("executor", ["simulate", "spmd"])
@pytest.mark.parametrize(("flag", "spec"), [(f, s) for f in FAULTS for s in FAULTS[f]])
def test_a_fault_in_a_users_code_keeps_its_traceback(flag, spec, executor, plugin):
  said, kind = FAULTS[flag][spec]
  with pytest.raises(kind) as caught:
    trained(plugin, executor=executor, **{flag: spec})
  assert not isinstance(caught.value, UsageError)
  assert blame.fault(caught.value).startswith(said)
  assert any(Path(entry.path).name == "mine.py" for entry in caught.traceback)


REFUSED = {
  "data_parallel(sgd(0.1), choosy(0))": "choosy(0): size=0 is not at least 1",
  "asks_too_much()": "asks_too_much(): ",
  "data_parallel(sgd(0.1), choosy('a'))": "size='a' is not a whole number",
  "data_parallel(sgd(0.1), krum(5))": "krum",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_a_value_that_a_check_refuses_is_one_line(spec, plugin):
  with pytest.raises(UsageError) as caught:
    trained(plugin, method=spec)
  line = str(caught.value)
  assert line.startswith("--")
  assert REFUSED[spec] in line
  assert "\n" not in line
  assert caught.value.__cause__ is not None


def test_an_aggregator_that_returns_something_else_is_named(plugin):
  """There is no line of theirs in the traceback: the function and its file are in the message."""
  with pytest.raises(blame.WrongReturn) as caught:
    trained(plugin, method="data_parallel(sgd(0.1), pairs())")
  line = "aggregate of Pairs (mine.py, line 54) returns a tuple of 2, not Aggregate("
  assert str(caught.value).startswith(line)
  assert errors.foreseen(caught.value) == (2, str(caught.value))


def test_the_death_of_another_process_is_a_line(monkeypatch):
  said = "AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error " + (
    "[127.0.0.1]:7568: Connection reset by peer"
  )
  error = jax.errors.JaxRuntimeError(said)
  assert errors.foreseen(error) is None  # of one process
  monkeypatch.setattr(errors, "joined", lambda: True)
  code, line = errors.foreseen(error) or (0, "")
  assert (code, line.partition(";")[0]) == (1, "another process of the job has ended")


def test_a_run_says_which_module_it_needs(plugin, capsys, monkeypatch):
  monkeypatch.setattr(loop.figures, "loss_plot", lambda folder, summary: None)
  trained(plugin, method="data_parallel(sgd(0.1), choosy(1))")
  run = plugin / "run"
  assert json.loads((run / "config.json").read_text())["import"] == ["mine"]
  folder.note_missing_modules(run)
  assert capsys.readouterr().err.count("--import") == 0
  monkeypatch.setattr(registry, "ADDED", {})
  monkeypatch.setattr(plugins, "_loaded", {})
  folder.note_missing_modules(run)
  assert capsys.readouterr().err == f"the run in {run} was made with --import=mine\n"


def test_the_command_shows_the_line_and_then_the_traceback(plugin):
  flags = ("--task=of_types()", "--mesh=data:2", "--batch_size=2", "--compilation_cache=off")
  ended = subprocess.run(
    [sys.executable, str(RUN), "--import=mine.py", *flags],
    cwd=plugin,
    env=os.environ | {"PYTHONPATH": str(RUN.parents[1])},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert ended.returncode == 1
  lines = ended.stderr.splitlines()
  assert lines[0].startswith("error: loss of of_types failed (mine.py, line 15): TypeError: ")
  assert lines[1].startswith("Traceback")
  assert any("return jnp.dot(" in line for line in lines)


def test_the_part_is_the_function_that_was_called_last():
  def broken():
    return {}["x"]

  with pytest.raises(KeyError) as caught:
    broken()
  assert blame.fault(caught.value) == ""  # nothing of this codebase called it
