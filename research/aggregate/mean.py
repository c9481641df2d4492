"""Exact averages: what synchronous data parallelism and its relatives exchange."""

from research.base import WORKER_AXES, Aggregate, Aggregator
from research.comm import collectives


def mean(axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The mean over all workers, by one all-reduce: 2 (W-1)/W times the tree's bytes per worker.

  Args:
    axis: the worker axes to average over; all by default.

  Reference: Patarasuk and Yuan 2009, bandwidth-optimal all-reduce.
  """

  def aggregate(tree, state, key):
    del key
    return Aggregate(collectives.mean(tree, axis), tree, state)

  return Aggregator(lambda params: (), aggregate)


def hierarchical_mean(fast: str = "data", slow: str = "slice") -> Aggregator:
  """The mean over all workers in two steps: within each slice, then between the slices.

  Only one all-reduce among the slices crosses the slow links, of which each worker carries one
  tree, instead of one among all workers.

  Args:
    fast: the worker axis inside a slice.
    slow: the worker axis between slices.

  Raises:
    ValueError: when traced on a mesh without both axes.
  """

  def aggregate(tree, state, key):
    del key
    return Aggregate(collectives.mean(collectives.mean(tree, fast), slow), tree, state)

  return Aggregator(lambda params: (), aggregate)
