"""Streaming: every token once, a position that is a function of the step, training from disk."""

import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import registry
from research.core.task import Feed
from research.tasks.language import stream, token_files
from research.tasks.language.token_files import TokenFile
from research.training import assemble, loop
from research.training.config import Config, UsageError
from research.training.feed import Training
from research.training.hooks import signals

KEY = jax.random.key(0)


class Bigram(nn.Module):
  """Logits that depend on one token alone."""

  outputs: int

  @nn.compact
  def __call__(self, tokens):
    return self.param("table", nn.initializers.normal(1.0), (self.outputs, self.outputs))[tokens]


def bigram():
  """The model of these tests."""
  return Bigram


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A user's cache of this test's own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path


@pytest.fixture
def flags(tmp_path, monkeypatch):
  """Makes the flags of a run on 650 tokens below 8; its model is `bigram`, and nothing is drawn."""
  monkeypatch.setattr(loop.figures, "loss_plot", lambda folder, summary: None)
  monkeypatch.setitem(registry.ADDED, "model", {"bigram": bigram})
  random = np.random.default_rng(0)
  drawn = (np.arange(650) * random.integers(1, 3, 650)) % 8
  np.save(tmp_path / "tokens.npy", drawn.astype(np.uint16))

  def of(**given) -> Config:
    usual = {
      "task": f"stream('{tmp_path}/tokens.npy', vocabulary=8, context=6, evaluated=60)",
      "model": "bigram()",
      "method": "data_parallel(sgd(3.0), mean())",
      "mesh": "data:4",
      "batch_size": 8,
      "steps": 28,
      "steps_per_dispatch": 7,
      "log_every": 1,
      "eval_every": 0,
      "checkpoint_every": 0,
      "check_every": 0,
    }
    return Config(**usual | given)

  return of


# --- The order


def test_every_token_is_predicted_once_an_epoch(tmp_path):
  np.save(tmp_path / "tokens.npy", np.arange(60, dtype=np.uint16))
  read = stream.reader(TokenFile(tmp_path / "tokens.npy"), 50, context=4)
  windows = np.concatenate([read(7, first, 8) for first in range(0, 48, 8)])
  assert (windows.shape, windows.dtype) == ((48, 5), np.uint16)
  orders = set()
  for epoch in windows.astype(int).reshape(4, 12, 5):
    assert ((epoch[:, 1:] - epoch[:, :-1]) % 48 == 1).all()
    assert np.bincount(epoch[:, 1:].ravel(), minlength=48).tolist() == [1] * 48
    orders.add(tuple(epoch[:, 0] // 4))
  assert len(orders) == 4


def test_a_window_is_a_function_of_seed_and_position():
  found = np.arange(1000, dtype=np.int32)
  read, other = (stream.reader(found, 1000, 8) for _ in range(2))
  whole = read(1, 60, 12)
  parts = [other(1, first, 3) for first in (69, 66, 63, 60)]
  np.testing.assert_array_equal(np.concatenate(parts[::-1]), whole)
  assert (read(2, 60, 12) != whole).any()
  far = read(1, 10**10, 12)
  assert ((far[:, 1:] - far[:, :-1]) % 1000 == 1).all()


def test_parts_are_read_as_they_are_sliced(tmp_path):
  content = np.random.default_rng(0).integers(0, 2**31, 1000).astype(np.int32)
  np.save(tmp_path / "tokens.npy", content)
  found = TokenFile(tmp_path / "tokens.npy")
  assert (len(found), found.dtype) == (1000, np.int32)
  for part in (slice(0, 5), slice(990, 2000), slice(7, 7), slice(None)):
    np.testing.assert_array_equal(found[part], content[part])
  os.truncate(tmp_path / "tokens.npy", 2000)
  with pytest.raises(OSError, match="has become shorter"):
    _ = found[900:910]


# --- The task


def test_what_is_evaluated(tmp_path):
  (tmp_path / "text").write_bytes(bytes(range(100)))
  build = lambda **options: stream.stream(
    str(tmp_path / "text"), model=Bigram, context=10, held_out=0.25, **options
  )
  task = build()
  assert task.test is not None
  assert task.train["x"][:, 0].tolist() == [0, 10, 20, 30, 40, 50, 60]
  assert task.test["x"][:, :2].tolist() == [[74, 75], [84, 85], [94, 95]]
  assert task.test["length"].tolist() == [10, 10, 5]
  few = build(evaluated=29)
  assert few.test is not None
  assert few.train["x"][:, 0].tolist() == [0, 30]
  assert few.test["x"][:, 0].tolist() == [74, 84]
  assert (few.test["x"][:, 1:] - few.test["x"][:, :-1] == 1).all()

  params = task.init(KEY)
  table = np.asarray(params["table"], np.float64)
  log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
  nats = -np.mean(log_p[np.arange(74, 99), np.arange(75, 100)])
  evaluate = jax.jit(task.evaluate)
  found = jax.tree.map(float, evaluate(params, task.test))
  assert found["loss"] == pytest.approx(nats, rel=1e-5)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)
  windows = task.train["x"].astype(int)
  nats = -np.mean(log_p[windows[:, :-1], windows[:, 1:]])
  assert float(evaluate(params, task.train)["loss"]) == pytest.approx(nats, rel=1e-5)


def test_a_text_is_encoded_once_as_it_would_be_in_memory(cache, monkeypatch):
  pytest.importorskip("tokenizers", reason="needs tokenizers, of the extra 'text'")
  monkeypatch.setattr(token_files, "_BLOCK", 1 << 16)
  content = "To be, or not to be\r\n — ß 漢字 🙂\n" * 3000
  (cache / "text").write_bytes(content.encode())
  path, coder = token_files.encoded(cache / "text", 280, 0.5)
  np.testing.assert_array_equal(np.load(path), coder.encode(content))
  stamp = path.stat().st_mtime_ns
  options = {"model": Bigram, "tokenizer": "bpe", "vocabulary": 280, "context": 4}
  task = stream.stream(str(cache / "text"), held_out=0.5, **options)
  assert path.stat().st_mtime_ns == stamp
  assert [path] == list(path.parent.iterdir())
  assert task.test is not None
  found = jax.jit(task.evaluate)({"table": jnp.zeros((280, 280))}, task.test)
  tokens = TokenFile(path)
  held_out = tokens[len(tokens) // 2 : len(tokens)]
  bits = math.log2(280) * len(held_out) / coder.lengths[held_out].sum()
  assert float(found["bits_per_byte"]) == pytest.approx(bits, rel=1e-5)
  (cache / "text").write_bytes(b"abc\xff" * 200)
  with pytest.raises(ValueError, match="text is not UTF-8: byte 3 is 0xff"):
    token_files.encoded(cache / "text", 280, 0.5)


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "longer", "other type"])
def test_damaged_tokens_are_encoded_again(cache, damage):
  pytest.importorskip("tokenizers", reason="needs tokenizers, of the extra 'text'")
  (cache / "text").write_text("to be, or not to be " * 40)
  path, _ = token_files.encoded(cache / "text", 280, 0.5)
  content = path.read_bytes()
  other = np.load(path).astype(np.int32)
  wrong = {"empty": b"", "garbage": b"garbage", "cut": content[:-1], "longer": content + b"0"}
  path.write_bytes(wrong.get(damage, content))
  if damage == "other type":
    np.save(path, other)
  assert token_files.encoded(cache / "text", 280, 0.5).path == path
  assert path.read_bytes() == content


