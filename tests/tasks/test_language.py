"""Language tasks: windows by hand, every token once, the loss against numpy, files, tokenizers."""

import functools
import gzip
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance

from research.aggregate.mean import mean
from research.comm import mesh as meshes
from research.core.task import Data
from research.methods.local import local_sgd
from research.tasks import partition
from research.tasks.convex import synthetic
from research.tasks.language import text_files, tokens
from research.tasks.language.language import Text, next_token
from research.training import metrics

KEY = jax.random.key(0)
ALPHABET = "abcdefghijklmnopqrst"


@pytest.fixture
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A user's cache and data directory of this test's own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("RESEARCH_DATA_DIR", raising=False)
  return tmp_path


@pytest.fixture
def has_bpe():
  pytest.importorskip("tokenizers", reason="needs tokenizers, of the extra 'text'")


class Bigram(nn.Module):
  """Logits that depend on one token alone; `sown` goes to the collection "losses"."""

  outputs: int
  sown: float = 0.0

  @nn.compact
  def __call__(self, tokens):
    if self.sown:
      self.sow("losses", "balance", jnp.float32(self.sown))
    table = nn.initializers.normal(1.0)
    return self.param("table", table, (self.outputs, self.outputs))[tokens]


def task_of(length, held_out=10, context=4, **module):
  """A task on the tokens 0, 1, 2, ..., so that a window says where it lies."""
  part = lambda a, b: Text(np.arange(a, b).astype(np.uint16), 2 * (b - a))
  size = length + held_out
  parts = part(0, length), part(length, size)
  return next_token(Bigram(size, **module), size, *parts, context=context)


def text_of(path, content, **options):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return text_files.text(str(path), model=Bigram, **options)


def test_windows_by_hand(tmp_path, strict):
  task = text_of(tmp_path / "text", ALPHABET, context=3, held_out=0.25)
  shown = lambda rows: [bytes(row).decode() for row in np.asarray(rows)]
  assert shown(task.train["x"]) == ["abcdef", "defghi", "ghijkl", "jklmno", "mnoabc"]
  assert task.test is not None
  assert shown(task.test["x"]) == ["opqr", "rst\0"]
  assert task.test["length"].tolist() == [3, 2]
  assert {leaf.dtype for leaf in (task.train["x"], task.test["x"])} == {np.dtype(np.uint8)}
  index = {"row": jnp.array([4, 0, 4]), "offset": jnp.array([2, 1, 0])}
  assert shown(task.batch(task.train, index)["x"]) == ["oabc", "bcde", "mnoa"]


def epoch_of(task, rows, number, batch_size):
  """The windows that the owner of some rows draws in an epoch, in the order of its steps."""
  owned = jax.tree.map(lambda x: x[rows], task.train)
  steps = len(rows) // batch_size

  @jax.jit
  def draw(step):
    index = task.sample(len(rows), step, jax.random.key(rows[0]), batch_size=batch_size)
    return task.batch(owned, index)["x"]

  return np.concatenate([draw(number * steps + step) for step in range(steps)])


