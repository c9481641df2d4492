"""Defines language modelling on text files, plain or compressed."""

from collections.abc import Callable

import flax.linen as nn

from research.core import checks, paths
from research.core.registry import Default
from research.core.task import Task
from research.tasks import files, texts
from research.tasks.language import tokens
from research.tasks.language.language import Text, next_token

TINYSHAKESPEARE_URL = (
  "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKENIZERS = ("bytes", "characters", "bpe")


def tinyshakespeare(
  *,
  model: Callable[[int], nn.Module] = Default("model", "transformer('tiny')"),
  data_dir: str = "",
  context: int = 128,
  by_role: bool = False,
) -> Task:
  """Trains a character model on Shakespeare's plays: 1.1 million characters, 65 different ones.

  The last tenth of the text is held out.

  Args:
    model: a function that makes the module for 65 outputs; the module maps tokens [b, T] to logits
      [b, T, 65].
    data_dir: the folder to search first; see `files.find`.
    context: T, the maximum number of characters that a prediction is made from.
    by_role: whether the training text is sorted by the role that speaks. With the partition
      `sorted()`, different workers then have the speeches of different roles.

  Raises:
    FileNotFoundError: if the file is not found and cannot be downloaded.
    ValueError: if the file is not the published one, or the model or the context is not suitable.

  Reference: Karpathy, 2015, The unreasonable effectiveness of recurrent neural networks; the file
    of char-rnn.
  """
  path = files.find(
    "tinyshakespeare/input.txt", data_dir, TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256
  )
  arrange = roles_together if by_role else None
  return _text(str(path), model, "characters", None, context, 0.1, arrange)


def text(
  path: str,
  *,
  model: Callable[[int], nn.Module] = Default("model", "transformer('tiny')"),
  tokenizer: str = "bytes",
  vocabulary: int | None = None,
  context: int = 128,
  held_out: float = 0.1,
) -> Task:
  """Trains a language model on any UTF-8 text, plain, .gz or .bz2; the last part is held out.

  See `next_token`.

  Args:
    path: the path of the file.
    model: a function that makes the module for V outputs, one per token of the vocabulary; the
      module maps tokens [b, T] to logits [b, T, V].
    tokenizer: "bytes" (V = 256), "characters" (one token per different character of the text), or
      "bpe", which is trained on the training part.
    vocabulary: the size V of the vocabulary of "bpe", which is smaller if the text has too few
      pairs; None means 4096.
    context: T, the maximum number of tokens that a prediction is made from.
    held_out: the fraction of the characters that is held out, in (0, 1).

  Raises:
    ValueError: if the file does not exist, is not UTF-8 or is too short, or an argument is invalid.
  """
  return _text(path, model, tokenizer, vocabulary, context, held_out)


def _text(
  path: str,
  model: Callable[[int], nn.Module],
  tokenizer: str,
  vocabulary: int | None,
  context: int,
  held_out: float,
  arrange: Callable[[str], str] | None = None,
) -> Task:
  """Returns the task of `text`; `arrange` reorders the training part."""
  if tokenizer not in TOKENIZERS:
    raise ValueError(f"tokenizer={tokenizer!r} is none of {', '.join(TOKENIZERS)}")
  if vocabulary is not None and tokenizer != "bpe":
    raise ValueError(f"vocabulary={vocabulary}: only tokenizer='bpe' has one to choose")
  checks.in_range("held_out", held_out, "(0, 1)")
  content = _read(path)
  end = int((1 - held_out) * len(content))
  train = arrange(content[:end]) if arrange else content[:end]
  coder = {
    "bytes": tokens.utf8,
    "characters": lambda: tokens.characters(content),
    "bpe": lambda: tokens.bpe(
      content[:end], tokens.VOCABULARY if vocabulary is None else vocabulary
    ),
  }[tokenizer]()
  parts = [Text(coder.encode(x), len(x.encode())) for x in (train, content[end:])]
  return next_token(model(coder.size), coder.size, *parts, context=context)


def roles_together(text: str) -> str:
  """Sorts the speeches of plays by the role that speaks, which the first line of a speech names.

  Args:
    text: the speeches, separated by blank lines; each starts with a line such as "First Citizen:".

  Returns:
    The same speeches, in the order of the roles' names; the order within a role does not change.
  """
  speeches = text.strip("\n").split("\n\n")
  role = lambda speech: speech.strip("\n").partition(":\n")[0]
  return "\n\n".join(sorted(speeches, key=role)) + "\n"


def _read(path: str) -> str:
  place = paths.local(path)
  if not place.is_file():
    raise ValueError(f"{path} is not a file")
  return texts.read(place)
