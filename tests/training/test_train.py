"""`research.train` on objects: three model libraries, resuming, and what a run is made of."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from subset import slow_except

from research.aggregate.compressed import two_phase
from research.aggregate.feedback import error_feedback
from research.aggregate.gossip import gossip
from research.aggregate.mean import mean
from research.comm.topology import weights
from research.compress.quantize import int8
from research.core.task import Task
from research.methods.data_parallel import data_parallel
from research.methods.diloco import diloco
from research.models.classic import mlp
from research.sim.churn import recorded
from research.sim.network import internet
from research.tasks.convex.synthetic import least_squares
from research.tasks.partition import shards
from research.tasks.supervised import supervised
from research.training import fingerprint
from research.training.api import train
from research.training.config import UsageError
from research.training.hooks.finite import NonFinite
from research.training.hooks.hook import Evaluation, Rounds, Saved
from research.training.label import label
from research.training.reports import report
from research.training.result import Interrupted, Result

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(240, 6)).astype(np.float32)
Y = np.argmax(X @ RANDOM.normal(size=(6, 3)), 1).astype(np.int32)
DATA = {"x": X, "y": Y}
KEY = jax.random.key(0)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.relu(nn.Dense(16, name="hidden")(x))
    return nn.Dense(3, name="out")(nn.Dropout(0.1, deterministic=not train)(x))


class Nnx(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.hidden, self.out = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return self.out(self.dropout(nnx.relu(self.hidden(x))))


class Equinox(eqx.Module):
  hidden: eqx.nn.Linear
  out: eqx.nn.Linear
  dropout: eqx.nn.Dropout

  def __init__(self, key):
    a, b = jax.random.split(key)
    self.hidden, self.out = eqx.nn.Linear(6, 16, key=a), eqx.nn.Linear(16, 3, key=b)
    self.dropout = eqx.nn.Dropout(0.1)

  def __call__(self, x, key=None):
    return self.out(self.dropout(jax.nn.relu(self.hidden(x)), key=key))


MODELS = {
  "linen": Linen,
  "nnx": lambda: Nnx(nnx.Rngs(0)),
  "nnx of a key": lambda: lambda key: Nnx(nnx.Rngs(key)),
  "equinox": lambda: Equinox(KEY),
  "equinox of a key": lambda: Equinox,
}
MODELS["equinox of a key"] = lambda: lambda key: Equinox(key)


def compressed():
  """DiLoCo with an int8 exchange and its memory."""
  return diloco(
    optax.adam(1e-2), optax.sgd(0.7, momentum=0.9), error_feedback(two_phase(int8())), period=5
  )


def plain(rate=0.1):
  return data_parallel(optax.sgd(rate), mean())


def small(task=None, method=None, **given):
  task = task or supervised(Linen(), DATA)
  given = {"mesh": "data:4", "batch_size": 40, "steps": 60, "eval_every": 20} | given
  return train(task, method or plain(), **given)


@functools.cache
def learned(name, executor):
  """A run of a model that learns: linen's sends int8."""
  method = compressed() if name == "linen" else data_parallel(optax.adam(1e-2), mean())
  return small(supervised(MODELS[name](), DATA, DATA), method, executor=executor)


TRAINED = [(name, executor) for name in MODELS for executor in ("simulate", "spmd")]


@pytest.mark.parametrize(("name", "executor"), slow_except([("linen", "simulate")], TRAINED))
def test_a_model_of_each_library_is_trained(name, executor):
  result = learned(name, executor)
  assert result.summary["eval"]["accuracy"] > 0.85
  assert result.summary["train_loss"] < 0.5 * result.summary["initial_train_loss"]
  assert [row["step"] for row in result.metrics if "eval" in row] == [20, 40, 60]
  assert result.summary["wire"]["total_bytes_per_worker"] > 0
  assert jax.tree.structure(result.params) == jax.tree.structure(
    supervised(MODELS[name](), DATA).init(KEY)
  )


