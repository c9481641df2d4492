"""Defines communication graphs with the mixing weights of their links."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple

import numpy as np

from research.comm.mixing import spectral_gap
from research.core.part import Part, required

_TOLERANCE = 1e-6


class Shift(NamedTuple):
  """Contains all links with the same offset between sender and receiver, modulo W."""

  offset: int  # worker i receives from worker i - offset, modulo W; 0 means its own value
  weights: np.ndarray  # [W], weight w_ij of the value that worker i receives; 0 means no link


class Topology(Part):
  """Defines the mixing weights for any number of workers and for each round of a period.

  In x_i <- sum_j w_ij x_j, worker i receives from the workers j with w_ij > 0. Each column of w
  sums to one, so the sum over workers is preserved.
  """

  symmetric: ClassVar[bool] = True  # w_ij = w_ji
  balanced: ClassVar[bool] = True  # each row also sums to one, so consensus is preserved
  varying: ClassVar[bool] = False  # True: the period may be longer than one round
  drawn: ClassVar[bool] = False  # True: in each round, the shared key draws one round of the period

  @required
  def rounds(self, count: int) -> list[list[Shift]]:
    """Returns the links of each round of a period, which repeats unless the rounds are drawn.

    Args:
      count: W, the number of workers.
    """
    ...


class Undirected(Topology):
  """An undirected graph with Metropolis-Hastings weights w_ij = 1 / (1 + max(d_i, d_j)).

  Reference: Xiao, Boyd 2004, Systems and Control Letters 53(1) (local-degree weights).
  """

  @required
  def neighbours(self, count: int) -> list[set[int]]:
    """Returns the neighbours of each of the W workers; a set may include the worker itself."""
    ...

  def rounds(self, count):
    around = [others - {i} for i, others in enumerate(self.neighbours(count))]
    degree = [len(others) for others in around]
    links = {
      (i, j): 1 / (1 + max(degree[i], degree[j])) for i, others in enumerate(around) for j in others
    }
    kept = np.ones(count)
    for (i, _), weight in links.items():
      kept[i] -= weight
    return [_shifts(count, {(i, i): kept[i] for i in range(count)} | links)]


class Ring(Undirected, name="ring"):
  """A ring with weights 1/3 for a worker and its two neighbours; with two workers, 1/2 each."""

  def neighbours(self, count):
    return [{(i - 1) % count, (i + 1) % count} for i in range(count)]


ring = Ring


class Torus(Undirected, name="torus"):
  """A periodic grid of a x b = W workers, where a is the largest divisor up to sqrt(W).

  A worker and its neighbours have equal weights, 1/5 for four neighbours. A prime W gives a ring.
  """

  def neighbours(self, count):
    rows = max(a for a in range(1, math.isqrt(count) + 1) if count % a == 0)
    width = count // rows
    place = lambda row, column: row % rows * width + column % width
    around = lambda r, c: {place(r - 1, c), place(r + 1, c), place(r, c - 1), place(r, c + 1)}
    return [around(*divmod(i, width)) for i in range(count)]


torus = Torus


class Complete(Undirected, name="complete"):
  """The complete graph with weights 1/W.

  A round gives the exact mean; each worker sends W - 1 trees.
  """

  def neighbours(self, count):
    return [set(range(count)) for _ in range(count)]


complete = Complete


class Star(Undirected, name="star"):
  """A star with links between worker 0 and all others, and Metropolis-Hastings weights 1/W."""

  def neighbours(self, count):
    return [set(range(count)) if i == 0 else {0} for i in range(count)]


star = Star


class Exponential(Topology, name="exponential"):
  """The static exponential graph: worker i sends to i + 1, i + 2, i + 4, ...

  Each worker has t = ceil(log2 W) links, with weights 1 / (t + 1). For even W, the spectral gap is
  2 / (t + 1), which decreases only with the logarithm of W.

  Reference: Ying, Yuan, Chen, Hu, Pan, Yin 2021, arXiv 2110.13363.
  """

  symmetric = False

  def rounds(self, count):
    hops = _powers(count)
    share = np.full(count, 1 / (len(hops) + 1))
    return [[Shift(offset, share) for offset in (0, *hops)]]


exponential = Exponential


class OnePeerExponential(Topology, name="one_peer_exponential"):
  """The one-peer exponential graph: in round k, worker i sends to i + 2^(k mod t) only.

  The worker's own value and the received value each have weight 1/2, and t = ceil(log2 W). If W is
  a power of two, t rounds give the exact mean, and each worker sends one tree per round.

  Reference: Ying, Yuan, Chen, Hu, Pan, Yin 2021, arXiv 2110.13363.
  """

  symmetric = False
  varying = True

  def rounds(self, count):
    half = np.full(count, 0.5)
    steps = [[Shift(0, half), Shift(offset, half)] for offset in _powers(count)]
    return steps or [[Shift(0, np.ones(count))]]


one_peer_exponential = OnePeerExponential


class RandomPairs(Topology, name="random_pairs"):
  """Random pairs of workers: the shared key draws a perfect matching in each round.

  The two workers of a pair average their values with weights 1/2. The matchings are the W - 1
  rounds of a round-robin tournament, in which every pair meets once: in round r, workers i and j
  with i + j = 2 r modulo W - 1 are paired, and worker W - 1 is paired with worker r. A drawn
  matching contains each pair with probability 1 / (W - 1), like a uniformly random matching. The
  expected squared distance from the mean therefore decreases by the same factor, 1 - W / (2 (W -
  1)). A program contains all W - 1 matchings as permutations, and each round runs one of them: a
  worker sends one tree per round, for any W. If W is odd, there are W matchings, one worker rests
  in each of them, and the factor is 1/2.

  Reference: Boyd, Ghosh, Prabhakar, Shah 2006, IEEE Trans. Information Theory 52(6) (random pairs).
  """

  varying = True
  drawn = True

  def rounds(self, count):
    if count == 1:
      return [[Shift(0, np.ones(1))]]
    return [_paired(count, _matching(count, number)) for number in range(count - 1 + count % 2)]


random_pairs = RandomPairs


class Weights(Topology, name="weights"):
  """A graph with user-defined weights: w_ij is the weight of the value that i receives from j.

  Args:
    matrix: the weights, W rows of W nonnegative numbers; each row and each column sums to one.
    directed: whether only the columns must sum to one, which suffices for `push_sum` and `sgp`.

  Raises:
    ValueError: if the matrix is not square, has a negative number, has a row or column that does
      not sum to one, has a worker that does not reach all other workers, or has a spectral gap of
      zero; or, at trace time, if the number of workers is not W.
  """

  matrix: Sequence[Sequence[float]]
  _: KW_ONLY
  directed: bool = False

  def check(self):
    size = len(self.matrix)
    if not size or any(len(row) != size for row in self.matrix):
      lengths = [len(row) for row in self.matrix]
      raise ValueError(f"weights are {size} rows of lengths {lengths}, not a square")
    _check_sums(self.array, self.directed)
    _check_connected(self.array)

  @property
  def array(self) -> np.ndarray:
    """Returns the matrix, float64 [W, W]."""
    return np.array(self.matrix, np.float64)

  @property
  def symmetric(self):
    return bool(np.abs(self.array - self.array.T).max() <= _TOLERANCE)

  @property
  def balanced(self):
    return bool(_is_one(self.array.sum(1)).all())

  def rounds(self, count):
    size, array = len(self.matrix), self.array
    if count != size:
      raise ValueError(f"weights are those of {size} workers, and there are {count}")
    links = {(i, j): float(array[i, j]) for i, j in np.argwhere(array).tolist()}
    return [_shifts(count, links)]


weights = Weights


def _powers(count: int) -> list[int]:
  """Returns the powers of two below W: 1, 2, 4, ..."""
  return [2**k for k in range((count - 1).bit_length())]


def _matching(count: int, number: int) -> list[tuple[int, int]]:
  """Returns the pairs of one round of a round-robin tournament."""
  last = count - 1 + count % 2  # an even number of players, the last of whom may be missing
  partner = lambda i: (2 * number - i) % last
  pairs = [(i, partner(i)) for i in range(last) if i < partner(i)]
  return pairs if count % 2 else [*pairs, (number, last)]


def _paired(count: int, pairs: Iterable[tuple[int, int]]) -> list[Shift]:
  """Returns the links of a round in which pairs average and all other workers rest."""
  both = [(i, j) for pair in pairs for i, j in (pair, pair[::-1])]
  links = {(i, i): 1.0 for i in range(count)} | {(i, i): 0.5 for i, _ in both}
  return _shifts(count, links | dict.fromkeys(both, 0.5))


def _shifts(count: int, links: Mapping[tuple[int, int], float]) -> list[Shift]:
  """Groups weights by (receiver i, sender j) into shifts, sorted by offset i - j."""
  found: dict[int, np.ndarray] = {}
  for (i, j), weight in links.items():
    found.setdefault((i - j) % count, np.zeros(count))[i] = weight
  return [Shift(offset, found[offset]) for offset in sorted(found)]


def _is_one(sums: np.ndarray) -> np.ndarray:
  return np.abs(sums - 1) <= _TOLERANCE


def _check_sums(array: np.ndarray, directed: bool) -> None:
  if not (np.isfinite(array).all() and (array >= 0).all()):
    i, j = np.argwhere(~(np.isfinite(array) & (array >= 0)))[0]
    raise ValueError(f"weights in row {i}, column {j} hold {array[i, j]}, not a number >= 0")
  hint = "; if only its columns sum to 1, it is directed=True, for push_sum or sgp"
  for line, sums in (("column", array.sum(0)), ("row", array.sum(1))):
    wrong = np.flatnonzero(~_is_one(sums))
    if wrong.size and (line == "column" or not directed):
      more = hint if line == "row" else ""
      raise ValueError(f"{line} {wrong[0]} of weights sums to {sums[wrong[0]]:.6g}, not 1{more}")


def _check_connected(array: np.ndarray) -> None:
  reach = (array > 0) | np.eye(len(array), dtype=bool)
  for _ in range(len(array).bit_length()):
    reach = reach @ reach
  if not reach.all():
    to, from_ = np.argwhere(~reach)[0]
    raise ValueError(f"weights are not connected: nothing gets from worker {from_} to worker {to}")
  if spectral_gap(array[None]) <= _TOLERANCE:
    raise ValueError(
      "weights have spectral gap 0, workers never agree; give some worker a weight w_ii > 0"
    )