@pytest.mark.slow
@pytest.mark.parametrize("split", [partition.sorted_(), partition.iid()])
def test_every_token_is_predicted_equally_often(split, strict):
  task, context = task_of(50, context=4), 4
  parts = split(task.train["y"], 3, 0)  # twelve examples, since the last two tokens fill none
  places = np.zeros((48, context), int)
  orders = set()
  for number in range(context):
    found = np.concatenate([epoch_of(task, rows, number, 2) for rows in parts]).astype(int)
    assert ((found[:, 1:] - found[:, :-1]) % 48 == 1).all()
    assert np.bincount(found[:, 1:].ravel(), minlength=48).tolist() == [1] * 48
    np.add.at(places, (found[:, 1:], np.arange(context)), 1)
    orders.add(tuple(found[:, 0] // context))
  assert (places == 1).all()
  assert len(orders) == context


def test_random_tokens_are_uniform_and_the_best_loss_is_that_of_their_number():
  task = synthetic.random_tokens(300, 4, 6000, model=Bigram)
  drawn = np.asarray(task.train["x"])[:, :4]
  assert (drawn.shape, drawn.dtype, drawn.max()) == ((1500, 4), np.uint16, 299)
  assert np.bincount(drawn.ravel(), minlength=300).std() == pytest.approx(math.sqrt(20), rel=0.15)
  assert task.test is not None
  assert len(task.test["y"]) == 150
  even = jax.jit(task.evaluate)({"table": np.zeros((300, 300), np.float32)}, task.test)
  assert float(even["loss"]) == pytest.approx(math.log(300))
  assert float(even["bits_per_byte"]) == pytest.approx(8, rel=1e-3)
  again, other = (synthetic.random_tokens(300, 4, 6000, model=Bigram, seed=s) for s in (0, 1))
  assert (again.train["x"] == task.train["x"]).all()
  assert (other.train["x"] != task.train["x"]).any()
  with pytest.raises(ValueError, match="vocabulary=1"):
    synthetic.random_tokens(1, 4, 6000, model=Bigram)
  with pytest.raises(ValueError, match="context=4 needs"):
    synthetic.random_tokens(300, 4, 3, model=Bigram)


def test_partitions_see_places_in_the_text():
  task = task_of(4000, context=4)
  labels = task.train["y"]
  assert np.unique(labels).tolist() == list(range(100))
  parts = partition.sorted_()(labels, 3, 0)
  assert np.concatenate(parts).tolist() == list(range(1000))
  uneven = partition.dirichlet(0.1)(labels, 3, 0)
  shares = [np.bincount(labels[part], minlength=100) for part in uneven]
  assert np.mean(np.max(shares, 0)) > 8


def test_the_loss_is_its_transcription(strict):
  task = task_of(40, context=4, sown=0.5)
  params, random = task.init(KEY), np.random.default_rng(1)
  table = np.asarray(params["table"], np.float64)
  log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
  x, mask = random.integers(0, 50, (6, 5)), random.integers(0, 2, 6)
  nats = -log_p[x[:, :-1], x[:, 1:]]
  batch = {"x": x.astype(np.uint16)}
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  loss = jax.jit(task.loss)
  close(loss(params, batch, KEY), nats.mean() + 0.5)
  masked = {**batch, "mask": mask.astype(np.float32)}
  found, gradient = jax.jit(jax.value_and_grad(task.loss))(params, masked, KEY)
  close(found, (nats.mean(1) * mask).sum() / mask.sum() + 0.5)
  slope = np.zeros_like(table)
  for row in x[mask == 1]:
    for a, b in itertools.pairwise(row):
      slope[a] += (np.exp(log_p[a]) - np.eye(50)[b]) / (4 * mask.sum())
  close(gradient["table"], slope, atol=1e-7)
  assert np.isfinite(loss(params, {**batch, "mask": np.zeros(6, np.float32)}, KEY))

  measured = jax.jit(task.evaluate)(params, masked)
  close(measured["loss"], found - 0.5)
  close(measured["bits_per_byte"], (found - 0.5) / math.log(2) / 2)
  halves = jax.ShapeDtypeStruct(table.shape, jnp.bfloat16)
  assert jax.eval_shape(task.loss, {"table": halves}, batch, KEY).dtype == jnp.float32


def held_out_loss(task, params, shards):
  count = len(task.test["y"])
  rows, sizes = partition.stack(task.test, np.array_split(np.arange(count), shards))
  evaluate = metrics.evaluator(task, meshes.device_mesh({"data": shards}))
  return evaluate(params, Data(rows, sizes, KEY))


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "chunk"), [(1, 3), (4, 1024), (2, 2)])
def test_the_held_out_loss_is_a_mean_over_tokens(shards, chunk):
  held, size = 53, 100
  table = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
  log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
  expected = -np.mean(log_p[np.arange(46, 99), np.arange(47, 100)])
  for context in (1, 6, 7, 10):
    task = task_of(size - held, held, context)._replace(chunk=chunk)
    for params, nats in (({"table": 0 * table}, math.log(size)), ({"table": table}, expected)):
      found = held_out_loss(task, params, shards)
      np.testing.assert_allclose(found["loss"], nats, rtol=2e-6)
      np.testing.assert_allclose(found["bits_per_byte"], nats / math.log(2) / 2, rtol=2e-6)


