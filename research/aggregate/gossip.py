"""Averages over the neighbours in a graph, as decentralized methods do."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.presence import need_everyone
from research.comm import collectives
from research.comm.neighbours import heard, own_weight
from research.comm.topology import Shift, Topology
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Trait, Tree
from research.core.part import required


class GossipState(NamedTuple):
  count: Array  # int32, completed rounds


class Exchange(Aggregator):
  """Exchanges trees with the neighbours that a topology gives a worker in the current round.

  The rounds of the topology's period follow one another, or the shared key draws one of them.

  Args:
    topology: the graph and its weights.
    axis: the worker axes of the exchange.
  """

  topology: Topology
  axis: collectives.Axes = WORKER_AXES

  @required
  def mix(self, shifts: Sequence[Shift], tree: Tree) -> Tree:
    """Combines a worker's tree with the trees received over `shifts`, the links of one round."""
    ...

  def init(self, params):
    return GossipState(jnp.zeros((), jnp.int32))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    need_everyone(f"gossip over '{self.topology.title}'", presence)
    rounds = self.topology.rounds(collectives.worker_count(self.axis))
    branches = [lambda tree, shifts=shifts: self.mix(shifts, tree) for shifts in rounds]
    drawn = lambda: jax.random.randint(key, (), 0, len(rounds))
    number = drawn() if self.topology.drawn else state.count % len(rounds)
    value = lax.switch(number, branches, tree)
    return Aggregate(value, tree, GossipState(state.count + 1))


class Gossip(Exchange, name="gossip"):
  """Averages the values of neighbours once; the mean over all workers is preserved.

      value_i = x_i + sum_j w_ij (x_j - x_i) = sum_j w_ij x_j

  Each round reduces the distance between the workers' values and their mean by a factor of the
  second largest singular value of (w_ij). A worker sends its tree over each of its links, for any
  number of workers.

  Args:
    topology: the graph and its weights, whose rows and columns must sum to one.
    axis: the worker axes of the exchange.

  Raises:
    ValueError: if rows of the weights do not sum to one.

  Reference: Xiao, Boyd 2004, Systems and Control Letters 53(1); Boyd, Ghosh, Prabhakar,
    Shah 2006, IEEE Trans. Information Theory 52(6).
  """

  adds = Trait.LOCAL | Trait.DENSE

  def check(self):
    if not self.topology.balanced:
      raise ValueError(
        "gossip finds the mean only if rows of the weights sum to one as columns do; on any other "
        "directed graph use push_sum, or sgp for training"
      )

  @property
  def traits(self):
    directed = Trait(0) if self.topology.symmetric else Trait.DIRECTED
    return super().traits | directed | (Trait.VARYING if self.topology.varying else Trait(0))

  def mix(self, shifts, tree):
    value = own = _widened(tree)
    for weight, other in heard(shifts, tree, self.axis):
      nearer = lambda v, x, y, w=weight: v + (w * (y.astype(x.dtype) - x)).astype(v.dtype)
      value = jax.tree.map(nearer, value, own, other)
    return _narrowed(value, tree)


gossip = Gossip


class Push(Exchange):
  """Computes value_i = sum_j w_ij x_j, where the rows of the weights may have any sum.

  The sum over workers is preserved. `push_sum` and `sgp` use this exchange.

  Args:
    topology: any topology.
    axis: the worker axes of the exchange.
  """

  adds = Trait.LOCAL | Trait.DENSE | Trait.WEIGHTED

  def mix(self, shifts, tree):
    kept = own_weight(shifts, self.axis)
    value = jax.tree.map(lambda x: (kept * x).astype(x.dtype), _widened(tree))
    for weight, other in heard(shifts, tree, self.axis):
      given = lambda v, y, w=weight: v + (w * y.astype(v.dtype)).astype(v.dtype)
      value = jax.tree.map(given, value, other)
    return _narrowed(value, tree)


push = Push


class PushSumState(NamedTuple):
  weight: Array  # w_i, private; sum_i w_i = W
  link: GossipState


class PushSum(Aggregator, name="push_sum"):
  """Averages on a directed graph: each worker divides by the weight that it received.

      w_i <- sum_j a_ij w_j,   value_i = (sum_j a_ij w_j x_j) / w_i          w_i = 1 initially

  where the columns of (a_ij) sum to one. Rounds preserve sum_i w_i x_i / W, so values that are only
  averaged converge to the exact mean on any strongly connected graph. A change that a worker makes
  to its value between rounds counts w_i times; `sgp` is the method that weights gradients equally.

  Args:
    topology: any topology.
    axis: the worker axes of the exchange.

  Reference: Kempe, Dobra, Gehrke 2003, FOCS, protocol push-sum; Nedic, Olshevsky 2015,
    IEEE Trans. Automatic Control 60(3), arXiv 1303.2289.
  """

  topology: Topology
  axis: collectives.Axes = WORKER_AXES
  adds = Push.adds

  @property
  def _push(self) -> Push:
    return Push(self.topology, self.axis)

  def init(self, params):
    return PushSumState(jnp.ones(()), self._push.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    need_everyone("push_sum", presence)
    held = jax.tree.map(lambda x: (state.weight * x).astype(x.dtype), tree)
    (sum_, weight), _, link = self._push.aggregate((held, state.weight), state.link, key)
    value = jax.tree.map(lambda x: (x / weight).astype(x.dtype), sum_)
    return Aggregate(value, tree, PushSumState(weight, link))


push_sum = PushSum


def _widened(tree: Tree) -> Tree:
  """Casts a tree to float32 or wider, so that the sum over links is not rounded at each link."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _narrowed(value: Tree, like: Tree) -> Tree:
  return jax.tree.map(lambda v, x: v.astype(x.dtype), value, like)
