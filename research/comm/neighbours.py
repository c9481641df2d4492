"""Exchanges the messages of one round along the links of a communication graph."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from research.comm import collectives
from research.comm.topology import Shift
from research.core.base import WORKER_AXES, Array, Tree


def own_weight(shifts: Sequence[Shift], axes: collectives.Axes = WORKER_AXES) -> float | Array:
  """Returns the weight w_ii of this worker's own value.

  The weight is a static float if it is equal on all workers; otherwise, a float32 scalar.

  Args:
    shifts: the links of one round of a topology, grouped by offset.
    axes: the worker axes of the exchange.
  """
  found = [s for s in shifts if s.offset == 0]
  return _of_worker(found[0].weights, axes) if found else 0.0


def heard(
  shifts: Sequence[Shift], message: Tree, axes: collectives.Axes = WORKER_AXES
) -> list[tuple[float | Array, Tree]]:
  """Sends this worker's message to its neighbours, and receives their messages with their weights.

  Permutations run over the existing links only, so the traffic of a worker is proportional to its
  number of links, not to W. Shifts whose links have no sender and no receiver in common share one
  permutation: a matching of the workers is a single message.

  Args:
    shifts: the links of one round of a topology, grouped by offset.
    message: this worker's arrays, which may have any dtypes.
    axes: the worker axes of the exchange.

  Returns:
    For each permutation, the weight w_ij and the message of worker j; both are zero if there is no
    link.
  """
  return [
    (_of_worker(values, axes), collectives.permute(message, links, axes))
    for values, links in _permutations(shifts)
  ]


def _permutations(shifts: Sequence[Shift]) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
  """Groups the links of a round so that each worker sends and receives at most once per group.

  Returns:
    For each group, the weights w_ij by receiver, [W], which are zero without a link; and the links,
    as (sender, receiver).
  """
  found: list[tuple[np.ndarray, dict[int, int]]] = []  # weights, and sender by receiver
  for offset, values in shifts:
    if not offset:
      continue
    new = {i: (i - offset) % len(values) for i in map(int, np.flatnonzero(values))}
    for number, (weights, senders) in enumerate(found):
      if not (new.keys() & senders.keys() or {*new.values()} & {*senders.values()}):
        found[number] = weights + values, senders | new
        break
    else:
      found.append((values, new))
  return [(weights, [(j, i) for i, j in senders.items()]) for weights, senders in found]


def _of_worker(values: np.ndarray, axes: collectives.Axes) -> float | Array:
  """Returns this worker's value, as a static float if it is equal on all workers."""
  if (values == values[0]).all():
    return float(values[0])
  return jnp.asarray(values, jnp.float32)[collectives.worker_index(axes)]
