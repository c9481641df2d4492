"""Trains language models on a token file that may be larger than memory, read on demand."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from research.core import checks
from research.core.registry import Default
from research.core.task import Batch, Feed, Task
from research.tasks import sampling
from research.tasks.language import language, tokens
from research.tasks.language.token_files import TokenFile, encoded

TOKENIZERS = ("bytes", "bpe")


class Source(NamedTuple):
  """Describes tokens on disk and their vocabulary."""

  tokens: TokenFile
  size: int  # V, number of different tokens
  lengths: np.ndarray | None  # [V], bytes of text per token, if known


def stream(
  path: str,
  *,
  model: Callable[[int], nn.Module] = Default("model", "transformer('tiny')"),
  tokenizer: str = "bytes",
  vocabulary: int | None = None,
  context: int = 128,
  held_out: float = 0.1,
  evaluated: int = 2**17,
) -> Task:
  """Trains a language model on a file of any size.

  Memory contains only the batches of two dispatches.

  The training loss and the held-out loss are each measured on at most `evaluated` tokens: a fixed
  set of equally spaced windows of T tokens. "bits_per_byte" is unknown for a .npy file.

  Args:
    path: the path of a text in UTF-8, or of a .npy file with tokens [N], integers of any type.
    model: a function that makes the module for V outputs, one per token of the vocabulary; the
      module maps tokens [b, T] to logits [b, T, V].
    tokenizer: the tokenizer of a text: "bytes" (V = 256), which reads the file directly, or "bpe",
      which is trained on the beginning of the text and writes the encoded text into the user's
      cache once.
    vocabulary: V, for a .npy file; for "bpe", see `text_files.text`, where None means 4096.
    context: T, the maximum number of tokens that a prediction is made from.
    held_out: the fraction of the tokens that is held out, at the end of the file, in (0, 1).
    evaluated: the maximum number of tokens per evaluation.

  Raises:
    ValueError: if the file or an argument is invalid, or a token in the file is not below V.
  """
  checks.positive_integer("context", context)
  checks.in_range("held_out", held_out, "(0, 1)")
  if evaluated < context:
    raise ValueError(f"evaluated={evaluated} is less than one window of context={context}")
  source = _source(path, tokenizer, vocabulary, 1 - held_out)
  end = int((1 - held_out) * len(source.tokens))
  if end <= context:
    raise ValueError(
      f"context={context} needs one token more to train on; the file has {end} and "
      f"{len(source.tokens) - end} that are held out"
    )
  module = model(source.size)
  language.check_model(module, source.size, context)
  return _task(module, source, end, context, evaluated // context)


def _task(module: nn.Module, source: Source, end: int, context: int, most: int) -> Task:
  tokens, size, lengths = source
  train = _windows(tokens, 1, 1 + (end - 1) // context * context, context, most)
  test = _windows(tokens, end, len(tokens), context, most)
  for part in (train, test):
    _check_tokens(part["x"], source)
  bits = None if lengths is None else [_bits(part, lengths) for part in (train, test)]
  del train["length"]  # all windows have full length
  mean_length = float(np.mean(test["length"]))
  init, loss, evaluate = language.objective(module, size, context, mean_length, bits)
  read = reader(tokens, end, context)

  def batch(seed: int, first: int, count: int) -> Batch:
    rows = read(seed, first, count)
    _check_tokens(rows, source)
    return {"x": rows}

  order = sampling.in_order, sampling.take
  task = Task(init, loss, evaluate, *order, train, test, feed=Feed(end // context, batch))
  chunk = language.evaluated_at_once(size, context)
  return task._replace(**language.of_model(module), chunk=chunk)


def reader(
  tokens: TokenFile | np.ndarray, end: int, context: int
) -> Callable[[int, int, int], np.ndarray]:
  """Returns the function that reads windows first, ..., first + count - 1 of an endless order.

  The function `read(seed, first, count)` is pure, and its cost is the same at any position. A
  resumed run therefore needs no stored state and rereads nothing, and each process reads only its
  own windows. As in `language.next_token`, the first N - N mod T tokens form a ring, and the
  windows of an epoch tile the ring: N // T windows of T + 1 tokens predict every token once, in an
  order and at an offset that depend on the epoch. Epochs follow one another without a gap.

  Args:
    tokens: the tokens, integers that are sliced on demand.
    end: N, the number of tokens to use; N >= context.
    context: T, the number of tokens that a window predicts.

  Returns:
    The function `read`, which returns windows [count, T + 1] in the dtype of the tokens.

  Raises:
    ValueError: if there are more than 2^32 windows, or the package grain, which shuffles them, is
      not installed.
  """
  try:
    from grain.experimental import index_shuffle
  except ImportError:
    raise ValueError('streaming needs grain: pip install -e ".[text]"') from None
  windows = end // context
  length = windows * context
  if windows > 2**32:
    raise ValueError(f"{windows} windows of context={context} are more than 2^32")

  @functools.lru_cache(maxsize=2)
  def of_epoch(seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).integers((2**32, context)).tolist()

  def start(seed: int, position: int) -> int:
    epoch, place = divmod(position, windows)
    word, offset = of_epoch(seed, epoch)
    return context * index_shuffle(place, max_index=windows - 1, seed=word, rounds=4) + offset

  def read(seed: int, first: int, count: int) -> np.ndarray:
    rows = np.empty((count, context + 1), tokens.dtype)
    for i, row in enumerate(rows):
      begin = start(seed, first + i)
      whole = tokens[begin : min(begin + context + 1, length)]
      row[: len(whole)] = whole
      if len(whole) <= context:
        row[len(whole) :] = tokens[: context + 1 - len(whole)]
    return rows

  return read


def _source(path: str, tokenizer: str, vocabulary: int | None, share: float) -> Source:
  if tokenizer not in TOKENIZERS:
    raise ValueError(f"tokenizer={tokenizer!r} is none of {', '.join(TOKENIZERS)}")
  if Path(path).suffix == ".npy":
    if vocabulary is None or not 2 <= vocabulary < 2**31 or tokenizer != "bytes":
      raise ValueError(
        f"{path} contains tokens: give only their number, vocabulary=V, from 2 to 2^31 - 1"
      )
    return Source(TokenFile(path), vocabulary, None)
  if tokenizer == "bpe":
    found = encoded(path, tokens.VOCABULARY if vocabulary is None else vocabulary, share)
    return Source(TokenFile(found.path), found.tokenizer.size, found.tokenizer.lengths)
  if vocabulary is not None:
    raise ValueError(f"vocabulary={vocabulary}: bytes are 256")
  return Source(TokenFile(path), 256, np.ones(256, int))


def _windows(tokens: TokenFile, first: int, last: int, context: int, most: int) -> Batch:
  """Returns up to `most` equally spaced windows that predict the tokens first, ..., last - 1."""
  count = -(-(last - first) // context)
  chosen = np.arange(min(count, most)) * count // min(count, most)
  starts = first - 1 + context * chosen
  rows = np.zeros((len(starts), context + 1), tokens.dtype)
  lengths = np.minimum(context, last - 1 - starts).astype(np.int32)
  for row, start, length in zip(rows, starts.tolist(), lengths.tolist(), strict=True):
    row[: length + 1] = tokens[start : start + length + 1]
  return {"x": rows, "y": np.zeros(len(rows), np.uint8), "length": lengths}


def _bits(part: Batch, lengths: np.ndarray) -> float:
  """Returns the factor that converts nats per token to bits per byte, for the windows' tokens."""
  predicted = np.arange(part["x"].shape[1] - 1) < part["length"][:, None]
  return 1 / float(np.mean(lengths[part["x"][:, 1:][predicted]])) / math.log(2)


def _check_tokens(rows: np.ndarray, source: Source) -> None:
  least, most = rows.min(initial=0), rows.max(initial=0)
  if least < 0 or most >= source.size:
    path = source.tokens.path
    raise ValueError(f"{path} has tokens from {least} to {most}, not in [0, {source.size})")
