"""Defines tokenizers, which map a text to integers in [0, size), and back."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from research.tasks import files

VOCABULARY = 4096  # default vocabulary of a BPE
MOST = 1 << 20  # maximum vocabulary size of a BPE
_PIECE = 1 << 16  # characters that are passed to the library at once


class Tokenizer(NamedTuple):
  """Maps texts to tokens and back."""

  size: int  # V, number of tokens
  encode: Callable[[str], np.ndarray]  # [N], in the smallest of uint8, uint16 and int32
  decode: Callable[[np.ndarray], str]
  lengths: np.ndarray  # [V], bytes of UTF-8 per token


def characters(text: str) -> Tokenizer:
  """Returns a tokenizer with one token per different character of `text`, in code point order.

  Args:
    text: the text.
  """
  known = np.unique(_code_points(text))

  def encode(text: str) -> np.ndarray:
    points = _code_points(text)
    unknown = np.setdiff1d(points, known)
    if len(unknown):
      raise ValueError(f"character {chr(unknown[0])!r} is none of the {len(known)} known ones")
    return np.searchsorted(known, points).astype(smallest(len(known)))

  def decode(tokens: np.ndarray) -> str:
    return known[tokens].tobytes().decode("utf-32-le")

  lengths = np.array([len(chr(point).encode()) for point in known])
  return Tokenizer(len(known), encode, decode, lengths)


def utf8() -> Tokenizer:
  """Returns the tokenizer of UTF-8 bytes; decoding replaces incomplete characters with U+FFFD."""
  encode = lambda text: np.frombuffer(text.encode(), np.uint8)
  decode = lambda tokens: np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")
  return Tokenizer(256, encode, decode, np.ones(256, int))


def bpe(text: str, vocabulary: int) -> Tokenizer:
  """Trains a byte-pair encoding on `text`.

  The tokenizer can encode any text, since every byte is a token. Training repeatedly makes the most
  frequent pair of adjacent tokens a new token, until there are `vocabulary` tokens or no pair is
  left; `size` is the resulting number of tokens. The result depends only on the text and the
  library's version. It is kept in the user's cache, keyed by both.

  Args:
    text: the text to train on.
    vocabulary: the number of tokens to create, in [256, 2^20].

  Raises:
    ValueError: if the vocabulary is out of range, or the library is not installed.

  Reference: Sennrich, Haddow and Birch, 2015, arXiv:1508.07909; over bytes as in Radford et al.,
    2019, Language models are unsupervised multitask learners. Training uses the `tokenizers`
    library.
  """
  if type(vocabulary) is not int or not 256 <= vocabulary <= MOST:
    raise ValueError(
      f"vocabulary={vocabulary} is not in [256, {MOST}]; a BPE starts from the 256 bytes"
    )
  if importlib.util.find_spec("tokenizers") is None:
    raise ValueError("tokenizer='bpe' needs tokenizers: pip install -e \".[text]\"")
  import tokenizers

  digest = hashlib.sha256(text.encode()).hexdigest()[:32]
  name = f"bpe-{vocabulary}-{digest}-{tokenizers.__version__}.json"
  make = lambda: _trained(text, vocabulary).to_str()
  trained = tokenizers.Tokenizer.from_str(files.kept(f"tokenizers/{name}", make))
  size = trained.get_vocab_size()

  def encode(text: str) -> np.ndarray:
    found = trained.encode_batch_fast(list(_pieces(text)))
    return np.concatenate([np.array(part.ids, smallest(size)) for part in found])

  decode = lambda tokens: trained.decode(np.asarray(tokens).tolist())
  lengths = np.array([len(trained.id_to_token(token) or "") for token in range(size)])
  return Tokenizer(size, encode, decode, lengths)


def smallest(size: int) -> type[np.integer]:
  """Returns the smallest dtype that can represent the tokens of a vocabulary.

  Args:
    size: the number of different tokens.
  """
  return np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.int32


def _trained(text: str, vocabulary: int) -> Any:
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  tokenizer.train_from_iterator(_pieces(text), trainer)
  return tokenizer


def _pieces(text: str) -> Iterator[str]:
  return (text[start : start + _PIECE] for start in range(0, len(text) or 1, _PIECE))


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le"), "<u4")
