"""Averages the elements of a leaf in turn, each element once every 1 / fraction rounds."""

import math
from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.presence import weighted
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Key


class TurnsState(NamedTuple):
  count: Array  # int32, completed rounds


class InTurn(Aggregator):
  """Averages one element of each group of P consecutive elements per round.

  The order within a group is cyclic and starts at an element that is drawn for each group.

  Args:
    fraction: 1 / P, in (0, 1]; a fraction whose inverse is not an integer is rounded down to 1 / P.
    seed: the seed of the first elements.
    axis: the worker axes to average over.
  """

  fraction: float
  _: KW_ONLY
  seed: int = 0
  axis: collectives.Axes = WORKER_AXES
  redrawn: ClassVar[bool]  # whether every cycle of P rounds draws a new order

  def check(self):
    checks.in_range("fraction", self.fraction, "(0, 1]")

  @property
  def rounds(self) -> int:
    """Returns P, the number of rounds in which each element is averaged once."""
    return math.ceil(1 / self.fraction - 1e-9)

  def init(self, params):
    return TurnsState(jnp.zeros((), jnp.int32))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    del key
    leaves, treedef = jax.tree.flatten(weighted(tree, presence))
    cycle = state.count // self.rounds if self.redrawn else jnp.zeros((), jnp.int32)
    drawn = jax.random.fold_in(jax.random.key(self.seed), cycle)
    keys = [jax.random.fold_in(drawn, leaf) for leaf in range(len(leaves))]
    pairs = [self._one(x, own, state.count) for x, own in zip(leaves, keys, strict=True)]
    value, sent = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
    return Aggregate(value, sent, TurnsState(state.count + 1))

  def _one(self, x: Array, key: Key, count: Array) -> tuple[Array, Array]:
    """Returns a leaf's mean and this worker's value at the elements whose turn it is."""
    groups = -(-x.size // self.rounds)
    first = jax.random.randint(key, (groups,), 0, self.rounds)
    turn = jnp.arange(self.rounds)[None] == ((first + count) % self.rounds)[:, None]
    filled = jnp.pad(x.reshape(-1), (0, groups * self.rounds - x.size)).reshape(groups, -1)
    own = jnp.sum(jnp.where(turn, filled, 0), 1, dtype=x.dtype)
    put = lambda row: jnp.where(turn, row[:, None], 0).reshape(-1)[: x.size].reshape(x.shape)
    return put(collectives.mean(own, self.axis)), put(own)


class Shuffled(InTurn, name="shuffled"):
  """Averages a fraction of the elements per round, in a fixed random order.

      value_k = 1/W sum_i x_i_k if k is in S_t, else 0

  S_t has one element of each group of P = ceil(1 / fraction) consecutive elements of a leaf, and is
  equal on all workers. Each element is in exactly one of any P consecutive sets S_t. With
  `sum_mean(random_k(fraction))`, about a third of the elements, (1 - 1/P)^P, is not averaged in P
  rounds. The authors of SPARTA shuffle all elements of a leaf; here the order within a group is
  cyclic and starts at a random element, so the leaf need not be permuted.

  Args:
    fraction: the fraction of the elements to average per round, in (0, 1].
    seed: the seed of the order.
    axis: the worker axes to average over.

  Raises:
    ValueError: if fraction is not in (0, 1].

  Reference: Beton et al. 2025, OpenReview stFPf3gzq1, and the shuffled selector of the authors'
    code.
  """

  redrawn = False


shuffled = Shuffled


class Partitioned(InTurn, name="partitioned"):
  """Averages a fraction of the elements per round; every cycle draws a new partition.

      value_k = 1/W sum_i x_i_k if k is in S_t, else 0

  This aggregator is `shuffled` with an order that is drawn again every P = ceil(1 / fraction)
  rounds: in each cycle of P rounds, each element is in exactly one S_t.

  Args:
    fraction: the fraction of the elements to average per round, in (0, 1].
    seed: the seed of the partitions.
    axis: the worker axes to average over.

  Raises:
    ValueError: if fraction is not in (0, 1].

  Reference: Beton et al. 2025, OpenReview stFPf3gzq1, and the partitioned selector of the authors'
    code.
  """

  redrawn = True


partitioned = Partitioned
