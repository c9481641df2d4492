"""Reading a text that fits no memory: any batch of any step, straight from the disk."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

Reader = Callable[[int, int, int, int], np.ndarray]


def tokens_of(path: str | Path) -> np.ndarray:
  """The tokens in a file, mapped into memory and read where they are looked at.

  Args:
    path: of a .npy file of unsigned or 32-bit whole numbers [N], or of any other, whose bytes then
      are the tokens.

  Raises:
    ValueError: it is none, or holds something else.
  """
  path = Path(path).expanduser()
  if not path.is_file() or not path.stat().st_size:
    raise ValueError(f"{path} is no file, or an empty one")
  if path.suffix != ".npy":
    return np.memmap(path, np.uint8, "r")
  try:
    found = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f"{path} is no .npy file of numbers ({error})") from None
  if found.ndim != 1 or found.dtype not in (np.uint8, np.uint16, np.uint32, np.int32):
    raise ValueError(f"{path} holds {found.dtype} {list(found.shape)}, not tokens [N]")
  return found


def reader(tokens: np.ndarray, context: int, batch_size: int) -> Reader:
  """`read(seed, step, process, processes)`: that process's rows of the batch of that step.

  A pure function, and cheap for any step: nothing has to be stored, or read over, to go on. The
  batch of a step does not depend on the number of processes; each reads its rows of it and no
  others. As in `language.next_token` the first N - N mod T tokens are a ring, and the windows of an
  epoch tile it: N // T windows of T + 1 tokens that predict every token once, in an order and at an
  offset of their epoch's own. Epochs follow one another without a gap, within a batch too.

  Args:
    tokens: [N] whole numbers, such as those of `tokens_of`; N >= context.
    context: T, tokens that a window predicts.
    batch_size: windows of all processes in one step.

  Returns:
    The function, which gives [batch_size / processes, T + 1], of the type of the tokens.

  Raises:
    ValueError: an argument is out of its range or grain, which shuffles, is missing; when called,
      the batch does not divide among the processes.
  """
  if not 1 <= context <= len(tokens) or batch_size < 1:
    raise ValueError(
      f"context={context}, batch_size={batch_size}: need one at least, and at most the "
      f"{len(tokens)} tokens in a window"
    )
  try:
    from grain.experimental import index_shuffle
  except ImportError:
    raise ValueError('streaming needs grain: pip install -e ".[text]"') from None
  windows = len(tokens) // context
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

  def read(seed: int, step: int, process: int, processes: int) -> np.ndarray:
    share, rest = divmod(batch_size, processes)
    if rest or not 0 <= process < processes:
      raise ValueError(
        f"process {process} of {processes}: the batch of {batch_size} windows does not divide so"
      )
    rows = np.empty((share, context + 1), tokens.dtype)
    first = step * batch_size + process * share
    for i, row in enumerate(rows):
      begin = start(seed, first + i)
      whole = tokens[begin : min(begin + context + 1, length)]
      row[: len(whole)], row[len(whole) :] = whole, tokens[: context + 1 - len(whole)]
    return rows

  return read
