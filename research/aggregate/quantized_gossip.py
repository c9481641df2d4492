"""Gossip of compressed values without a memory: the baselines of CHOCO.

Neither converges to the mean: unless the values tend to zero, the compression errors persist.
"""

import jax
import jax.numpy as jnp

from research.aggregate.presence import need_everyone
from research.comm import collectives
from research.comm.neighbours import heard
from research.comm.topology import Topology
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  Compressor,
  Key,
  Trait,
)
from research.core.part import required


class QuantizedGossip(Aggregator):
  """Moves each worker from its own value, exact or compressed, towards its neighbours' values.

  Args:
    compressor: any compressor.
    topology: a topology whose weights are constant and whose rows sum to one.
    axis: the worker axes of the exchange.

  Raises:
    ValueError: if rows of the weights do not sum to one, or the weights vary from round to round.
  """

  compressor: Compressor
  topology: Topology
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.LOCAL

  def check(self):
    if self.topology.varying or not self.topology.balanced:
      raise ValueError(
        f"{self.title} takes a graph whose rows of weights sum to one in each round alike, and "
        f"'{self.topology.title}' does not: take ring, torus, complete, star, or symmetric weights"
      )

  @required
  def origin(self, x: Array, sent: Array) -> Array:
    """Returns the point from which a worker moves: its value `x`, or the decoded payload `sent`."""
    ...

  def aggregate(self, tree, state, key, presence=EVERYONE):
    need_everyone(self.title, presence)
    leaves, treedef = jax.tree.flatten(tree)
    pairs = [self._one(x, jax.random.fold_in(key, leaf)) for leaf, x in enumerate(leaves)]
    value, sent = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
    return Aggregate(value, sent, state)

  def _one(self, x: Array, key: Key) -> tuple[Array, Array]:
    (shifts,) = self.topology.rounds(collectives.worker_count(self.axis))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    payload = self.compressor.encode(x, key, collectives.worker_key(key, self.axis))
    sent = self.compressor.decode(payload, like, key)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    value, own = x.astype(wide), self.origin(x, sent).astype(wide)
    for weight, other in heard(shifts, payload, self.axis):
      nearer = self.compressor.decode(other, like, key).astype(wide) - own
      value += (weight * nearer).astype(wide)
    return value.astype(x.dtype), sent


class Q1Gossip(QuantizedGossip, name="q1_gossip"):
  """Moves each worker from its exact value towards its neighbours' compressed values.

      value_i = x_i + sum_j w_ij (C(x_j) - x_i)

  The errors do not cancel over the workers: the mean drifts.

  Args:
    compressor: any compressor.
    topology: a topology whose weights are constant and whose rows sum to one.
    axis: the worker axes of the exchange.

  Raises:
    ValueError: if rows of the weights do not sum to one, or the weights vary from round to round.

  Reference: Aysal, Coates, Rabbat 2008, IEEE Trans. Signal Processing 56(10); scheme (Q1-G) in
    Koloskova, Stich, Jaggi 2019, arXiv 1902.00340, section 3.2.
  """

  def origin(self, x, sent):
    return x


q1_gossip = Q1Gossip


class Q2Gossip(QuantizedGossip, name="q2_gossip"):
  """Moves each worker by the differences between its neighbours' and its own compressed values.

      value_i = x_i + sum_j w_ij (C(x_j) - C(x_i))

  Symmetric weights preserve the workers' mean, but the compression errors prevent consensus.

  Args and Raises: see `q1_gossip`.

  Reference: Carli, Fagnani, Frasca, Zampieri 2010, Automatica 46(1); scheme (Q2-G) in Koloskova,
    Stich, Jaggi 2019, arXiv 1902.00340, section 3.2.
  """

  def origin(self, x, sent):
    return sent


q2_gossip = Q2Gossip
