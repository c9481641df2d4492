"""Computes the exact mean over workers, as in synchronous data parallelism."""

from research.aggregate.link import plain
from research.aggregate.presence import weighted
from research.aggregate.privacy.hiding import Sum
from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Trait


class Mean(Aggregator, name="mean"):
  """Averages over all workers; the all-reduce sends 2 (W-1)/W times the tree's bytes per worker.

  Args:
    axis: the worker axes to average over; the default is all worker axes.

  Reference: Patarasuk and Yuan 2009, bandwidth-optimal all-reduce.
  """

  axis: collectives.Axes = WORKER_AXES
  adds = Trait.DENSE

  def aggregate(self, tree, state, key, presence=EVERYONE):
    del key
    value = collectives.mean(tree, self.axis, presence)
    return Aggregate(value, weighted(tree, presence), state)

  @property
  def uplink(self):
    return plain()

  @property
  def privacy(self):
    return Sum(self.axis)


mean = Mean