# --- Training


class Dispatched:
  """The dispatches of a run without what the loop does around them."""

  def __init__(self, config: Config, read: Callable[..., Any] | None = None):
    self.config, self.problem = config, assemble.assemble(config, assemble.check(config))
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    executor, job = self.problem.executor, self.problem.job
    self.state = executor.init(init_key)
    self.first = jax.device_get(executor.params(self.state))
    data = executor.place(self.problem.examples, self.problem.sizes, data_key)
    if read:
      job = job._replace(task=job.task._replace(feed=Feed(97, read)))
    self.training, self.losses = Training(config, job, data), []

  def through(self, *stops: int) -> list[float]:
    """The losses of all steps up to now."""
    for first, last in itertools.pairwise(stops):
      data, rounds = (
        self.training.of(first, last),
        (last - first) // self.problem.job.method.local_steps,
      )
      self.state, metrics = self.problem.executor.run(self.state, data, rounds=rounds)
      self.training.ahead(last, 2 * last - first)
      self.losses += metrics["loss"].tolist()
    return self.losses


@pytest.mark.parametrize(("executor", "mesh"), [("simulate", "data:4"), ("spmd", "data:4,fsdp:2")])
def test_losses_are_those_of_the_batches_in_their_order(executor, mesh, flags, tmp_path):
  """Two batches make a step of gradient descent, three such steps a dispatch."""
  method = "data_parallel(sgd(3.0), mean(), period=2)"
  run = Dispatched(flags(method=method, steps_per_dispatch=5, executor=executor, mesh=mesh))
  losses = run.through(0, 6, 12, 18)
  read = stream.reader(np.load(tmp_path / "tokens.npy"), 585, 6)
  table, slope, want = np.asarray(run.first["table"], np.float64), np.zeros((8, 8)), []
  for step in range(18):
    x = read(run.config.seed, 8 * step, 8)
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    want.append(-np.mean(log_p[x[:, :-1], x[:, 1:]]))
    for a, b in itertools.chain(*(itertools.pairwise(row) for row in x)):
      slope[a] += (np.exp(log_p[a]) - np.eye(8)[b]) / 48
    if step % 2:
      table, slope = table - 3.0 * slope / 2, np.zeros((8, 8))
  np.testing.assert_allclose(losses, want, rtol=1e-4)
  assert losses[-1] < losses[0] - 0.3


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], str]]:
  """In place of `signals.watch`: says to stop after the second dispatch."""
  told = iter(["", "terminated"])
  yield lambda: next(told, "")


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(flags, tmp_path, monkeypatch):
  config = flags(out=str(tmp_path / "run"))
  with monkeypatch.context() as patch:
    patch.setattr(signals, "watch", stopping)
    stopped, _ = loop.train(config)
  assert (stopped["steps"], stopped["stopped_because"]) == (14, "terminated")
  resumed, _ = loop.train(config)
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  unbroken = Dispatched(config)
  assert unbroken.through(0, 7, 14, 21, 28) == [json.loads(line)["loss"] for line in lines]
  params = unbroken.problem.executor.params(unbroken.state)
  assert resumed["params_sha256"] == loop.params_sha256(params)
  assert resumed["train_loss_on"] == "10 of 97 training examples"