@pytest.mark.slow
def test_the_task_trains_alike_in_all_executions():
  text = np.tile(np.arange(8, dtype=np.uint8), 20)
  task = next_token(Bigram(8), 8, Text(text, 160), Text(text[:20], 20), context=4)
  method = local_sgd(optax.sgd(3.0), mean(), period=3)
  run = functools.partial(
    Running, method, axes={"data": 4}, sizes=[10] * 4, batch_size=5, task=task
  )
  one, other = run("simulate").rounds(6), run("spmd").rounds(6)
  assert distance(one.params(), other.params()) < 1e-6
  assert task.test is not None
  held_out = task.test
  loss = jax.jit(lambda params: task.evaluate(params, held_out)["loss"])
  assert loss(one.params()) < 0.7 * loss(task.init(KEY))
  whole = run("simulate", batch_size=None).rounds(1)
  assert np.isfinite(whole.metrics["loss"]).all()


# --- Files


def test_texts_are_read_as_they_are(tmp_path):
  content = "é\r\nß\n" * 40
  plain = text_of(tmp_path / "text", content, context=4, tokenizer="characters")
  packed = text_of(tmp_path / "text.gz", gzip.compress(content.encode()), context=4)
  assert plain.train["x"].shape == (45, 8)  # 180 of 200 characters, of which 252 of 280 bytes
  assert packed.train["x"].shape == (63, 8)
  assert bytes(packed.train["x"][:, :4].ravel()).decode() == content[:180]
  assert jax.eval_shape(plain.init, KEY)["table"].shape == (4, 4)


@pytest.mark.parametrize(
  ("content", "options", "message"),
  [
    (None, {}, "gone is not a file"),
    (b"abc\xff" * 200, {}, "is not UTF-8: byte 3 is 0xff, invalid start byte"),
    ("abc", {}, "context=128 needs as many tokens to train on .* the text has 2 and 1"),
    (b"", {}, "the text has 0 and 0"),
    (ALPHABET, {"context": 0}, "context=0 is not a positive integer"),
    (ALPHABET, {"held_out": 1.0}, r"held_out=1.0 is not in \(0, 1\)"),
    (ALPHABET, {"held_out": math.nan}, r"held_out=nan is not in \(0, 1\)"),
    (ALPHABET, {"tokenizer": "byte"}, "tokenizer='byte' is none of bytes, characters, bpe"),
    (ALPHABET, {"vocabulary": 300}, "vocabulary=300: only tokenizer='bpe' has one to choose"),
    (ALPHABET, {"context": 2, "model": lambda v: Bigram(v + 1)}, r"not logits \[1, 2, 256\]"),
  ],
)
def test_what_is_no_text_is_refused(tmp_path, content, options, message):
  path = tmp_path / ("gone" if content is None else "text")
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=message) as caught:
    text_files.text(str(path), **{"model": Bigram, **options})
  assert "\n" not in str(caught.value)


def test_speeches_are_sorted_by_role():
  text = "Romeo:\nAy.\n\nAll:\nNo.\nNo.\n\nRomeo:\nAh.\n\n\nAll:\nOh.\n"
  want = "All:\nNo.\nNo.\n\n\nAll:\nOh.\n\nRomeo:\nAy.\n\nRomeo:\nAh.\n"
  assert text_files.roles_together(text) == want


def test_a_damaged_tinyshakespeare_is_refused(cache):
  (cache / "input.txt").write_text("First Citizen:\n")
  with pytest.raises(ValueError, match=r"input.txt is truncated or another .* expected 86c4e6aa9"):
    text_files.tinyshakespeare(model=Bigram, data_dir=str(cache))


def test_tinyshakespeare():
  folder = os.environ.get("RESEARCH_DATA_DIR")
  if not folder or not (Path(folder) / "tinyshakespeare").is_dir():
    pytest.skip("$RESEARCH_DATA_DIR has no tinyshakespeare")
  task = text_files.tinyshakespeare(model=Bigram, context=100)
  assert task.test is not None
  assert jax.eval_shape(task.init, KEY)["table"].shape == (65, 65)
  assert task.train["x"].shape == (10038, 200)
  assert task.test["length"].sum() == 111_540
  found = jax.jit(task.evaluate)({"table": np.zeros((65, 65), np.float32)}, task.test)
  np.testing.assert_allclose(found["loss"], math.log(65), rtol=1e-6)


