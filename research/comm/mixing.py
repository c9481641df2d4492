"""Computes mixing matrices of topologies, and how fast the matrices reach consensus."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from research.comm.topology import Topology


def mixing(topology: "Topology", count: int) -> np.ndarray:
  """Returns the mixing matrices w_ij of all rounds of a period.

  Args:
    topology: the graph.
    count: W, the number of workers.

  Returns:
    The matrices, float64 [period, W, W].
  """
  every = np.zeros((len(topology.rounds(count)), count, count))
  for matrix, shifts in zip(every, topology.rounds(count), strict=True):
    for offset, values in shifts:
      matrix[np.arange(count), (np.arange(count) - offset) % count] += values
  return every


def spectral_gap(matrices: np.ndarray) -> float:
  """Computes the spectral gap 1 - |lambda_2| of the product of a period's mixing matrices.

  The gap is 0 if the workers never reach consensus, and 1 if they reach it in a single period.

  Args:
    matrices: the mixing matrices [period, W, W], as returned by `mixing`.
  """
  product = np.linalg.multi_dot([np.eye(matrices.shape[1]), *matrices[::-1]])
  sizes = np.sort(np.abs(np.linalg.eigvals(product)))
  return float(1 - sizes[-2]) if len(sizes) > 1 else 1.0


def gap_of(topology: "Topology", count: int) -> float:
  """Computes the spectral gap of a period or, if rounds are drawn, of the mean mixing matrix.

  If the drawn matrices are matchings, the gap of their mean is the expected relative decrease of
  the squared distance from the mean in one round.

  Args:
    topology: the graph.
    count: W, the number of workers.
  """
  every = mixing(topology, count)
  return spectral_gap(every.mean(0, keepdims=True) if topology.drawn else every)


def describe(topology: "Topology", count: int) -> str:
  """Describes a topology in one line: the number of links per worker, and the spectral gap.

  Args:
    topology: the graph and its weights.
    count: W, the number of workers.
  """
  every = mixing(topology, count)
  links = np.count_nonzero(every * (1 - np.eye(count))) / (len(every) * count)
  repeats = topology.varying and not topology.drawn
  period = f"a period of {len(every)} rounds" if repeats else "a round"
  gap = gap_of(topology, count)
  return (
    f"{topology.title} of {count} workers: {links:.3g} links each, spectral gap {gap:.3g} {period}"
  )