def test_processes_read_their_own_rows_and_nothing_is_compiled_anew(flags, compilations):
  asked = []

  def read(seed, first, count):
    asked.extend(range(first, first + count))
    return {"x": np.full((count, 7), first % 8, np.uint16)}

  run = Dispatched(flags(executor="spmd", mesh="data:8", batch_size=16), read)
  run.through(0, 7)
  compiled = len(compilations)
  run.through(7, 14, 21, 28)
  assert len(compilations) == compiled
  assert sorted(asked) == list(range(16 * 35))
  whole = run.training._rows(7, 12, 0, 8)["x"]
  parts = [run.training._rows(7, 12, start, start + 2)["x"] for start in (0, 2, 4, 6)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


# --- Refusals


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"batch_size": "all"}, "--batch_size='all': the task streams .* give a number"),
    ({"population": 8}, "--population=8: the task streams .* clients would have"),
    ({"partition": "sorted()"}, r"--partition='sorted\(\)': .* in order; use iid\(\)"),
    ({"tolerance": 0.1}, "--tolerance=0.1: .* the gradient of the full objective"),
    ({"method": "fed_avg(sgd(0.1), mean(), epochs=1)"}, "--method=.* use period=, not epochs="),
    ({"method": "asgd(sgd(0.1), mean())"}, "--method=.* served one by one"),
    ({"batch_size": 100}, "--batch_size=100: the task has 97 training examples"),
  ],
)
def test_what_cannot_stream_is_refused(flags, given, message):
  config = flags(**given)
  with pytest.raises(UsageError, match=message) as caught:
    assemble.assemble(config, assemble.check(config))
  assert "\n" not in str(caught.value)


def test_what_is_no_stream_is_refused(tmp_path, monkeypatch):
  np.save(tmp_path / "floats.npy", np.zeros(3))
  np.save(tmp_path / "some.npy", np.arange(100, dtype=np.uint8))
  for name, content in (("no.npy", "text"), ("empty", ""), ("text", "abc" * 50), ("a.gz", "abc")):
    (tmp_path / name).write_text(content)
  build = lambda name="text", **options: stream.stream(
    str(tmp_path / name), model=Bigram, **{"context": 4, **options}
  )
  cases = [
    (r"floats.npy holds float64 \[3\]", lambda: build("floats.npy", vocabulary=9)),
    ("no.npy is not a .npy file", lambda: build("no.npy", vocabulary=9)),
    ("empty does not exist or is empty", lambda: build("empty")),
    ("a.gz is compressed, .* unpack it", lambda: build("a.gz")),
    ("some.npy contains tokens: give only their number, vocabulary=V", lambda: build("some.npy")),
    ("context=200 needs one token more .* the file has 135 and 15", lambda: build(context=200)),
    ("context=0 is not a positive", lambda: build(context=0)),
    (r"held_out=1.0 is not in \(0, 1\)", lambda: build(held_out=1.0)),
    ("evaluated=3 is less than one window", lambda: build(evaluated=3)),
    ("tokenizer='words' is none of bytes, bpe", lambda: build(tokenizer="words")),
    ("vocabulary=300: bytes are 256", lambda: build(vocabulary=300)),
    (r"from 0 to 88, not in \[0, 50\)", lambda: build("some.npy", vocabulary=50)),
  ]
  for message, call in cases:
    with pytest.raises(ValueError, match=message) as caught:
      call()
    assert "\n" not in str(caught.value)
  monkeypatch.setitem(sys.modules, "grain.experimental", None)
  with pytest.raises(ValueError, match=r'needs grain: pip install -e "\.\[text\]"'):
    stream.reader(np.arange(50), 50, 1)