# --- Tokenizers

ODD = "To be, or not to be\r\n\tthat — ß 漢字 🙂 \x00 " * 50


@pytest.mark.parametrize("name", ["utf8", "characters", "bpe"])
def test_texts_come_back(name, cache, request):
  if name == "bpe":
    request.getfixturevalue("has_bpe")
  build = {
    "utf8": tokens.utf8,
    "characters": lambda: tokens.characters(ODD),
    "bpe": lambda: tokens.bpe("To be, or not to be. " * 30, 300),
  }[name]
  coder = build()
  found = coder.encode(ODD)
  assert coder.decode(found) == ODD
  assert found.max() < coder.size
  assert len(coder.encode("")) == 0
  assert coder.lengths[found].sum() == len(ODD.encode())
  assert coder.size in {"utf8": [256], "characters": [20], "bpe": range(257, 301)}[name]
  assert found.dtype == (np.uint8 if coder.size <= 256 else np.uint16)


def test_unknown_characters_are_refused():
  with pytest.raises(ValueError, match="character 'x' is none of the 3 known ones"):
    tokens.characters("abc").encode("abxc")


@pytest.mark.slow
def test_bpe_is_a_function_of_the_training_text(cache, has_bpe):
  path = cache / "text"
  task = text_of(path, ODD, context=4, tokenizer="bpe", vocabulary=280, held_out=0.3)
  (saved,) = (cache / "distributed-optimization-jax/tokenizers").iterdir()
  first, stamp = saved.read_bytes(), saved.stat().st_mtime_ns
  again = text_of(path, ODD, context=4, tokenizer="bpe", vocabulary=280, held_out=0.3)
  assert saved.stat().st_mtime_ns == stamp
  np.testing.assert_array_equal(task.train["x"], again.train["x"])
  saved.unlink()
  training = ODD[: int(0.7 * len(ODD))]
  code = f"from research.tasks.language import tokens; tokens.bpe({training!r}, 280)"
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
  assert saved.read_bytes() == first

  uniform = {"table": np.zeros((280, 280), np.float32)}
  assert task.test is not None
  count, size = task.test["length"].sum(), len(ODD[len(training) :].encode())
  bits = jax.jit(task.evaluate)(uniform, task.test)["bits_per_byte"]
  np.testing.assert_allclose(bits, math.log2(280) * count / size, rtol=1e-5)


@pytest.mark.parametrize(
  "damage",
  [
    lambda whole: b"",
    lambda whole: b"garbage\xff",
    lambda whole: whole[:-9],
    lambda whole: whole.replace(b"be", b"eb", 1),
    lambda whole: b"[" * 100_000,
    lambda whole: b'{"sha256": 0, "content": 0}',
    lambda whole: b"{}",
    lambda whole: b"[]",
  ],
)
def test_a_damaged_tokenizer_is_trained_again(cache, has_bpe, damage):
  tokenizer = lambda: tokens.bpe(ODD, 280)
  wanted = tokenizer().encode(ODD)
  (saved,) = (cache / "distributed-optimization-jax/tokenizers").iterdir()
  content = saved.read_bytes()
  saved.write_bytes(damage(content))
  assert saved.read_bytes() != content
  np.testing.assert_array_equal(tokenizer().encode(ODD), wanted)
  assert saved.read_bytes() == content


def test_a_tokenizer_needs_no_cache(cache, has_bpe, monkeypatch):
  wanted = tokens.bpe(ODD, 280).encode(ODD)
  (cache / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
  np.testing.assert_array_equal(tokens.bpe(ODD, 280).encode(ODD), wanted)


@pytest.mark.parametrize("vocabulary", [-1, 0, 255, 2**20 + 1, 2**31, 10**30, 280.0, True])
def test_bpe_refuses_a_vocabulary(vocabulary):
  with pytest.raises(ValueError, match=r"vocabulary=.* is not in \[256, 1048576\]; a BPE starts"):
    tokens.bpe(ODD, vocabulary)


def test_bpe_refuses(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r'needs tokenizers: pip install -e "\.\[text\]"'):
    tokens.bpe(ODD, 300)