@pytest.mark.parametrize("name", slow_except(("linen", "nnx", "equinox"), MODELS))
def test_dropout_draws_from_the_key_of_the_loss_and_is_off_in_evaluation(name):
  task = supervised(MODELS[name](), DATA)
  params, (one, other) = task.init(KEY), jax.random.split(jax.random.key(1))
  loss = jax.jit(jax.vmap(task.loss, (None, None, 0)))
  keys = jnp.stack([one, one, other, *jax.random.split(one, 50)])
  same, again, differs, *values = np.asarray(loss(params, DATA, keys))
  assert same == again
  assert same != differs
  whole = float(jax.jit(task.evaluate)(params, DATA)["loss"])
  assert np.std(values) > 1e-3
  assert abs(np.mean(values) - whole) < 0.1


@pytest.mark.parametrize("name", ["nnx", "equinox"])
def test_a_model_starts_with_its_own_parameters_and_trained_ones_go_back_into_it(name):
  model = MODELS[name]()
  task = supervised(model, DATA, DATA)
  a, b = (task.init(jax.random.key(seed)) for seed in (0, 1))
  assert all(jnp.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
  result = learned(name, "simulate")
  if name == "nnx":
    nnx.update(model, result.params)
    model.eval()
    logits = model(X)
  else:
    whole = eqx.combine(result.params, eqx.partition(model, eqx.is_inexact_array)[1])
    logits = jax.vmap(eqx.nn.inference_mode(whole))(X)
  accuracy = float(np.mean(np.argmax(logits, 1) == Y))
  assert accuracy == pytest.approx(result.summary["eval"]["accuracy"])


def predictions(name, model):
  """The outputs of a trained model, called as its library does."""
  if name == "linen":
    return model(X, train=False)
  return jax.vmap(model)(X) if name.startswith("equinox") else model(X)


def own_params(name, model):
  """The parameters in a trained model, as its library gives them."""
  if name == "linen":
    return model.variables["params"]
  if name.startswith("equinox"):
    return eqx.filter(model, eqx.is_inexact_array)
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("name", slow_except(("linen", "nnx", "equinox"), MODELS))
def test_the_result_has_the_users_model_with_the_trained_parameters(name):
  result = learned(name, "simulate")
  kind = {"l": Linen, "n": Nnx, "e": Equinox}[name[0]]
  assert type(result.model) is kind
  for x, y in zip(
    *map(jax.tree.leaves, (own_params(name, result.model), result.params)), strict=True
  ):
    np.testing.assert_array_equal(x, y)
  accuracy = float(np.mean(np.argmax(predictions(name, result.model), 1) == Y))
  assert accuracy == pytest.approx(result.summary["eval"]["accuracy"])


@pytest.mark.slow
def test_a_task_of_its_own_has_no_model():
  task = supervised(Linen(), DATA)
  own = Task(task.init, task.loss, task.evaluate, task.sample, task.batch, task.train)
  assert small(own, steps=5, eval_every=0).model is None


@pytest.mark.slow
def test_progress_is_shown_unless_it_is_not_wanted(capsys, tmp_path):
  go = functools.partial(small, supervised(Linen(), DATA, DATA), steps=20)
  go()
  assert "test accuracy" in capsys.readouterr().err
  for _ in range(2):  # the second time it is complete
    go(progress=False, out=tmp_path / "run")
    assert capsys.readouterr() == ("", "")
  go(out=tmp_path / "run")
  assert "complete" in capsys.readouterr().err


@pytest.mark.slow
def test_metrics_are_named_after_the_data_that_they_are_of(capsys, tmp_path):
  task = supervised(Linen(), DATA)
  measured = lambda params: {"rmse": jnp.sum(params["out"]["bias"] ** 2)}
  cases = {
    "test": (task._replace(measure=measured, measured_on="test"), "test rmse"),
    "none": (task._replace(measure=measured), ", rmse"),
  }
  for name, (task, shown) in cases.items():
    result = small(task, steps=20, out=tmp_path / name)
    err = capsys.readouterr().err
    assert "train accuracy" in err
    assert shown in err
    assert "train rmse" not in err
    table = report.closing_table(result.summary, tmp_path)
    assert f"\n{shown.removeprefix(', ')} " in table
    assert "train loss" not in table
    labels = [text.get_text() for text in result.plot().axes[1].get_legend().get_texts()]
    assert labels == ["train accuracy", shown.removeprefix(", ")]


DIAGNOSED = {"steps": 20, "log_every": 5, "eval_every": 10}


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory) -> Result:
  out = tmp_path_factory.mktemp("diagnosed") / "run"
  return small(method=compressed(), diagnostics=True, out=out, tensorboard=True, **DIAGNOSED)


