"""Who talks to whom: graphs of workers, the weights of their links, and exchange along them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from research.comm import collectives
from research.core.base import WORKER_AXES, Array, Tree

_TOLERANCE = 1e-6


class Shift(NamedTuple):
  """Links of one direction around the ring of worker numbers."""

  offset: int  # worker i hears worker i - offset, modulo W; 0: itself
  weights: np.ndarray  # [W], w_ij of what worker i hears there; 0: no link


class Topology(NamedTuple):
  """Mixing weights for any number of workers, round by round.

  In x_i <- sum_j w_ij x_j a worker hears those j for which w_ij > 0. Columns always sum to one:
  what a worker gives away is what it had. `balanced` weights sum to one in rows too, so that a
  consensus stays one and the mean is found without further ado.
  """

  name: str
  rounds: Callable[[int], list[list[Shift]]]  # W -> a period of rounds, repeated
  directed: bool = False  # w_ij = w_ji need not hold
  balanced: bool = True
  varying: bool = False  # the period may be longer than one round


def ring() -> Topology:
  """Each worker and the two beside it, a third each; of two workers, half each."""
  neighbours = lambda count: [{(i - 1) % count, (i + 1) % count} for i in range(count)]
  return _undirected("ring", neighbours)


def torus() -> Topology:
  """A grid of a x b = W workers without edges, a the largest divisor up to sqrt(W).

  A worker and its neighbours have equal weights, a fifth if there are four; a prime W makes a ring.
  """

  def neighbours(count):
    rows = max(a for a in range(1, math.isqrt(count) + 1) if count % a == 0)
    width = count // rows
    place = lambda row, column: row % rows * width + column % width
    around = lambda r, c: {place(r - 1, c), place(r + 1, c), place(r, c - 1), place(r, c + 1)}
    return [around(*divmod(i, width)) for i in range(count)]

  return _undirected("torus", neighbours)


def complete() -> Topology:
  """Everybody with everybody, 1/W each: one round gives the mean, for W - 1 trees per worker."""
  return _undirected("complete", lambda count: [set(range(count)) for _ in range(count)])


def star() -> Topology:
  """Worker 0 with each of the others, by Metropolis-Hastings weights 1/W."""
  neighbours = lambda count: [set(range(count)) if i == 0 else {0} for i in range(count)]
  return _undirected("star", neighbours)


def exponential() -> Topology:
  """Worker i speaks to i + 1, i + 2, i + 4, ...: with t = ceil(log2 W) links, 1 / (t + 1) each.

  The spectral gap is 2 / (t + 1) for even W, so it closes with the logarithm of W alone.

  Reference: Ying, Yuan, Chen, Hu, Pan, Yin 2021, arXiv 2110.13363.
  """

  def rounds(count):
    hops = _powers(count)
    share = np.full(count, 1 / (len(hops) + 1))
    return [[Shift(offset, share) for offset in (0, *hops)]]

  return Topology("exponential", rounds, directed=True)


def one_peer_exponential() -> Topology:
  """In round k worker i speaks to i + 2^(k mod t) alone, t = ceil(log2 W), half of it kept.

  Where W is a power of two, t rounds give the exact mean, for one tree sent in each.

  Reference: Ying, Yuan, Chen, Hu, Pan, Yin 2021, arXiv 2110.13363.
  """

  def rounds(count):
    half = np.full(count, 0.5)
    steps = [[Shift(0, half), Shift(offset, half)] for offset in _powers(count)]
    return steps or [[Shift(0, np.ones(count))]]

  return Topology("one_peer_exponential", rounds, directed=True, varying=True)


def weights(matrix: Sequence[Sequence[float]], *, directed: bool = False) -> Topology:
  """Weights of one's own: w_ij in row i and column j is what worker i makes of what j says.

  Args:
    matrix: W rows of W numbers, none negative, rows and columns summing to one.
    directed: only columns need to sum to one, which is enough for `push_sum` and `sgp`.

  Raises:
    ValueError: if the matrix is not square, has a negative number, a sum other than one, a worker
      that does not reach all others, or no spectral gap; when traced, if there are not W workers.
  """
  size = len(matrix)
  if not size or any(len(row) != size for row in matrix):
    lengths = [len(row) for row in matrix]
    raise ValueError(f"weights are {size} rows of lengths {lengths}, not a square")
  array = np.array(matrix, np.float64)
  _check_sums(array, directed)
  _check_connected(array)

  def rounds(count):
    if count != size:
      raise ValueError(f"weights are those of {size} workers, and there are {count}")
    links = {(i, j): float(array[i, j]) for i, j in np.argwhere(array).tolist()}
    return [_shifts(count, links)]

  symmetric = bool(np.abs(array - array.T).max() <= _TOLERANCE)
  balanced = bool(_is_one(array.sum(1)).all())
  return Topology("weights", rounds, directed=not symmetric, balanced=balanced)


def mixing(topology: Topology, count: int) -> np.ndarray:
  """The matrices [period, W, W] of w_ij, round by round."""
  every = np.zeros((len(topology.rounds(count)), count, count))
  for matrix, shifts in zip(every, topology.rounds(count), strict=True):
    for offset, values in shifts:
      matrix[np.arange(count), (np.arange(count) - offset) % count] += values
  return every


def spectral_gap(matrices: np.ndarray) -> float:
  """1 - |lambda_2| of the product of matrices [period, W, W]: how much nearer a period comes.

  Zero where the workers never agree, one where they agree after a single period.
  """
  product = np.linalg.multi_dot([np.eye(matrices.shape[1]), *matrices[::-1]])
  sizes = np.sort(np.abs(np.linalg.eigvals(product)))
  return float(1 - sizes[-2]) if len(sizes) > 1 else 1.0


def describe(topology: Topology, count: int) -> str:
  """One line: links by worker and round, and the spectral gap."""
  every = mixing(topology, count)
  links = np.count_nonzero(every * (1 - np.eye(count))) / (len(every) * count)
  period = f"a period of {len(every)} rounds" if topology.varying else "a round"
  gap = spectral_gap(every)
  return (
    f"{topology.name} of {count} workers: {links:.3g} links each, spectral gap {gap:.3g} {period}"
  )


def own_weight(shifts: Sequence[Shift], axes: collectives.Axes = WORKER_AXES) -> float | Array:
  """w_ii of this worker."""
  found = [s for s in shifts if s.offset == 0]
  return _of_worker(found[0].weights, axes) if found else 0.0


def heard(
  shifts: Sequence[Shift], message: Tree, axes: collectives.Axes = WORKER_AXES
) -> list[tuple[float | Array, Tree]]:
  """What a worker hears in a round: for each direction the weight w_ij and j's message.

  One permutation per direction, of nothing but the links that there are: what a worker sends
  follows its number of links, not W. Without a link in a direction, weight and message are zero.

  Args:
    shifts: a round of a topology.
    message: arrays of any dtypes, this worker's.
    axes: the worker axes to talk over.
  """
  found = []
  for offset, values in shifts:
    if offset:
      links = [((i - offset) % len(values), i) for i in map(int, np.flatnonzero(values))]
      found.append((_of_worker(values, axes), collectives.permute(message, links, axes)))
  return found


def _of_worker(values: np.ndarray, axes: collectives.Axes) -> float | Array:
  """This worker's, static where all have the same."""
  if (values == values[0]).all():
    return float(values[0])
  return jnp.asarray(values, jnp.float32)[collectives.worker_index(axes)]


def _powers(count: int) -> list[int]:
  """1, 2, 4, ... below W."""
  return [2**k for k in range((count - 1).bit_length())]


def _undirected(name: str, neighbours: Callable[[int], list[set[int]]]) -> Topology:
  """Metropolis-Hastings weights w_ij = 1 / (1 + max(d_i, d_j)) of a graph, given W.

  Reference: Xiao, Boyd 2004, Systems and Control Letters 53(1) (local-degree weights).
  """

  def rounds(count):
    around = [others - {i} for i, others in enumerate(neighbours(count))]
    degree = [len(others) for others in around]
    links = {
      (i, j): 1 / (1 + max(degree[i], degree[j])) for i, others in enumerate(around) for j in others
    }
    kept = np.ones(count)
    for (i, _), weight in links.items():
      kept[i] -= weight
    return [_shifts(count, {(i, i): kept[i] for i in range(count)} | links)]

  return Topology(name, rounds)


def _shifts(count: int, links: Mapping[tuple[int, int], float]) -> list[Shift]:
  """Weights by (listener i, speaker j), sorted by offset i - j."""
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
      "weights have spectral gap 0, workers never agree; let one keep a part, w_ii > 0"
    )
