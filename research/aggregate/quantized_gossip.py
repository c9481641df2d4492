"""Gossip of compressed values, without a memory of what was sent: what CHOCO is held against.

Neither finds the mean: values that do not tend to zero leave errors that do not.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.aggregate.composition import traits_of
from research.aggregate.presence import need_everyone
from research.comm import collectives
from research.comm.topology import Topology, heard
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Compressor


def q1_gossip(
  compressor: Compressor, topology: Topology, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
  """Each worker moves from its exact value to its neighbours' compressed ones.

      value_i = x_i + sum_j w_ij (C(x_j) - x_i)

  The errors do not cancel over the workers: their mean wanders off.

  Args:
    compressor: any.
    topology: one whose rows of weights sum to one, the same in each round.
    axis: the worker axes to talk over.

  Raises:
    ValueError: if rows of the weights do not sum to one, or change from round to round.

  Reference: Aysal, Coates, Rabbat 2008, IEEE Trans. Signal Processing 56(10); scheme (Q1-G) in
    Koloskova, Stich, Jaggi 2019, arXiv 1902.00340, section 3.2.
  """
  return _gossip("q1_gossip", compressor, topology, axis, lambda x, sent: x)


def q2_gossip(
  compressor: Compressor, topology: Topology, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
  """Each worker moves by the differences of compressed values, its own among them.

      value_i = x_i + sum_j w_ij (C(x_j) - C(x_i))

  With symmetric weights the workers' mean stays what it is, and they stay apart by the errors.

  Args and raises as `q1_gossip`.

  Reference: Carli, Fagnani, Frasca, Zampieri 2010, Automatica 46(1); scheme (Q2-G) in Koloskova,
    Stich, Jaggi 2019, arXiv 1902.00340, section 3.2.
  """
  return _gossip("q2_gossip", compressor, topology, axis, lambda x, sent: sent)


def _gossip(
  name: str,
  compressor: Compressor,
  topology: Topology,
  axis: collectives.Axes,
  from_: Callable[[Array, Array], Array],
) -> Aggregator:
  """Moves to what is heard from the exact value or from what was sent of it."""
  if topology.varying or not topology.balanced:
    raise ValueError(
      f"{name} takes a graph whose rows of weights sum to one in each round alike, and "
      f"'{topology.name}' does not: take ring, torus, complete, star, or symmetric weights"
    )

  def one(x, key):
    (shifts,) = topology.rounds(collectives.worker_count(axis))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    payload = compressor.encode(x, key, collectives.worker_key(key, axis))
    sent = compressor.decode(payload, like, key)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    value, own = x.astype(wide), from_(x, sent).astype(wide)
    for weight, other in heard(shifts, payload, axis):
      nearer = compressor.decode(other, like, key).astype(wide) - own
      value += (weight * nearer).astype(wide)
    return value.astype(x.dtype), sent

  def aggregate(tree, state, key, presence=EVERYONE):
    need_everyone(name, presence)
    leaves, treedef = jax.tree.flatten(tree)
    pairs = [one(x, jax.random.fold_in(key, leaf)) for leaf, x in enumerate(leaves)]
    value, sent = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
    return Aggregate(value, sent, state)

  return Aggregator(lambda params: (), aggregate, traits_of(compressor) | {"local"})
