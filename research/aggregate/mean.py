"""Exact averages: what synchronous data parallelism and its relatives exchange."""

from research.aggregate.link import plain
from research.aggregate.presence import weighted
from research.aggregate.privacy.hiding import Sum
from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator


def mean(axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The mean over all workers, by one all-reduce: 2 (W-1)/W times the tree's bytes per worker.

  Args:
    axis: the worker axes to average over; all by default.

  Reference: Patarasuk and Yuan 2009, bandwidth-optimal all-reduce.
  """

  def aggregate(tree, state, key, presence=EVERYONE):
    del key
    return Aggregate(collectives.mean(tree, axis, presence), weighted(tree, presence), state)

  return Aggregator(lambda params: (), aggregate, frozenset({"dense"}), plain(), Sum(axis))
