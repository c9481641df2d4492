"""Exchange along the links of a communication graph, in one round."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from research.comm import collectives
from research.comm.topology import Shift
from research.core.base import WORKER_AXES, Array, Tree


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
