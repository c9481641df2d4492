"""Implements gossip of compressed values without a memory: the baselines of CHOCO.

Neither algorithm converges to the mean: unless the values tend to zero, the compression errors
persist.
"""

from typing import ClassVar

import jax

from research.aggregate.coded_gossip import CodedGossip
from research.aggregate.presence import need_everyone
from research.core.base import EVERYONE, Aggregate, Array, Key


class QuantizedGossip(CodedGossip):
  """Moves each worker from its own value, exact or compressed, towards its neighbours' values.

  Args:
    compressor: the compressor that encodes a worker's value.
    topology: a topology whose weights are the same in each round and whose rows sum to one.
    axis: the worker axes of the exchange.

  Raises:
    ValueError: if a row of the weights does not sum to one, or the weights vary from round to
      round.
  """

  exact_origin: ClassVar[bool]  # whether a worker moves from its exact value instead of its message

  def check(self):
    if self.topology.varying or not self.topology.balanced:
      raise ValueError(
        f"{self.title} takes a graph whose rows of weights sum to one in each round alike, and "
        f"'{self.topology.title}' does not: use ring, torus, complete, star, or symmetric weights"
      )

  def aggregate(self, tree, state, key, presence=EVERYONE):
    need_everyone(self.title, presence)
    leaves, treedef = jax.tree.flatten(tree)
    pairs = [self._one(x, jax.random.fold_in(key, leaf)) for leaf, x in enumerate(leaves)]
    value, sent = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
    return Aggregate(value, sent, state)

  def _one(self, x: Array, key: Key) -> tuple[Array, Array]:
    sent, value = self.drawn(x, x, key, x if self.exact_origin else None)
    return value.astype(x.dtype), sent


class Q1Gossip(QuantizedGossip, name="q1_gossip"):
  """Moves each worker from its exact value towards its neighbours' compressed values.

      value_i = x_i + sum_j w_ij (C(x_j) - x_i)

  The compression errors do not cancel over the workers, so the mean drifts.

  Args:
    compressor: the compressor that encodes a worker's value.
    topology: a topology whose weights are the same in each round and whose rows sum to one.
    axis: the worker axes of the exchange.

  Raises:
    ValueError: if a row of the weights does not sum to one, or the weights vary from round to
      round.

  Reference: Aysal, Coates, Rabbat 2008, IEEE Trans. Signal Processing 56(10); scheme (Q1-G) in
    Koloskova, Stich, Jaggi 2019, arXiv 1902.00340, section 3.2.
  """

  exact_origin = True


q1_gossip = Q1Gossip


class Q2Gossip(QuantizedGossip, name="q2_gossip"):
  """Moves each worker by the differences between its neighbours' and its own compressed values.

      value_i = x_i + sum_j w_ij (C(x_j) - C(x_i))

  Symmetric weights preserve the mean over workers, but the compression errors prevent consensus.

  Args:
    compressor: the compressor that encodes a worker's value.
    topology: a topology whose weights are the same in each round and whose rows sum to one.
    axis: the worker axes of the exchange.

  Raises:
    ValueError: if a row of the weights does not sum to one, or the weights vary from round to
      round.

  Reference: Carli, Fagnani, Frasca, Zampieri 2010, Automatica 46(1); scheme (Q2-G) in Koloskova,
    Stich, Jaggi 2019, arXiv 1902.00340, section 3.2.
  """

  exact_origin = False


q2_gossip = Q2Gossip