@pytest.mark.slow
def test_a_curve_is_a_column_against_steps(diagnosed):
  result = diagnosed
  steps, losses = result.curve("loss")
  assert steps.tolist() == [5, 10, 15, 20]
  assert losses.tolist() == [row["loss"] for row in result.metrics]
  steps, accuracy = result.curve("eval.accuracy")
  assert steps.tolist() == [10, 20]
  assert accuracy[-1] == result.summary["eval"]["accuracy"]
  assert len(result.curve("diagnostics.memory_norm")[0]) == 4
  sent, losses = result.curve("train_loss", against="bytes")
  assert sent.tolist() == [row["bytes"] for row in result.metrics if "eval" in row]
  assert losses[-1] == result.summary["train_loss"]
  with pytest.raises(ValueError, match=r"did you mean 'eval\.accuracy'.*legal: step, loss"):
    result.curve("eval.acuracy")


@pytest.mark.slow
def test_diagnostics_join_the_rows_and_have_a_plot_of_their_own(diagnosed):
  run, without = diagnosed, small(method=compressed(), **DIAGNOSED)
  assert run.summary["params_sha256"] == without.summary["params_sha256"]
  assert [row["loss"] for row in run.metrics] == [row["loss"] for row in without.metrics]
  names = ("compression_error", "memory_norm", "model_spread", "update_norm", "gradient_norm")
  for row in run.metrics:
    assert set(row["diagnostics"]) == set(names)
    assert all(value > 0 for value in row["diagnostics"].values())
    assert row["diagnostics"]["compression_error"] < 0.01  # int8
  assert (run.folder / "diagnostics.png").stat().st_size > 0
  assert len(run.plot("diagnostics").axes) == len(names)
  with pytest.raises(ValueError, match="the run has no diagnostics"):
    without.plot("diagnostics")


def test_objects_have_labels_that_can_be_read():
  assert label(plain()) == "data_parallel(<optimizer>, mean())"
  matrix: Any = np.full((4, 4), 0.25)
  assert label(gossip(weights(matrix))) == "gossip(weights(<array of shape [4, 4]>))"
  assert label(supervised(Linen(), DATA)) == "Linen"
  assert label(supervised(mlp([4])(3), DATA)) == "MLP"
  assert label(supervised(Linen(), DATA)._replace(title="ratings")) == "ratings"


def test_labels_are_no_part_of_what_a_run_is_made_of():
  task = supervised(Linen(), DATA)
  renamed = task._replace(title="other", measured_on="test", model=None)
  assert fingerprint.of_objects(task) == fingerprint.of_objects(renamed)


def test_a_network_and_the_file_of_its_times_are_part_of_what_a_run_is_made_of(tmp_path):
  task, path = supervised(Linen(), DATA), tmp_path / "times.csv"
  path.write_text("worker,start,end\n0,0,9\n")
  network = internet(churn=recorded(str(path)))
  before = fingerprint.of_objects(task, network)
  assert fingerprint.of_objects(task, network) == before
  path.write_text("worker,start,end\n0,0,8\n")
  changed = fingerprint.of_objects(task, network)
  assert (changed["data"] != before["data"], changed["code"]) == (True, before["code"])
  assert fingerprint.of_objects(task, internet(spread=1.0))["code"] != before["code"]


def test_an_autoencoder_needs_no_labels():
  class Auto(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(6, name="out")(nn.Dense(4, name="code")(x))

  squares = lambda outputs, batch: jnp.mean((outputs - batch["x"]) ** 2, -1)
  largest = lambda outputs, batch: jnp.max(jnp.abs(outputs - batch["x"]), -1)
  task = supervised(Auto(), {"x": X}, {"x": X}, loss=squares, metrics={"largest": largest})
  result = small(task, data_parallel(optax.adam(1e-2), mean()), steps=200)
  assert result.summary["train_loss"] < 0.5 * result.summary["initial_train_loss"]
  assert set(result.summary["eval"]) == {"loss", "largest"}
  with pytest.raises(UsageError, match=r"partition=.*sorts by labels, and the examples have none"):
    small(task, partition="sorted()")


@pytest.mark.slow
def test_nothing_is_written_without_out(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = small(steps=20)
  assert result.folder is None
  assert not list(tmp_path.iterdir())
  figure = result.plot()
  assert figure.axes[0].get_lines()
  assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook displays
  assert len(result.metrics) == 2


def signal_at(step: int, number: int):
  """A hook that signals the process when the run is at a step."""

  def hook(run, event):
    if isinstance(event, Rounds) and event.last == step:
      signal.raise_signal(number)

  return hook


def test_ctrl_c_ends_the_run_and_then_the_program(tmp_path):
  """The state is saved and the result kept, but a program that trains in a loop does not go on."""
  line = rf"^stopped at step 20; the same call resumes the run in {tmp_path}"
  with pytest.raises(Interrupted, match=line) as stopped:
    small(hooks=[signal_at(20, signal.SIGINT)], out=tmp_path)
  assert stopped.value.result.summary["steps"] == 20
  assert small(out=tmp_path).summary["steps"] == 60


@pytest.mark.parametrize("ours", [False, True], ids=["default", "a handler of the program"])
def test_sigterm_ends_the_program_unless_it_handles_the_signal(ours):
  received = []
  handler = (lambda number, frame: received.append(number)) if ours else signal.SIG_DFL
  before = signal.signal(signal.SIGTERM, handler)
  given = {"hooks": [signal_at(20, signal.SIGTERM)]}
  try:
    if ours:
      assert small(**given).summary["stopped_because"] == "terminated"
    else:
      with pytest.raises(SystemExit, match=r"^143$"):
        small(**given)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert received == [signal.SIGTERM] * ours


def test_a_reason_of_a_hook_is_no_signal():
  stop = lambda run, event: "interrupted" if isinstance(event, Rounds) else None
  assert small(hooks=[stop]).summary["stopped_because"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["simulate", "spmd"])
def test_a_run_that_is_called_again_is_resumed_or_shown(executor, tmp_path, capsys):
  method = diloco(optax.adam(1e-2), optax.sgd(0.7, momentum=0.9), mean(), period=5)
  given = {"method": method, "executor": executor}
  given |= {"checkpoint_every": 20, "checkpoint_seconds": 0.0}
  whole = small(out=tmp_path / "whole", **given)
  stop = lambda run, event: "enough" if isinstance(event, Rounds) and event.last >= 40 else None
  part = small(out=tmp_path / "parts", hooks=[stop], **given)
  assert (part.summary["steps"], part.summary["stopped_because"]) == (40, "enough")
  rest = small(out=tmp_path / "parts", **given)
  assert "resuming at step 40" in capsys.readouterr().err
  assert rest.summary["params_sha256"] == whole.summary["params_sha256"]
  losses = [[(row["step"], row["loss"]) for row in run.metrics] for run in (whole, rest)]
  assert losses[0] == losses[1]
  shown = small(out=tmp_path / "whole", **given)
  assert "complete" in capsys.readouterr().err
  assert shown.summary == whole.summary | {"eval": shown.summary["eval"]}
  for x, y in zip(*map(jax.tree.leaves, (shown.params, whole.params)), strict=True):
    np.testing.assert_array_equal(x, y)


def other_labels():
  return supervised(Linen(), DATA | {"y": (Y + 1) % 3}, DATA)


def other_loss():
  flipped = lambda outputs, batch: optax.softmax_cross_entropy_with_integer_labels(
    -outputs, batch["y"]
  )
  return supervised(Linen(), DATA, DATA, loss=flipped)


CHANGES = {
  "labels": ({"task": other_labels}, "other data"),
  "test labels": ({"task": lambda: supervised(Linen(), DATA, DATA | {"y": Y * 0})}, "other data"),
  "loss": ({"task": other_loss}, "other code"),
  "penalty": ({"task": lambda: supervised(Linen(), DATA, DATA, l2=0.1)}, "other code"),
  "rate": ({"method": lambda: plain(0.2)}, "other code"),
  "partition": ({"partition": lambda: shards(3)}, "other code"),
}


class Written(NamedTuple):
  """A run in a folder, the events that it had, and the same call again, but for some arguments."""

  result: Result
  seen: list[Any]
  again: Callable[..., Result]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Written:
  """Its numbers are numpy's, and each call makes its objects anew."""
  seen: list[Any] = []
  same = {
    "task": lambda: supervised(Linen(), DATA, DATA),
    "method": plain,
    "partition": lambda: shards(2),
  }
  given = {"steps": np.int32(40), "batch_size": np.int64(40), "eval_every": np.int64(20)}
  given["out"] = tmp_path_factory.mktemp("written") / "run"

  def go(hooks=(), **changes):
    return small(**{name: make() for name, make in (same | changes).items()}, **given, hooks=hooks)

  return Written(go([lambda run, event: seen.append(event)]), seen, go)


def test_hooks_see_the_events_of_a_run_in_order(written):
  kinds = [type(event).__name__ for event in written.seen]
  assert kinds[-5:] == ["Stop", "Pause", "Saved", "End", "Pause"]
  assert [event.last for event in written.seen if isinstance(event, Rounds)] == [20, 40]
  assert [event.step for event in written.seen if isinstance(event, Evaluation)] == [20, 40]
  assert [event.step for event in written.seen if isinstance(event, Saved)] == [40]


def test_numbers_of_numpy_are_numbers(written):
  config = json.loads((written.result.folder / "config.json").read_text())
  assert (config["steps"], config["batch_size"], config["eval_every"]) == (40, 40, 20)


def test_a_run_has_the_labels_of_its_objects(written):
  summary = written.result.summary
  assert (summary["task"], summary["method"]) == ("Linen", "data_parallel(<optimizer>, mean())")


def test_a_run_of_the_same_data_and_code_is_shown(written):
  shown, result = written.again(), written.result
  assert shown.summary["params_sha256"] == result.summary["params_sha256"]
  np.testing.assert_array_equal(shown.model(X, train=False), result.model(X, train=False))


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_of_other_data_or_code_is_never_shown(name, written):
  change, message = CHANGES[name]
  with pytest.raises(UsageError, match=message):
    written.again(**change)


OWN = '''
"""A task in a module of the user's own."""
import sys
import flax.linen as nn, jax.numpy as jnp, numpy as np, optax
from research.aggregate.gossip import gossip
from research.aggregate.mean import mean
from research.comm.topology import weights
from research.core.task import Task
from research.methods.data_parallel import data_parallel
from research.tasks.supervised import supervised
from research.training import fingerprint
from research.training.api import train

class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, name="out")(x) * WEIGHT

WEIGHT = 1.0

class Loss:
  def __init__(self):
    self._a = 1.0

  def __call__(self, outputs, batch):
    return self._a * jnp.square(outputs[:, 0] - batch["x"][:, 0])

loss = Loss()
x = np.arange(24, dtype=np.float32).reshape(12, 2) / 24
task = supervised(Net(), {"x": x}, loss=loss)
method = data_parallel(optax.sgd(0.1), mean())
train(task, method, mesh="data:2", batch_size=4, steps=4, out=sys.argv[1])
'''


# Runs scripts with one argument, each in a fork of itself: to import JAX again takes seconds.
FORKS = """
import os, runpy, sys, warnings
import flax.linen, research.training.api
warnings.simplefilter("ignore")  # JAX warns of forks, and no thread runs here
_, out, *scripts = sys.argv
for script in scripts:
  if os.fork() == 0:
    sys.argv = [script, out]
    try:
      runpy.run_path(script, run_name="__main__")
    except ValueError as error:
      print(error, file=sys.stderr, flush=True)
    os._exit(0)
  os.wait()
  print("----", file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_another_process_sees_the_same_code_and_its_changes(tmp_path):
  changes = ("WEIGHT = 1.0", "WEIGHT = 2.0"), ("jnp.square", "jnp.abs"), ("_a = 1.0", "_a = 2.0")
  texts = [OWN, "# A comment.\n" + OWN, *(OWN.replace(old, new) for old, new in changes)]
  scripts = [tmp_path / str(number) / "own.py" for number in range(len(texts))]
  for script, text in zip(scripts, texts, strict=True):
    script.parent.mkdir()
    script.write_text(text)
  cheap = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  environ = os.environ | cheap | {"PYTHONPATH": str(Path(__file__).parents[2])}
  command = [sys.executable, "-c", FORKS, str(tmp_path / "run"), *map(str, scripts)]
  ended = subprocess.run(command, capture_output=True, text=True, env=environ)
  made, shown, *refused, rest = ended.stderr.split("----\n")
  assert (ended.returncode, rest) == (0, "")
  assert "complete" not in made
  assert "complete" in shown
  assert len(refused) == len(changes)
  for said in refused:
    assert "holds a run with other code under the same flags" in said


def test_a_task_of_the_library_takes_a_model():
  result = small(least_squares, model=mlp([8]), steps=3)
  assert sorted(result.params) == ["hidden_0", "output"]
  text = small("least_squares()", "data_parallel(sgd(0.1), mean())", model="mlp([8])", steps=3)
  assert text.summary["params_sha256"] == result.summary["params_sha256"]
  assert json.dumps(text.summary["task"]) == '"least_squares()"'


def test_a_loss_that_is_not_finite_ends_the_run():
  with pytest.raises(NonFinite, match="not finite at step"):
    small(method=plain(1e30))


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"batch_size": 42}, "^batch_size=42: does not divide among 4 workers; nearest: 40 and 44"),
    ({"batch_size": 0}, "^batch_size=0: neither a whole number"),
    ({"eval_evry": 1}, "^eval_evry: unknown option; did you mean eval_every?"),
    ({"eval_every": -1}, "^eval_every=-1: not a whole number of at least 0"),
    ({"clip_norm": "a"}, "^clip_norm='a': not a number"),
    ({"steps": 0}, "^steps: give steps, rounds, epochs or virtual_seconds"),
    (
      {"method": compressed(), "steps": 4},
      "^steps=4: does not end with a round of 5 steps; nearest: 5",
    ),
    ({"rounds": 4}, "^steps=60: cannot be combined with rounds"),
    ({"executor": "server"}, "^executor='server': is only for the command"),
    ({"executor": "spmdd"}, "^executor='spmdd': unknown; did you mean 'spmd'"),
    ({"mesh": "dat:4"}, "^mesh='dat:4'"),
    ({"mesh": 4}, "^mesh=4: not a text such as"),
    ({"seed": 1.5}, "^seed=1.5: not a whole number"),
    ({"hooks": print}, "^hooks: not a list of hooks"),
    ({"method": optax.sgd(0.1)}, r"wrap it: data_parallel\(optimizer, mean\(\)\)"),
    ({"method": data_parallel}, "call it with its arguments"),
    ({"progress": 1}, "^progress=1: not a bool"),
    ({"method": 3}, "^method=3: not a Method"),
    ({"task": 3}, "^task=3: not a Task"),
    ({"model": Linen()}, "^model: the task already has a model"),
    ({"profile": True}, "^profile: is written into the folder out="),
    ({"partition": "iidd()"}, r"^partition='iidd\(\)'.*did you mean"),
  ],
)
def test_a_wrong_argument_is_one_line(given, message):
  with pytest.raises(UsageError, match=message) as caught:
    small(**given)
  assert "\n" not in str(caught.value)


class Statistics(nnx.Module):
  def __init__(self):
    self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.norm(x)


@pytest.mark.parametrize(
  ("model", "data", "message"),
  [
    (3, DATA, "model: int is neither a module of Flax linen, Flax NNX or Equinox"),
    (Linen, DATA, "model: the class Linen is neither a module"),
    (lambda key: 3, DATA, "the function of a key returned a int"),
    (Statistics(), DATA, r"variables that are not parameters \(BatchStat\)"),
    (
      eqx.nn.BatchNorm(6, "b", mode="ema"),
      DATA,
      r"variables that are not parameters \(StateIndex\)",
    ),
    (Linen(), X, 'train: not a dictionary with arrays "x"'),
    (Linen(), {"x": X.tolist(), "y": Y}, r'train\["x"\] is a float, and no numpy array'),
    (Linen(), {"x": X, "y": Y[:-1]}, r"lengths \[239, 240\]"),
    (Linen(), {"x": X}, 'the softmax loss needs labels "y"'),
    (Linen(), {"x": X, "y": Y, "mask": Y}, "the name is reserved for a mask"),
  ],
)
def test_what_cannot_be_a_task_is_one_line(model, data, message):
  with pytest.raises(ValueError, match=message) as caught:
    supervised(model, data)
  assert "\n" not in str(caught.value)


def test_examples_to_test_on_are_like_those_to_train_on():
  for test in ({"x": X}, {"x": X[:, :3], "y": Y}):
    with pytest.raises(ValueError, match=r"^test"):
      supervised(Linen(), DATA, test)
  for metrics in ({"loss": lambda outputs, batch: batch["y"]},):
    with pytest.raises(ValueError, match="'loss' is the name of a metric of every task"):
      supervised(Linen(), DATA, metrics=metrics)


class Moody(nnx.Module):
  """A model that is told whether it trains, as linen's are."""

  def __init__(self):
    self.out = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

  def __call__(self, x, train=False):
    return self.out(x) * (0.0 if train else 1.0)


def test_models_are_told_whether_they_train():
  task = supervised(Moody(), DATA, DATA)
  params = task.init(KEY)
  batch = {name: x[:8] for name, x in DATA.items()}
  loss, metrics = jax.jit(lambda: (task.loss(params, batch, KEY), task.evaluate(params, batch)))()
  np.testing.assert_allclose(loss, np.log(3), rtol=1e-5)
  assert abs(float(metrics["loss"]) - np.log(3)) > 1e-3


def test_a_loss_gives_a_value_of_each_example():
  with pytest.raises(ValueError, match=r"loss: gives \(\) for one example"):
    supervised(Linen(), DATA, loss=lambda outputs, batch: jnp.mean(outputs))


@pytest.mark.slow
def test_staleness_is_that_of_the_clock():
  from research.methods.asynchronous import asgd
  from research.sim.clock import asynchronous, steady

  speeds = steady(1.0, slowdown={0: 4})
  run = small(
    method=asgd(optax.sgd(0.05), mean()), clock=speeds, steps=30, log_every=3, diagnostics=True
  )
  trace = asynchronous(speeds, 4, 30, 0, 1)
  found = {row["step"]: row["diagnostics"]["staleness"] for row in run.metrics}
  assert found == {step: trace.staleness[step - 1] for step in found}
  assert max(found.values()) > 1


@pytest.mark.parametrize("executor", slow_except(["simulate"], ("simulate", "spmd")))
def test_metrics_that_a_loss_returns_join_the_rows(executor):
  def loss(outputs, batch):
    each = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])
    return each, {"doubled": 2 * each, "wrong": (jnp.argmax(outputs, 1) != batch["y"]) * 1.0}

  task = supervised(Linen(), DATA, DATA, loss=loss)
  run = small(task, executor=executor, log_every=7)
  for row in run.metrics:
    assert row["auxiliary"]["doubled"] == pytest.approx(2 * row["loss"], rel=1e-5)
    assert 0 <= row["auxiliary"]["wrong"] <= 1
  assert set(run.summary["eval"]) == {"loss", "doubled", "wrong"}
